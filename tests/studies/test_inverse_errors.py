"""The error study end to end on a miniature: what it leaves, stopping and resuming, and its bad inputs."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kfacerr import cli
from kfacerr.algorithms import SEVEN, Algorithm
from kfacerr.metrics import METRICS
from kfacerr.recording import Recording
from studies import inverse_errors, jobs, seed_run
from studies.drivers import DRIVERS
from studies.jobs import Stop
from studies.presets import PRESETS, Preset, continued
from studies.seed_run import SeedRun
from tests.studies.helpers import refused

TINY = Preset(
    name="tiny",
    dataset="digits",
    n_train=80,  # 10 iterations an epoch
    width=1 / 64,
    batch_size=8,
    window_epochs=(1, 4),
    seeds=(0, 1),
    driver="SGD",
    T_updt=5,
    window_length=20,
    rank_scale=1 / 16,
)
RANK = 14
WINDOWS = {1: range(10, 30), 4: range(40, 60)}
RESULTS = {
    *("errors.csv", "variants.csv", "spectra.csv", "training.csv", "config.json", "environment.json"),
    *("figure1.pdf", "figure1.png", "figure2.pdf", "figure2.png", "spectra.pdf", "spectra.png"),
    *("variants.pdf", "variants.png", "overhead.csv"),
    *("table1.md", "table1.csv", "claims.md"),
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr("figures.render.render", lambda _: None)  # takes seconds; `whole` shows it


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What an uninterrupted run leaves, recordings and figures included."""
    out = tmp_path_factory.mktemp("study") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        assert _study(out, "--record") == 0
    return out


def _study(out, *options) -> int:
    return inverse_errors.main(["--preset", "tiny", "--out", str(out), "--device", "cpu", *map(str, options)])


def _fails(capsys, out, *options) -> str:
    fixed = ["--preset", "tiny", "--out", out, "--device", "cpu"]
    return refused(capsys, inverse_errors.main, *fixed, *options)


# ---------------------------------------------------------------------------------------- what it leaves


