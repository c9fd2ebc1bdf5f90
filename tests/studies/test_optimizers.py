"""The performance study: a miniature, stopped and resumed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import figures.__main__
from figures.optimizers import render
from kfacerr.exceptions import InputError
from studies import optimizers, timing
from studies.config import TABLE_1, TrainingConfig
from studies.drivers import DRIVERS
from studies.optimizers import OptimizerRun
from studies.presets import OPTIMIZER_PRESETS, OptimizerPreset
from studies.timing import Timing
from studies.training import Training
from tests.studies.helpers import refused, tiny_dataset

TINY = OptimizerPreset(
    name="tiny",
    dataset="digits",
    n_train=24,
    n_test=20,
    width=1 / 32,
    batch_size=8,
    epochs=2,
    seeds=(0,),
    targets=(0.01, 0.3, 0.99),
    rank_scale=1 / 40,
    timing_rounds=2,
)
MINE = ["SGD", "R-KFAC", "B-KFAC"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZER_PRESETS, "tiny", TINY)


def arguments(out: Path, *options: object) -> list[str]:
    fixed = ["--preset", "tiny", "--device", "cpu", "--optimizers", *MINE]
    return [*fixed, "--out", str(out), *map(str, options)]


def run(out: Path, *options: object) -> int:
    return optimizers.main(arguments(out, *options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIMIZER_PRESETS, "tiny", TINY)
        assert run(out) == 0
    return out


def measured(out: Path) -> pd.DataFrame:
    """What does not depend on the clock."""
    return pd.read_csv(out / "epochs.csv").drop(columns=["seconds", "cpu_seconds"])


# The study.


def test_a_study_leaves_every_table_and_figure(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names >= {"epochs.csv", "runs.csv", "timing.csv", "breakdown.csv", "config.json", "environment.json"}
    assert names >= {"table2.md", "table2.csv", "claims.md", "accuracy.pdf", "accuracy.png", "breakdown.png"}
    epochs = measured(whole)
    assert list(epochs.columns[:3]) == ["optimizer", "seed", "epoch"]
    assert len(epochs) == len(MINE) * TINY.epochs
    assert np.isfinite(epochs[["train_loss", "test_loss", "test_accuracy"]]).all(axis=None)
    runs = pd.read_csv(whole / "runs.csv")
    assert list(runs.optimizer) == MINE and runs.finished.all()
    assert list(runs["epochs_to_0.01"]) == [1, 1, 1] and runs["epochs_to_0.99"].isna().all()
    times = pd.read_csv(whole / "timing.csv")
    assert list(times.driver) == MINE * 2 and (times.table == 2).all() and (times.t_epoch > 0).all()
    assert "R-KFAC" in (whole / "table2.md").read_text()


def test_all_optimizers_start_alike_and_part(whole: Path) -> None:
    """The same weights, the same first batch: the epochs differ by the optimizer alone."""
    config = {name: TINY.training_config(name, 0, "cpu") for name in MINE}
    trainings = [Training(config[name], tiny_dataset()) for name in MINE]
    first = [float(training.step()) for training in trainings]
    assert first[0] == first[1] == first[2]
    assert measured(whole).groupby("epoch").train_loss.nunique().min() == 3


@pytest.mark.parametrize("steps", [2, 4])
def test_a_stopped_and_resumed_study_equals_an_uninterrupted_one(steps: int, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    assert run(out, "--step-limit", steps, "--no-timing") == 0
    assert not pd.read_csv(out / "runs.csv").finished.any()
    assert run(out, "--resume", "--no-timing") == 0
    pd.testing.assert_frame_equal(measured(out), measured(whole))


def test_times_may_be_taken_later_and_are_not_taken_twice(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "later"
    assert run(out, "--no-timing") == 0
    assert pd.read_csv(out / "timing.csv").empty
    assert "from the jobs' own clocks" in (out / "table2.md").read_text()
    taken: list[str] = []

    def counted(config: Any, dataset: Any, round: int) -> Timing:
        taken.append(config.driver)
        return Timing(2, config.driver, round, 10, 1.0, {"forward/backward": 0.8, "step": 0.2})

    monkeypatch.setattr(timing, "measure", counted)
    assert run(out, "--timing-only") == 0
    assert taken == MINE * 2
    assert run(out, "--resume") == 0
    assert taken == MINE * 2
    assert "from the jobs' own clocks" not in (out / "table2.md").read_text()
    pd.testing.assert_frame_equal(measured(out), measured(whole))


def test_another_configuration_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds a study already" in refused(capsys, optimizers.main, *arguments(whole))
    line = refused(capsys, optimizers.main, *arguments(whole, "--resume", "--continuation", "trace"))
    assert "continuation is min there and trace here" in line


def test_divergence_is_a_result_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = dataclasses.replace(DRIVERS["SGD"], learning_rate=lambda config, epoch: 1e30)
    monkeypatch.setitem(DRIVERS, "SGD", wild)
    assert run(tmp_path / "out", "--no-timing") == 0
    runs = pd.read_csv(tmp_path / "out" / "runs.csv").set_index("optimizer")
    assert runs.finished.all()
    assert "diverged" in runs.diverged["SGD"] and runs.epochs["B-KFAC"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--timing-only", "--no-timing"], "contradict"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--optimizers", "r-kfac"], "no driver is called 'r-kfac'"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, optimizers.main, *arguments(tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_the_whole_of_table_2_is_timed_with_table_1s_drivers_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, int]] = []

    def counted(config: TrainingConfig, dataset: Any, round: int) -> Timing:
        taken.append((config.driver, config.T_updt))
        return Timing(1 if config.T_updt else 2, config.driver, round, 10, 1.0, {"other": 1.0})

    monkeypatch.setattr(timing, "measure", counted)
    fixed = ["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path), "--timing-only"]
    assert optimizers.main(fixed) == 0
    of_table_2 = ["SENG", "K-FAC", "R-KFAC", "R-KFAC T_inv=1", "B-KFAC", "B-KFAC-C", "B-R-KFAC", "SGD", "AdamW"]
    assert [name for name, T_updt in taken[:15] if not T_updt] == of_table_2
    assert [name for name, T_updt in taken[:15] if T_updt == 10] == list(TABLE_1)
    assert len(taken) == 2 * 15
    assert set(pd.read_csv(tmp_path / "timing.csv").groupby("table").driver.nunique()) == {6, 9}


def test_figures_are_rendered_again_from_the_tables(whole: Path, tmp_path: Path) -> None:
    for name in ("epochs.csv", "timing.csv", "breakdown.csv", "config.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    assert figures.__main__.main([str(tmp_path)]) == 0
    assert (tmp_path / "table2.md").read_text() == (whole / "table2.md").read_text()


@pytest.mark.parametrize(("name", "content"), [("epochs.csv", "a,b\n"), ("config.json", "{}")])
def test_a_damaged_result_is_named(name: str, content: str, whole: Path, tmp_path: Path) -> None:
    for other in ("epochs.csv", "timing.csv", "breakdown.csv", "config.json"):
        (tmp_path / other).write_bytes((whole / other).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name):
        render(tmp_path)


def test_the_clock_stops_while_a_run_is_evaluated_and_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def passes(seconds: float, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            clock[0] += seconds
            return method(*args)

        return timed

    monkeypatch.setattr(optimizers.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Training, "step", passes(1.0, Training.step))
    monkeypatch.setattr(Training, "evaluate", passes(100.0, Training.evaluate))
    job = OptimizerRun(TINY, tiny_dataset(24), "SGD", 0, "cpu")
    for _ in range(4):
        job.advance()
    state = job.state_dict()
    clock[0] += 1000
    other = OptimizerRun(TINY, tiny_dataset(24), "SGD", 0, "cpu")
    other.load_state_dict(state)
    while not other.finished:
        other.advance()
    assert [epoch.seconds for epoch in other.epochs] == [3.0, 3.0]
