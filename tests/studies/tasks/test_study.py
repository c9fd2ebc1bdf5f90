"""The study of tasks: a miniature, stopped and resumed."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import figures.__main__
from kfacerr.metrics import METRICS
from studies import optimizers
from studies.jobs import Stop
from studies.tasks import study, trials
from studies.tasks.contestants import CONTESTANTS, LADDER, Contestant
from studies.tasks.problems import Task
from tests.studies.helpers import refused
from tests.studies.tasks.tiny import PRESET, TASK

MINE = ["SGD", "AdamW", "K-FAC", "R-KFAC T_updt=1 T_inv=2"]
FAMILY = MINE[2:]
CLOCK = ["seconds"]


def arguments(out: Path, *options: object) -> list[str]:
    fixed = ["--preset", "tasks", "--device", "cpu", "--optimizers", *MINE]
    return [*fixed, "--out", str(out), *map(str, options)]


def run(out: Path, *options: object) -> int:
    return optimizers.main(arguments(out, *options))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study.PRESETS, "tasks", PRESET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.PRESETS, "tasks", PRESET)
        assert run(out) == 0
    return out


def tried(out: Path) -> pd.DataFrame:
    """What does not depend on the clock."""
    return pd.read_csv(out / "trials.csv").drop(columns=CLOCK)


# ------------------------------------------------------------------------------------------------ what is tried


def test_everything_tried_is_in_the_csv(whole: Path) -> None:
    """A row an epoch of each trial that DIR keeps, and of no other."""
    table = tried(whole)
    rows = table.drop_duplicates(["optimizer", "lr", "seed", "stage"])
    assert len(rows) == len(list((whole / "state").glob("tiny-*.pt")))
    assert (table.groupby(["optimizer", "lr", "seed", "stage"]).size() == TASK.epochs).all()
    assert set(table.optimizer) == set(MINE) and set(table.stage) == set(trials.STAGES)


def test_every_grid_is_as_long_before_it_grows_beyond_an_edge(whole: Path) -> None:
    table = tried(whole)
    for name, rates in table[table.stage == "tune"].groupby("optimizer").lr.unique().items():
        grown = [LADDER.index(rate) for rate in sorted(rates)]
        assert grown == list(range(grown[0], grown[-1] + 1)), name
        assert PRESET.rates <= len(rates) <= PRESET.rates + study.EXTENSIONS


def test_the_finals_are_of_fresh_seeds_at_the_rate_of_the_least_training_loss(whole: Path) -> None:
    table = tried(whole)
    for _, group in table.groupby("optimizer"):
        tune, final = group[group.stage == "tune"], group[group.stage == "final"]
        last = tune[tune.epoch == TASK.epochs].set_index("lr").train_loss
        assert set(final.lr) == {last.idxmin()}
        assert set(final.seed) == set(PRESET.seeds) and set(tune.seed) == {PRESET.tuning_seed}


def test_errors_are_of_every_run_of_the_family(whole: Path) -> None:
    table, errors = tried(whole), pd.read_csv(whole / "errors.csv")
    runs = table[table.optimizer.isin(FAMILY) & (table.epoch == TASK.epochs)]
    assert len(errors) == len(METRICS) * len(runs)
    assert set(errors.metric) == set(METRICS) and (errors["mean"] >= 0).all()
    keys = ["optimizer", "lr", "seed", "train_loss"]
    pd.testing.assert_frame_equal(
        errors[keys].drop_duplicates().sort_values(keys).reset_index(drop=True),
        runs[keys].sort_values(keys).reset_index(drop=True),
    )
    exact = errors[(errors.optimizer == "K-FAC") & (errors.metric == "inverse_A")]
    assert (exact["mean"] < 1e-5).all(), "so early in the warm-up K-FAC's inverse is fresh in every step"


@pytest.mark.parametrize(
    ("losses", "more"),
    [
        ({0.01: 3.0, 0.03: 2.0, 0.1: 1.0}, [0.3]),
        ({0.01: 1.0, 0.03: 2.0, 0.1: 3.0}, [0.003]),
        ({0.01: 3.0, 0.03: 2.0, 0.1: 2.5}, []),
        ({0.01: float("inf"), 0.03: float("inf")}, []),
        ({LADDER[-1]: 1.0, LADDER[-2]: 2.0}, []),
    ],
)
def test_a_grid_grows_beyond_its_edge_alone(losses: dict[float, float], more: list[float]) -> None:
    assert study.extended(losses) == more


def test_of_two_rates_alike_the_smaller_is_best() -> None:
    assert study.best({0.3: 1.0, 0.1: 1.0, 1.0: 2.0}) == 0.1


# ------------------------------------------------------------------------------------------- stopped and resumed


def stops_after(count: int) -> Callable[[Stop], bool]:
    """In place of a limit on the time: after so many trials."""
    left = [count]

    def stopped(stop: Stop) -> bool:
        left[0] -= 1
        if left[0] < 0:
            stop.reason = "at the time limit"
        return bool(stop.reason)

    return stopped


@pytest.mark.parametrize("count", [3, 17])
def test_a_stopped_and_resumed_study_equals_an_uninterrupted_one(
    count: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "__call__", stops_after(count))
        assert run(out, "--no-timing") == 0
    assert len(tried(out)) == count * TASK.epochs
    assert run(out, "--resume", "--no-timing") == 0
    pd.testing.assert_frame_equal(tried(out), tried(whole))
    for name in ("errors.csv", "correlations.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_times_are_taken_later_and_not_twice(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "later"
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "__call__", stops_after(3))
        assert run(out, "--no-timing") == 0
    assert "not all is trained" in refused(capsys, optimizers.main, *arguments(out, "--timing-only"))
    assert run(out, "--resume", "--no-timing") == 0
    assert not (out / "timing.csv").exists() and "ms_per_step" not in pd.read_csv(out / "tasks.csv")
    assert run(out, "--timing-only") == 0
    times = pd.read_csv(out / "timing.csv")
    assert list(times.optimizer) == MINE and (times.ms_per_step > 0).all() and (times.steps == 6).all()
    before = (out / "timing.csv").read_bytes()
    assert run(out, "--resume") == 0
    assert (out / "timing.csv").read_bytes() == before
    assert {"ms_per_step", "seconds", "loss_in_time", "seconds_to"} <= set(pd.read_csv(out / "tasks.csv"))


def test_another_configuration_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds a study already" in refused(capsys, optimizers.main, *arguments(whole))
    line = refused(capsys, optimizers.main, *arguments(whole, "--resume", "--rates", 3))
    assert "rates is 2 there and 3 here" in line


# -------------------------------------------------------------------------------------------------- what is left


def test_divergence_is_a_result_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = replace(CONTESTANTS["SGD"], rate=LADDER[-2])
    monkeypatch.setitem(CONTESTANTS, "SGD", wild)
    assert run(tmp_path / "out", "--no-timing") == 0
    table = tried(tmp_path / "out")
    mine = table[table.optimizer == "SGD"]
    assert (mine.train_loss == float("inf")).any() and mine.diverged.str.contains("loss").any()
    assert pd.read_csv(tmp_path / "out" / "tasks.csv").optimizer.tolist()[-1] == "SGD"


def test_what_lacks_its_package_or_its_data_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(source: Any) -> Any:
        raise study.InputError("CIFAR-10 is not in the cache")

    lost: Task = replace(TASK, name="lost", data=nowhere)
    monkeypatch.setitem(study.PRESETS, "tasks", replace(PRESET, tasks={"tiny": TASK, "lost": lost}))
    rival: Contestant = replace(CONTESTANTS["SGD"], name="rival", package="no_such_package")
    monkeypatch.setitem(CONTESTANTS, "rival", rival)
    options = ["--preset", "tasks", "--optimizers", "SGD", "rival", "--no-timing", "--out", str(tmp_path / "out")]
    assert optimizers.main(options) == 0
    said = capsys.readouterr().err
    assert "rival is left out: it needs the package no_such_package" in said
    assert "task lost is left out: CIFAR-10 is not in the cache" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["optimizers"] == ["SGD"] and list(config["tasks"]) == ["tiny"]
    assert "CIFAR-10" in refused(capsys, optimizers.main, *arguments(tmp_path / "named", "--tasks", "lost"))


def test_tables_and_figures_are_rendered_again_from_the_csvs(whole: Path, tmp_path: Path) -> None:
    for name in ("trials.csv", "timing.csv", "errors.csv", "config.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    table = tmp_path / "trials.csv"
    (tmp_path / "trials.csv.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    assert figures.__main__.main([str(tmp_path)]) == 0
    for name in ("tasks.md", "tasks.csv", "correlations.md"):
        assert (tmp_path / name).read_text() == (whole / name).read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"curves.pdf", "curves.png", "scatter.pdf", "scatter.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--rates", "0"], "--rates must be at least 1"),
        (["--timing-only", "--no-timing"], "contradict"),
        (["--step-limit", "3"], "--time-limit stops between two"),
        (["--seed", "0"], "--seed 0 chooses the learning rates"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--optimizers", "sgd"], "no optimizer is called 'sgd'"),
        (["--optimizers", "R-KFAC rankk=3"], "rankk"),
        (["--tasks", "mnist"], "no task is called 'mnist': tiny"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, optimizers.main, *arguments(tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_search_needs_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study.PRESETS, "search", replace(PRESET, name="search", errors=False))
    options = ["--preset", "search", "--optimizers", "R-KFAC momentum=0.9", "--no-timing", "--out"]
    assert optimizers.main([*options, str(tmp_path / "out")]) == 0
    assert set(tried(tmp_path / "out").stage) == {"tune", "final"}
    assert not (tmp_path / "out" / "errors.csv").exists()