def test_the_results_of_the_contract_are_there(whole):
    there = {path.name for path in whole.iterdir()} - {f".recording-seed-{seed}.h5.lock" for seed in TINY.seeds}
    assert there == RESULTS | {"state", "recording-seed-0.h5", "recording-seed-1.h5"}
    assert all((whole / name).stat().st_size > 0 for name in RESULTS)
    errors = pd.read_csv(whole / "errors.csv")
    assert list(errors.columns[:4]) == ["algorithm", "k", "metric", "value"]
    config = json.loads((whole / "config.json").read_text())
    assert (config["name"], config["data"], config["seeds"]) == ("tiny", "digits", [0, 1])
    assert json.loads((whole / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    claims = (whole / "claims.md").read_text()
    assert claims.startswith("# The paper's claims on digits, 2 seeds\n\nFC layer 256-32, n = 8, r = 14.\n")
    assert config["setting"] == "FC layer 256-32, n = 8, r = 14"
    window = {"epoch": 4, "start": 40, "rank": RANK, "columns": 8, "phi": [0.1, 0.1]}
    assert config["windows"] == [window | {"epoch": 1, "start": 10}, window]
    assert all(f"## C{i}." in claims for i in range(1, 8))
    assert all(name in (whole / "table1.md").read_text() for name in SEVEN)


def test_every_algorithm_metric_iteration_and_seed_has_a_row(whole):
    errors = pd.read_csv(whole / "errors.csv")
    got = set(errors[["algorithm", "k", "metric", "epoch", "seed"]].itertuples(index=False, name=None))
    expected = {
        (algorithm, k, metric, epoch, seed)
        for algorithm in SEVEN
        for epoch, ks in WINDOWS.items()
        for k in ks
        for metric in METRICS
        for seed in TINY.seeds
    }
    assert len(errors) == len(expected)
    assert got == expected
    assert np.isfinite(errors.value).all() and (errors.value >= 0).all()
    variants = pd.read_csv(whole / "variants.csv")
    equal_rank = f" rank={RANK + TINY.batch_size}"
    at_equal_rank = {name + equal_rank for name in SEVEN if name.startswith("R-KFAC")}
    bases = [Algorithm.parse(name) for name in (*SEVEN, *at_equal_rank, "FD")]
    named = {str(algorithm) for algorithm in continued(bases, ("min", "trace", "none"))}
    assert set(variants.algorithm) == named - set(SEVEN)
    assert not variants.duplicated(["algorithm", "k", "metric", "seed"]).any()


def test_spectra_of_both_factors_at_every_windows_start_are_kept(whole):
    spectra = pd.read_csv(whole / "spectra.csv")
    sizes = spectra.groupby(["seed", "epoch", "factor"]).size().unstack()
    assert set(sizes.index) == {(seed, epoch) for seed in TINY.seeds for epoch in WINDOWS}
    assert (sizes["A"] == 8 * 32 + 1).all() and (sizes["G"] == 32).all()
    for _, part in spectra.groupby(["seed", "epoch", "factor"]):
        assert (np.diff(part.eigenvalue) <= 0).all() and part.eigenvalue.iloc[0] > 0


def test_replay_of_the_studys_recording_gives_the_studys_errors(whole, tmp_path):
    errors = pd.read_csv(whole / "errors.csv")
    live = errors[errors.seed == 0].set_index(["algorithm", "k", "metric"]).value
    for backend, names in (("numpy", ("K-FAC T_inv=50", "B-KFAC")), ("torch", SEVEN)):
        out = tmp_path / f"{backend}.csv"
        command = ["replay", str(whole / "recording-seed-0.h5"), "--layer", "fc0", "--rank", str(RANK)]
        assert cli.main([*command, "--backend", backend, "--out", str(out), "--algorithms", *names]) == 0
        again = pd.read_csv(out).set_index(["algorithm", "k", "metric"]).value
        assert len(again) == len(names) * 40 * 4
        # errors.csv has 8 digits
        np.testing.assert_allclose(again, live.loc[again.index], rtol=1e-7, atol=1e-12)


# ------------------------------------------------------------------------------------ stopping and resuming


def test_a_study_stopped_and_resumed_gives_the_same_tables(whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert _study(out, "--record", "--step-limit", 8) == 0  # before the first window
    assert "stopped at the step limit; continue with --resume" in capsys.readouterr().err
    assert pd.read_csv(out / "errors.csv").empty
    assert _study(out, "--record", "--resume", "--step-limit", 15) == 0  # within it
    part = pd.read_csv(out / "errors.csv")
    assert set(part.seed) == {0, 1}  # the limit is each seed's
    assert sorted(set(part.k)) == list(range(10, 23))
    assert _study(out, "--record", "--resume", "--step-limit", 12) == 0  # between the windows
    assert _study(out, "--record", "--resume", "--step-limit", 13) == 0  # within the second
    assert _study(out, "--record", "--resume") == 0
    for name in ("errors.csv", "variants.csv", "spectra.csv", "training.csv", "claims.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    with Recording(out / "recording-seed-1.h5") as a, Recording(whole / "recording-seed-1.h5") as b:
        for one, two in zip(a.layer("fc0").steps(), b.layer("fc0").steps(), strict=True):
            assert one.k == two.k
            np.testing.assert_array_equal(one.A, two.A)
            np.testing.assert_array_equal(one.G, two.G)


def test_resuming_a_finished_study_changes_nothing(whole, capsys):
    before = {name: (whole / name).read_bytes() for name in RESULTS - {"environment.json"}}
    assert _study(whole, "--record", "--resume") == 0
    assert "results are in" in capsys.readouterr().err
    assert {name: (whole / name).read_bytes() for name in before} == before


def test_a_time_limit_stops_every_seed_and_leaves_a_resumable_state(whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    advance, stops = SeedRun.advance, []
    monkeypatch.setattr(jobs, "Stop", lambda *a: stops.append(Stop(*a)) or stops[-1])

    def timed(self):
        advance(self)
        if self.training.k == 12:
            stops[-1].deadline = 0.0  # passed

    with monkeypatch.context() as patch:
        patch.setattr(SeedRun, "advance", timed)
        assert _study(out, "--time-limit", 3600) == 0
    assert "stopped at the time limit" in capsys.readouterr().err
    assert sorted(set(pd.read_csv(out / "errors.csv").k)) == [10, 11]
    assert _study(out, "--resume") == 0
    assert (out / "errors.csv").read_bytes() == (whole / "errors.csv").read_bytes()


def test_time_limit_zero_stops_before_the_first_iteration(tmp_path, capsys):
    assert _study(tmp_path / "out", "--time-limit", 0) == 0
    assert "stopped at the time limit" in capsys.readouterr().err


def test_a_signal_leaves_a_resumable_state_and_exit_status_130(whole, tmp_path):
    out = tmp_path / "out"
    program = f"""
import os, signal, sys
from figures import render
from studies import inverse_errors
from studies.presets import PRESETS, Preset
from studies.seed_run import SeedRun
PRESETS["tiny"] = {TINY!r}
render.render = lambda _: None
advance = SeedRun.advance

def signalled(self):
    if self.training.k == 15:
        os.kill(os.getpid(), signal.SIGINT)
    advance(self)

SeedRun.advance = signalled
sys.exit(inverse_errors.main(["--preset", "tiny", "--out", {str(out)!r}, "--device", "cpu"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "inverse_errors: stopped by a signal; continue with --resume\n"
    part = pd.read_csv(out / "errors.csv")
    assert set(part.seed) == {0}  # the second seed has not begun
    assert sorted(set(part.k)) == list(range(10, 16))
    assert _study(out, "--resume") == 0
    assert (out / "errors.csv").read_bytes() == (whole / "errors.csv").read_bytes()


def test_an_impatient_user_gets_status_130_and_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "load_dataset", interrupted)
    assert _study(tmp_path / "out") == 130
    assert capsys.readouterr().err == "inverse_errors: interrupted\n"


def test_seeds_side_by_side_give_the_same_tables(whole, tmp_path):
    out = tmp_path / "out"
    assert _study(out, "--jobs", 2) == 0
    for name in ("errors.csv", "variants.csv", "spectra.csv", "training.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_seeds_can_be_chosen(whole, tmp_path):
    out = tmp_path / "out"
    assert _study(out, "--seed", 1) == 0
    errors, of_both = pd.read_csv(out / "errors.csv"), pd.read_csv(whole / "errors.csv")
    pd.testing.assert_frame_equal(errors, of_both[of_both.seed == 1].reset_index(drop=True))


# ---------------------------------------------------------------------------------------------- bad input


def test_an_existing_study_is_not_overwritten_unasked(whole, capsys):
    before = (whole / "errors.csv").read_bytes()
    assert f"{whole} holds a study already: continue it with --resume" in _fails(capsys, whole)
    assert (whole / "errors.csv").read_bytes() == before


def test_resume_with_another_configuration_is_refused(whole, capsys, monkeypatch):
    assert "config.json: seeds is [0, 1] there and [7] here" in _fails(capsys, whole, "--resume", "--seed", 7)
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["digits"])
    assert "config.json: name is tiny there and digits here" in _fails(capsys, whole, "--resume")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--time-limit", "-1"), "--time-limit must be at least 0, got -1.0"),
        (("--time-limit", "nan"), "--time-limit must be at least 0, got nan"),
        (("--step-limit", "-1"), "--step-limit must be at least 0, got -1"),
        (("--driver", "adam"), "no driver is called 'adam': it is none of "),
        (("--device", "tpu9"), "'tpu9' is not the name of a device"),
        (("--preset", "huge"), "argument --preset: invalid choice: 'huge'"),
        (("--step-limit", "ten"), "argument --step-limit: invalid int value: 'ten'"),
        (("--trajectory", "none"), "argument --trajectory: invalid choice: 'none'"),
    ],
)
def test_a_bad_option_is_named_and_nothing_written(tmp_path, capsys, options, message):
    assert message in _fails(capsys, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = _fails(capsys, tmp_path / "out", "--device", "cuda")
    assert line == "inverse_errors: device 'cuda' is asked for, but there are 0 GPUs\n"
    assert not (tmp_path / "out").exists()


def test_missing_images_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["cifar10-small"])
    (tmp_path / "data").mkdir()
    assert str(tmp_path / "data") in _fails(capsys, tmp_path / "out", "--data", tmp_path / "data")


def test_an_output_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "out").write_text("hello")
    assert f"{tmp_path / 'out'}" in _fails(capsys, tmp_path / "out")


def test_a_corrupt_checkpoint_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    assert _study(out, "--seed", 0, "--step-limit", 3) == 0
    checkpoint = out / "state" / "seed-0.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert f"{checkpoint}: not a readable checkpoint" in _fails(capsys, out, "--seed", 0, "--resume")
    checkpoint.write_text("hello")
    assert f"{checkpoint}: not a readable checkpoint" in _fails(capsys, out, "--seed", 0, "--resume")


def test_a_corrupt_configuration_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'}: not readable" in _fails(capsys, tmp_path, "--resume")


def test_training_that_diverges_leaves_what_was_computed(tmp_path, capsys, monkeypatch):
    blows_up = dataclasses.replace(
        DRIVERS["SGD"], learning_rate=lambda config, epoch: 1e30 if epoch >= 2 else 0.02
    )
    monkeypatch.setitem(DRIVERS, "SGD", blows_up)
    out = tmp_path / "out"
    line = _fails(capsys, out, "--seed", 0)
    assert line.startswith("inverse_errors: seed 0: iteration 21: ")
    assert "NaN or Inf" in line
    assert sorted(set(pd.read_csv(out / "errors.csv").k)) == list(range(10, 21))


def test_training_that_diverges_before_the_window_is_reported(tmp_path, capsys, monkeypatch):
    blows_up = dataclasses.replace(DRIVERS["SGD"], learning_rate=lambda config, epoch: 1e30)
    monkeypatch.setitem(DRIVERS, "SGD", blows_up)
    line = _fails(capsys, tmp_path / "out", "--seed", 0)
    assert line.startswith("inverse_errors: seed 0: ")
    assert "iteration" in line


# ------------------------------------------------------------------------------------------ own trajectories


@pytest.fixture
def _every_ten(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(TINY, T_updt=10))  # as the algorithms of §4.2


@pytest.mark.usefixtures("_every_ten")
def test_on_its_own_trajectory_each_algorithm_is_measured_against_its_own_factor(tmp_path):
    """The study measures the optimizer's own processes: what they hold equals a replay of that run's columns."""
    out = tmp_path / "own"
    assert _study(out, "--trajectory", "own", "--seed", "0", "--record") == 0
    errors = pd.read_csv(out / "errors.csv")
    assert set(errors.algorithm) == set(SEVEN)
    assert len(errors) == len(SEVEN) * len(METRICS) * 2 * TINY.window_length
    assert np.isfinite(errors.value).all()
    curves = errors.set_index(["algorithm", "k", "metric"]).value

    # Periods are counted from each window's start, also inside the optimizer: K-FAC's first step is exact.
    for ks in WINDOWS.values():
        assert curves["K-FAC T_inv=50", ks[0], "inverse_A"] < 1e-5
        assert curves["K-FAC T_inv=50", ks[-1], "inverse_A"] > 1e-3

    for name, slug in (("B-KFAC", "b-kfac"), ("K-FAC T_inv=50", "k-fac-t_inv50")):
        recording = out / f"recording-seed-0-{slug}.h5"
        replayed = tmp_path / f"{slug}.csv"
        arguments = [str(recording), "--layer", "fc0", "--rank", str(RANK), "--out", str(replayed)]
        assert cli.main(["replay", *arguments, "--algorithms", name, "--dtype", "float64"]) == 0
        again = pd.read_csv(replayed).set_index(["algorithm", "k", "metric"]).value
        # The optimizer holds its factors in float32.
        pd.testing.assert_series_equal(curves[again.index].sort_index(), again.sort_index(), rtol=5e-3, atol=1e-5)


@pytest.mark.usefixtures("_every_ten")
def test_own_trajectories_resume_to_the_same_tables(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _study(whole, "--trajectory", "own", "--seed", "1") == 0
    assert _study(parts, "--trajectory", "own", "--seed", "1", "--step-limit", "45") == 0
    assert "--resume" in capsys.readouterr().err
    assert _study(parts, "--trajectory", "own", "--seed", "1", "--resume") == 0
    assert (parts / "errors.csv").read_bytes() == (whole / "errors.csv").read_bytes()


def test_a_driver_for_own_trajectories_is_refused(tmp_path, capsys):
    assert "--driver" in _fails(capsys, tmp_path / "own", "--trajectory", "own", "--driver", "sgd")


# ------------------------------------------------------------------------------------------- whole-run monitoring


@pytest.fixture(scope="module")
def monitored(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("monitor") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        assert _study(out, "--monitor", "--seed", "0") == 0
    return out


def test_monitoring_measures_every_update_of_the_training(monitored):
    rows = pd.read_csv(monitored / "monitor.csv")
    errors = rows[rows.metric.isin(METRICS)]
    assert set(errors.k) == set(range(0, 60, TINY.T_updt))
    names = continued([Algorithm.parse(name) for name in (*SEVEN, "FD")], ("min", "trace"))
    assert set(errors.algorithm) == set(map(str, names))
    assert (errors.groupby(["algorithm", "k"]).size() == len(METRICS)).all()
    assert np.isfinite(errors.value).all()
    assert {"monitor.png", "monitor.pdf", "spectrum.csv", "overhead.csv"} <= {p.name for p in monitored.iterdir()}
    assert (pd.read_csv(monitored / "overhead.csv")[["training", "measurement"]] > 0).all(axis=None)


def test_certified_bounds_are_never_below_the_monitored_errors(monitored):
    rows = pd.read_csv(monitored / "monitor.csv")
    table = rows.pivot_table(index=["algorithm", "k"], columns="metric", values="value")
    for side in "AG":
        pairs = table[[f"inverse_{side}", f"certified_{side}"]].dropna()
        assert {"B-KFAC", "B-R-KFAC", "FD"} <= set(pairs.index.get_level_values("algorithm"))
        slack = pairs[f"certified_{side}"] - pairs[f"inverse_{side}"]
        assert (slack >= -1e-7 * pairs[f"inverse_{side}"]).all()  # eight digits in the table


def test_monitoring_resumes_to_the_same_tables(monitored, tmp_path):
    out = tmp_path / "parts"
    assert _study(out, "--monitor", "--seed", "0", "--step-limit", "33") == 0
    assert _study(out, "--monitor", "--seed", "0", "--resume") == 0
    assert (out / "monitor.csv").read_bytes() == (monitored / "monitor.csv").read_bytes()


def test_monitoring_refuses_what_it_cannot_be_combined_with(tmp_path, capsys):
    assert "--monitor" in _fails(capsys, tmp_path / "no", "--monitor", "--trajectory", "own")


# ------------------------------------------------------------------------------------------ preset paper-layer

SHRUNK = dataclasses.replace(
    PRESETS["paper-layer"],
    dataset="digits",
    n_train=80,  # 10 iterations an epoch
    width=1 / 64,
    conv_width=1 / 128,
    batch_size=8,
    window_epochs=(1, 4),
    driver="SGD",
    T_updt=5,
    window_length=20,
    rank_scale=1 / 16,
)


def test_a_killed_run_of_the_papers_layer_goes_on_to_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "shrunk", SHRUNK)
    options = ["--preset", "shrunk", "--device", "cpu", "--record", "--out"]
    assert inverse_errors.main([*options, str(tmp_path / "whole")]) == 0
    program = f"""
import os, signal, sys
from studies import inverse_errors, jobs
from studies.presets import PRESETS, Preset
PRESETS["shrunk"] = {SHRUNK!r}
jobs.CHECKPOINT_SECONDS = -1  # after every iteration
save = jobs.save_checkpoint

def killed(path, state):
    if state["training"]["k"] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, state)

jobs.save_checkpoint = killed
sys.exit(inverse_errors.main([*{options!r}, {str(tmp_path / "killed")!r}, *sys.argv[2:]]))
"""
    for k, resume in ((13, ()), (18, ("--resume",)), (45, ("--resume",))):
        command = [sys.executable, "-c", program, str(k), *resume]
        assert subprocess.run(command, capture_output=True, check=False, timeout=120).returncode == -signal.SIGKILL
    assert inverse_errors.main([*options, str(tmp_path / "killed"), "--resume"]) == 0
    for name in ("errors.csv", "variants.csv", "spectra.csv", "training.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    rank = f" rank={RANK + SHRUNK.batch_size}"
    names = *SEVEN, *(name + rank for name in SHRUNK.equal_rank), *SHRUNK.beyond
    bases = list(map(Algorithm.parse, names))
    measured = pd.read_csv(tmp_path / "whole" / "variants.csv")
    assert set(measured.algorithm) == {str(a) for a in continued(bases, ("min", "trace"))} - set(SEVEN)


def test_a_log_says_what_a_costly_window_will_take(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "PROGRESS_SECONDS", -1)
    monkeypatch.setattr(seed_run, "MUCH", 0)
    assert _study(tmp_path, "--seed", 0, "--step-limit", 3) == 0
    first, *lines, _ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"seed 0: factors of order 257 and 32; products run at \d+ GFLOP/s here and a Cholesky inverse at \d+, so "
        r"that a measured update takes about \d+ s and a window \d+ min",
        first,
    )
    assert [re.fullmatch(r"seed 0: iteration (\d) of 60, 00:\d\d so far, 0.:\d\d left", x)[1] for x in lines] == [
        *"123"
    ]


def test_a_finished_study_says_what_was_found_in_five_lines(whole, capsys):
    assert _study(whole, "--record", "--resume") == 0
    table, _, found = capsys.readouterr().out.partition("\nClaims")
    lines = ("Claims" + found).splitlines()
    assert len(lines) == 5
    for line, variant in zip(lines, ("paper's settings", "equal rank", "`trace` continuation"), strict=False):
        assert line == f"Claims, {variant}, not measured."  # windows of 20 iterations are too short to judge
    assert str(whole) in lines[4]
    assert max(map(len, table.splitlines())) <= 100
