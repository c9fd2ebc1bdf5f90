"""The performance study: a miniature, stopped and resumed; its tables from epochs with known answers."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

import figures.__main__
from figures.optimizers import (
    NAMES,
    accuracy_figure,
    breakdown_table,
    epoch_times,
    epochs_to,
    render,
    table_1_times,
    table_2,
    targets_by_rule,
)
from kfacerr.exceptions import InputError
from studies import optimizers, timing
from studies.drivers import TABLE_1, TABLE_2, Driver
from studies.optimizer_claims import CLAIMS, Evidence, judge
from studies.optimizers import OptimizerRun
from studies.presets import OPTIMIZER_PRESETS, OptimizerPreset
from studies.timing import PARTS, Stopwatch, Timing, measure
from studies.training import DRIVERS, Training
from tests.studies.test_training import tiny_dataset

TARGETS = (0.5, 0.7, 0.9)
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
MINE = ["sgd", "r-kfac", "b-kfac"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZER_PRESETS, "tiny", TINY)


def run(out: Path, *options: object) -> int:
    """In this process: starting others takes seconds."""
    fixed = ["--preset", "tiny", "--device", "cpu", "--cluster", "current", "--optimizers", *MINE]
    with joblib.parallel_config("sequential"):
        return optimizers.main([*fixed, "--out", str(out), *map(str, options)])


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
    assert list(times.driver) == MINE * 2 and (times.t_epoch > 0).all()
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
        return Timing(config.driver, round, 10, 1.0, dict.fromkeys(PARTS, 0.2))

    monkeypatch.setattr(timing, "measure", counted)
    assert run(out, "--timing-only") == 0
    assert taken == MINE * 2
    assert run(out, "--resume") == 0
    assert taken == MINE * 2
    assert "from the jobs' own clocks" not in (out / "table2.md").read_text()
    pd.testing.assert_frame_equal(measured(out), measured(whole))


def test_another_configuration_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(whole) == 2
    assert "holds a study already" in capsys.readouterr().err
    assert run(whole, "--resume", "--continuation", "trace") == 2
    assert "continuation is min there and trace here" in capsys.readouterr().err


def test_divergence_is_a_result_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = DRIVERS["sgd"]
    wild = Driver(sgd.make_optimizer, lambda config, epoch: 1e30, sgd.settings)
    monkeypatch.setitem(DRIVERS, "sgd", wild)
    assert run(tmp_path / "out", "--no-timing") == 0
    runs = pd.read_csv(tmp_path / "out" / "runs.csv").set_index("optimizer")
    assert runs.finished.all()
    assert "diverged" in runs.diverged["sgd"] and runs.epochs["b-kfac"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--timing-only", "--no-timing"], "contradict"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


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
    job = OptimizerRun(TINY, tiny_dataset(24), "sgd", 0, "cpu")
    for _ in range(4):
        job.advance()
    state = job.state_dict()
    clock[0] += 1000
    other = OptimizerRun(TINY, tiny_dataset(24), "sgd", 0, "cpu")
    other.load_state_dict(state)
    while not other.finished:
        other.advance()
    assert [epoch.seconds for epoch in other.epochs] == [3.0, 3.0]


# Times.


@pytest.mark.parametrize(
    ("driver", "working"),
    [
        ("sgd", {"forward/backward", "other"}),
        ("b-r-kfac", set(PARTS)),
        ("seng", {"forward/backward", "decomposition", "application", "other"}),
    ],
)
def test_the_parts_of_a_step_add_up_to_it(driver: str, working: set[str]) -> None:
    timed = measure(TINY.training_config(driver, 0, "cpu"), tiny_dataset(24), 0)
    assert {part for part, seconds in timed.parts.items() if seconds > 0} == working
    assert sum(timed.parts.values()) == pytest.approx(timed.t_epoch, rel=0.02)
    assert timed.steps % DRIVERS[driver].cycle(3) == 0


def test_nested_parts_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    watch = Stopwatch(torch.device("cpu"))

    def spend(seconds: float) -> None:
        clock[0] += seconds

    inner = watch._timed(lambda: spend(3), "EA update")
    with watch.listening():
        spend(1)
        with torch.profiler.record_function("studies.forward_backward"):
            spend(10)
            inner()
            with torch.profiler.record_function("anything else"):
                spend(20)
        spend(5)
    expected = {"forward/backward": 30.0, "EA update": 3.0, "decomposition": 0.0, "application": 0.0, "other": 6.0}
    assert watch.seconds == expected


def test_what_was_timed_otherwise_is_refused(tmp_path: Path) -> None:
    config = TINY.training_config("sgd", 0, "cpu")
    timing.time_drivers({"sgd": config}, tiny_dataset(24), 1, tmp_path)
    other = dataclasses.replace(config, batch_size=4)
    with pytest.raises(InputError, match="another configuration"):
        timing.time_drivers({"sgd": other}, tiny_dataset(24), 1, tmp_path)


# Tables, from epochs with known answers.


def epochs_of(curves: dict[str, Sequence[Sequence[float]]], seconds: float = 10.0) -> pd.DataFrame:
    """One list of accuracies a seed."""
    return pd.DataFrame(
        [
            {"optimizer": name, "seed": seed, "epoch": i + 1, "seconds": seconds, "test_accuracy": accuracy}
            for name, seeds in curves.items()
            for seed, curve in enumerate(seeds)
            for i, accuracy in enumerate(curve)
        ]
    )


def times_of(times: dict[str, Sequence[float]]) -> pd.DataFrame:
    """One t_epoch a round."""
    rows = [(name, i, t) for name, rounds in times.items() for i, t in enumerate(rounds)]
    return pd.DataFrame(rows, columns=["driver", "round", "t_epoch"])


CURVES = {
    "r-kfac": [[0.4, 0.6, 0.8, 0.95], [0.4, 0.45, 0.6, 0.8]],
    "b-kfac": [[0.6, 0.8, 0.95, 0.9], [0.4, 0.6, 0.8, 0.85]],
}


def test_a_target_is_reached_at_the_first_epoch_above_it() -> None:
    epochs = epochs_of({"sgd": [[0.5, 0.6, 0.4, 0.7]]})
    assert [epochs_to(epochs, target) for target in (0.4, 0.5, 0.6)] == [1, 2, 4]
    assert np.isnan(epochs_to(epochs, 0.7))


def test_table_2_has_means_deviations_hits_and_ratios() -> None:
    table = table_2(epochs_of(CURVES), times_of({"r-kfac": [2.0, 4.0], "b-kfac": [1.5, 1.5]}), TARGETS)
    r, b = (table[table.optimizer == name].iloc[0] for name in ("R-KFAC", "B-KFAC"))
    assert (r["t_epoch"], r["t_epoch SD"]) == (3.0, pytest.approx(2**0.5))
    assert (r["t_acc>0.5"], r["t_acc>0.5 SD"]) == (2.5 * 3, pytest.approx(3 * 0.5**0.5))  # epochs 2 and 3
    assert (r["N_acc>0.7"], b["N_acc>0.7"]) == (3.5, 2.5)
    assert (r["hits 0.9"], r["t_acc>0.9"]) == (1, 12.0)  # over the run that reaches it
    assert (r["hits 0.5"], b["hits 0.5"]) == (2, 2)
    assert b["t_acc>0.5 /R-KFAC"] == pytest.approx((1.5 * 1.5) / 7.5)
    assert b["t_epoch paper/R-KFAC"] == pytest.approx(46.3 / 47.7)
    assert b["N_acc>0.7 paper/R-KFAC"] == pytest.approx(28.6 / 28.9)
    assert b["best accuracy"] == pytest.approx((0.95 + 0.85) / 2)
    assert set(table.clock) == {"alone"}


def test_without_times_taken_alone_the_jobs_own_clocks_stand_in() -> None:
    times = epoch_times(epochs_of(CURVES), times_of({"b-kfac": [1.5]}))
    assert times.loc["r-kfac", ["mean", "clock"]].tolist() == [10.0, "in jobs"]
    assert times.loc["b-kfac", ["mean", "clock"]].tolist() == [1.5, "alone"]


def test_a_target_that_no_run_reaches_has_no_time() -> None:
    table = table_2(epochs_of({"sgd": [[0.1]]}), times_of({"sgd": [1.0]}), TARGETS)
    assert table["t_acc>0.5"].isna().all() and table["hits 0.5"].tolist() == [0]


def test_table_1s_times_stand_beside_the_papers() -> None:
    times = table_1_times(times_of({"K-FAC T_inv=50": [6.0, 8.0], "R-KFAC T_inv=50": [2.0, 2.0], "sgd": [1.0]}))
    exact = times.set_index("algorithm").loc["K-FAC T_inv=50"]
    assert exact["/R-KFAC T_inv=50"] == 3.5
    assert exact["paper /R-KFAC T_inv=50"] == pytest.approx(169 / 58.5)
    assert len(times) == 2


def test_the_breakdown_is_a_mean_over_rounds() -> None:
    rows = [("sgd", 0, "other", 1.0), ("sgd", 1, "other", 3.0), ("sgd", 0, "application", 5.0)]
    table = breakdown_table(pd.DataFrame(rows, columns=["driver", "round", "part", "seconds"]))
    assert table.to_dict("records") == [{"driver": "SGD", "application": 5.0, "other": 2.0, "total": 7.0}]


def test_the_accuracy_figure_has_a_curve_for_each_optimizer_in_both_panels() -> None:
    epochs = epochs_of(CURVES)
    figure = accuracy_figure(epochs, epoch_times(epochs, times_of({})), TARGETS)
    for ax, scale in zip(figure.axes, (1, 10), strict=True):
        curve = ax.lines[1]  # b-kfac follows r-kfac, then the targets
        assert list(np.asarray(curve.get_xdata())) == [scale * n for n in (1, 2, 3, 4)]
        assert np.asarray(curve.get_ydata())[0] == pytest.approx(50)


def test_targets_by_rule_follow_their_rule() -> None:
    pilot = epochs_of({"sgd": [[0.2, 0.61]], "r-kfac": [[0.3, 0.704]], "b-kfac": [[0.9, 0.5]]})
    assert targets_by_rule(pilot) == (0.6, 0.65, 0.7)


# Claims.


def evidence(**changes: Any) -> Evidence:
    """The paper's own numbers."""
    table_1 = dict(zip(TABLE_1, (169.0, 58.5, 71.2, 59.2, 59.5, 59.4), strict=True))
    table_2 = {"seng": 25.4, "k-fac": 97.8, "r-kfac": 47.7, "r-kfac-short": 53.3}
    table_2 |= {"b-kfac": 46.3, "b-kfac-c": 47.4, "b-r-kfac": 48.4}
    middle = {"seng": 43.1, "k-fac": 41.1, "r-kfac": 28.9, "r-kfac-short": 28.5}
    middle |= {"b-kfac": 28.6, "b-kfac-c": 28.5, "b-r-kfac": 28.3}
    times = table_1 | table_2 | changes
    return Evidence(times, {name: [n - 9, n, n + 12] for name, n in middle.items()})


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_papers_own_numbers_bear_its_claims_out(claim: str) -> None:
    assert CLAIMS[claim].test(evidence()).holds


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("C8", {"B-KFAC": 72.0}),
        ("C8", {"K-FAC T_inv=50": 140.0}),
        ("C8", {"B-R-KFAC": 62.0}),
        ("C9", {"b-kfac-c": 46.0}),
        ("C11", {"b-kfac": 49.0}),
        ("C12", {"seng": 46.5}),
    ],
)
def test_other_numbers_do_not(claim: str, changes: dict[str, float]) -> None:
    assert not CLAIMS[claim].test(evidence(**changes)).holds


def test_no_more_epochs_is_for_every_target() -> None:
    fine = evidence()
    fine.epochs["b-kfac"] = fine.epochs["r-kfac"]
    assert CLAIMS["C10"].test(fine).holds
    fine.epochs["b-kfac-c"] = [*fine.epochs["r-kfac"][:2], 99.0]
    assert not CLAIMS["C10"].test(fine).holds


def test_claims_count_seeds_and_misses() -> None:
    """B-KFAC is behind in one of two seeds; a miss counts as one epoch more than the run has."""
    same = [[0.6, 0.8, 0.95], [0.6, 0.8, 0.95]]
    curves = dict.fromkeys(("r-kfac", "b-kfac-c", "b-r-kfac"), same) | {"b-kfac": [same[0], [0.6, 0.8, 0.85]]}
    preset = dataclasses.replace(TINY, epochs=3, targets=TARGETS)
    text = judge(epochs_of(curves), times_of({name: [1.0, 1.0] for name in curves}), preset, "tiny")
    c10 = text.split("## C10")[1].split("## C11")[0]
    assert "**does not hold** (in 1 of 2 seeds)" in c10
    assert "B-KFAC 1.0 / 2.0 / 3.5" in c10
    assert "not measured" in text.split("## C8")[1].split("## C9")[0]


# Presets.


def test_the_papers_preset_is_section_6() -> None:
    paper = OPTIMIZER_PRESETS["paper"]
    assert (paper.width, paper.batch_size, paper.epochs, len(paper.seeds)) == (1.0, 256, 50, 10)
    assert (paper.n_train, paper.n_test, paper.rank_scale) == (None, None, 1.0)
    assert paper.targets == (0.91, 0.93, 0.935)


@pytest.mark.parametrize("preset", OPTIMIZER_PRESETS.values(), ids=OPTIMIZER_PRESETS)
def test_targets_ascend_and_configurations_can_be_written(preset: OptimizerPreset) -> None:
    assert list(preset.targets) == sorted(set(preset.targets))
    assert json.loads(json.dumps(dataclasses.asdict(preset)))["name"] == preset.name
    for driver in (*TABLE_2, *TABLE_1):
        preset.training_config(driver, 0, "cpu")


def test_names_are_those_of_the_drivers() -> None:
    assert NAMES == TABLE_2
