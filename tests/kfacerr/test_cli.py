"""`kfacerr replay` and `kfacerr info` at the command line: the CSV contract, and one line for every bad input."""

import functools
import re
import signal
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest

import kfacerr
from kfacerr.algorithms import SEVEN
from kfacerr.cli import main
from kfacerr.metrics import METRICS
from kfacerr.recorder import RecordingWriter
from kfacerr.stream import Step, Window
from kfacerr.study import ErrorStudy, averages
from tests.reference import damped_inverse, evd, relative_error

D_A, D_G, N, RANK, RHO, PHI = 24, 14, 4, 5, 0.95, 0.1
WINDOWS = [Window(20, 60, 2), Window(100, 15, 7)]
DETERMINISTIC = ("K-FAC T_inv=50", "B-KFAC")
LAYER = {"d_A": D_A, "d_G": D_G, "n": N, "bias": False, "batch_size": N, "update_every": 10}


def _steps() -> list[Step]:
    """Columns with decaying spectra, whose directions drift; updates every 10 iterations, all inside windows."""
    rng = np.random.default_rng(3)
    bases = [np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (D_A, D_G)]
    steps = []
    for k in range(115):
        update = k % 10 == 0
        if not update and not any(k in w for w in WINDOWS):
            continue
        columns = []
        for i, d in enumerate((D_A, D_G)):
            bases[i] = np.linalg.qr(bases[i] + 0.01 * rng.standard_normal((d, d)))[0]
            columns.append((bases[i] * 0.7 ** np.arange(d)) @ rng.standard_normal((d, N)))
        steps.append(Step(k, *(X.astype(np.float32) for X in columns), update))
    return steps


STEPS = _steps()


def _ours(path, steps=STEPS, windows=WINDOWS):
    with RecordingWriter(path) as writer:
        writer.add_layer("fc", **LAYER, windows=windows)
        for step in steps:
            writer.append("fc", step)
    return path


def _theirs(path, steps=STEPS, **changes):
    """By h5py alone, as someone else's program would write the layout of the contract."""
    with h5py.File(path, "w") as file:
        file.attrs["format"] = changes.get("format", "kfacerr-recording")
        file.attrs["version"] = 1
        group = file.create_group("layers/fc")
        group.attrs["bias"] = False
        group.attrs["batch_size"] = N
        group.attrs["update_every"] = 10
        group["k"] = np.array([s.k for s in steps])
        group["update"] = np.array([s.update for s in steps], np.uint8)
        for name in "AG":
            columns = np.stack([getattr(s, name) for s in steps])
            group.create_dataset(name, data=columns, chunks=(1, *columns.shape[1:]))
        group["windows"] = changes.get("windows", np.array(WINDOWS))
        if "phi" in changes:
            group["phi"] = np.full(len(steps), changes["phi"])
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return _ours(tmp_path_factory.mktemp("recording") / "ours.h5")


def _replay(recording, out, *options, rank=RANK):
    """Runs the command in this process and returns the table."""
    status = main(["replay", str(recording), "--layer", "fc", "--rank", str(rank), "--out", str(out), *options])
    assert status == 0
    return pd.read_csv(out)


def _values(frame, algorithms=None) -> pd.Series:
    values = frame.set_index(["algorithm", "k", "metric"]).value
    return values if algorithms is None else values.loc[list(algorithms)]


def _assert_close(one: pd.Series, other: pd.Series, rtol=1e-8) -> None:
    assert set(one.index) == set(other.index)
    np.testing.assert_allclose(one, other.loc[one.index], rtol=rtol, atol=1e-12)


# ------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("write", [_ours, _theirs])
def test_every_algorithm_metric_and_iteration_inside_the_windows_has_a_row(tmp_path, write, capsys):
    frame = _replay(write(tmp_path / "r.h5"), tmp_path / "errors.csv")
    assert list(frame.columns[:4]) == ["algorithm", "k", "metric", "value"]
    inside = [k for w in WINDOWS for k in range(w.start, w.start + w.length)]
    expected = {(a, k, m) for a in SEVEN for k in inside for m in METRICS}
    assert len(frame) == len(expected)
    assert set(_values(frame).index) == expected
    assert np.isfinite(frame.value).all() and (frame.value >= 0).all()
    assert sorted(set(zip(frame.epoch, frame.k, strict=True))) == [
        (w.epoch, k) for w in WINDOWS for k in range(w.start, w.start + w.length)
    ]
    printed = capsys.readouterr().out
    assert all(name in printed for name in SEVEN)


def test_below_the_table_stands_what_is_not_used_where_there_is_no_room(tmp_path, recording, capsys):
    _replay(recording, tmp_path / "e.csv", "--algorithms", "B-KFAC", "K-FAC")
    assert "not used there" not in capsys.readouterr().out
    _replay(recording, tmp_path / "e.csv", "--algorithms", "B-KFAC", "K-FAC", rank=D_G - N)
    printed = capsys.readouterr().out
    assert printed.endswith(
        "\nB-KFAC: r + n >= d (10 + 4 >= 14) for G, where it saves nothing: not used there, R-KFAC is\n"
    )


def test_a_foreign_recording_gives_the_same_file_as_ours(tmp_path, recording):
    _replay(recording, tmp_path / "a.csv")
    _replay(_theirs(tmp_path / "r.h5"), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_same_command_and_seed_give_the_same_files_in_any_process(tmp_path, recording):
    for name in ("a", "b"):
        _replay(recording, tmp_path / f"{name}.csv", "--seed", "5", "--plot", str(tmp_path / f"{name}.pdf"))
    done = _run("replay", recording, "--layer", "fc", "--rank", RANK, "--seed", 5, "--out", tmp_path / "c.csv")
    assert done.returncode == 0, done.stderr
    a, b, c = ((tmp_path / f"{name}.csv").read_bytes() for name in "abc")
    assert a == b == c
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()


def test_the_seed_changes_the_randomised_algorithms_only(tmp_path, recording):
    one, two = (_replay(recording, tmp_path / f"{s}.csv", "--seed", s) for s in ("0", "1"))
    differ = one.algorithm[one.value != two.value]
    assert set(differ) >= {"B-KFAC-C"}
    assert not set(differ) & set(DETERMINISTIC)


@pytest.mark.parametrize(("suffix", "magic"), [("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot_is_written_in_the_format_of_its_name(tmp_path, recording, suffix, magic):
    plot = tmp_path / f"errors.{suffix}"
    _replay(recording, tmp_path / "errors.csv", "--plot", str(plot), "--algorithms", "B-KFAC")
    assert plot.read_bytes().startswith(magic)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["errors.csv", plot.name]  # no temporary file is left


def test_torch_gives_what_numpy_gives(tmp_path, recording):
    pytest.importorskip("torch")
    options = ("--algorithms", *DETERMINISTIC)
    one = _replay(recording, tmp_path / "n.csv", *options)
    two = _replay(recording, tmp_path / "t.csv", *options, "--backend", "torch")
    _assert_close(_values(one), _values(two))


def test_float32_is_near_float64(tmp_path, recording):
    one = _replay(recording, tmp_path / "64.csv", "--algorithms", "B-KFAC")
    two = _replay(recording, tmp_path / "32.csv", "--algorithms", "B-KFAC", "--dtype", "float32")
    np.testing.assert_allclose(one.value, two.value, rtol=1e-3, atol=1e-6)
    assert not one.value.equals(two.value)


# ------------------------------------------------------------------------- an independent dense evaluation


def _dense_errors(continuation: str, damping: str, phi: float) -> pd.Series:
    """K-FAC T_inv=50 and B-KFAC by (8), (10) and §4.2 as printed, in dense float64; for `none` and `min`."""
    held: dict[str, dict[str, tuple]] = {name: {} for name in DETERMINISTIC}
    M: dict[str, np.ndarray] = {}
    values = {}
    for step in STEPS:
        window = next((w for w in WINDOWS if step.k in w), None)
        for side in "AG":
            X = getattr(step, side).astype(np.float64)
            if step.update:
                first = side not in M
                M[side] = X @ X.T if first else RHO * M[side] + (1 - RHO) * X @ X.T
                if first:
                    held["B-KFAC"][side] = evd(M[side], N)
                else:
                    U, D = (array[..., :RANK] for array in held["B-KFAC"][side])
                    B = RHO * (U * D) @ U.T + (1 - RHO) * X @ X.T
                    held["B-KFAC"][side] = evd(B, len(D) + N)
                if window is not None and (step.k - window.start) % 50 == 0:
                    held["K-FAC T_inv=50"][side] = evd(M[side])
        if window is None:
            continue
        lam = {side: phi * np.linalg.eigvalsh(M[side])[-1] for side in "AG"}
        exact = {side: np.linalg.inv(M[side] + lam[side] * np.eye(len(M[side]))) for side in "AG"}
        J = step.G.astype(np.float64) @ step.A.T.astype(np.float64)
        S_ref = exact["G"] @ J @ exact["A"]
        for name in DETERMINISTIC:
            cheap = {}
            for side in "AG":
                U, D = held[name][side]
                tau = D[-1] if continuation == "min" and len(D) < len(U) else 0.0
                cheap[side] = damped_inverse((U, D), lam[side] if damping == "common" else phi * D[0], tau)
            S = cheap["G"] @ J @ cheap["A"]
            values[name, step.k, "inverse_A"] = relative_error(cheap["A"], exact["A"])
            values[name, step.k, "inverse_G"] = relative_error(cheap["G"], exact["G"])
            values[name, step.k, "step_norm"] = relative_error(S, S_ref)
            values[name, step.k, "step_angle"] = 1 - np.sum(S * S_ref) / np.sqrt(np.sum(S * S) * np.sum(S_ref**2))
    return pd.Series(values)


@pytest.mark.parametrize(
    ("continuation", "damping", "phi"),
    [("min", "own", 0.1), ("none", "own", 0.1), ("min", "common", 0.1), ("min", "own", 0.01)],
)
def test_deterministic_algorithms_equal_a_dense_evaluation_of_the_formulas(
    tmp_path, recording, continuation, damping, phi
):
    frame = _replay(
        recording,
        tmp_path / "errors.csv",
        *("--continuation", continuation, "--damping", damping, "--phi", str(phi)),
        *("--algorithms", *DETERMINISTIC),
    )
    _assert_close(_values(frame), _dense_errors(continuation, damping, phi))


# ------------------------------------------------------------------------------------------------ options


def test_continuations_differ_for_low_rank_algorithms_and_not_for_kfac(tmp_path, recording):
    frames = {}
    for kind in ("none", "min", "trace"):
        options = ("--continuation", kind, "--algorithms", *DETERMINISTIC)
        frames[kind] = _values(_replay(recording, tmp_path / f"{kind}.csv", *options))
    for one, two in (("none", "min"), ("min", "trace"), ("trace", "none")):
        _assert_close(frames[one].loc[["K-FAC T_inv=50"]], frames[two].loc[["K-FAC T_inv=50"]])
        for metric in METRICS[:2]:  # a step whose columns lie in the representation's span does not see tau
            inverses = [frames[kind].loc["B-KFAC", :, metric] for kind in (one, two)]
            assert (inverses[0] != inverses[1]).all()


def test_phi_of_the_command_line_overrides_the_recordings(tmp_path):
    theirs = _theirs(tmp_path / "r.h5", phi=0.3)
    run = {
        phi: _values(_replay(theirs, tmp_path / "e.csv", "--algorithms", "B-KFAC", *phi))
        for phi in ((), ("--phi", "0.3"), ("--phi", "0.1"))
    }
    plain = _values(_replay(_ours(tmp_path / "o.h5"), tmp_path / "e.csv", "--algorithms", "B-KFAC"))
    _assert_close(run[()], run["--phi", "0.3"])
    _assert_close(run["--phi", "0.1"], plain)  # and 0.1 is the default of a recording without phi
    assert (run[()] != plain).all()


def test_any_algorithm_can_be_had_at_another_period_and_rank(tmp_path, recording):
    names = ("R-KFAC T_inv=50 rank=12", "R-KFAC T_inv=50", "B-R-KFAC T_rsvd=20", "B-KFAC-C phi_corct=1")
    frame = _replay(recording, tmp_path / "e.csv", "--algorithms", *names)
    assert tuple(dict.fromkeys(frame.algorithm)) == names
    mean = frame[frame.metric == "inverse_A"].groupby("algorithm").value.mean()
    assert mean["R-KFAC T_inv=50 rank=12"] < mean["R-KFAC T_inv=50"]


def test_other_algorithms_beside_it_change_no_algorithms_rows(tmp_path, recording):
    alone = _values(_replay(recording, tmp_path / "a.csv", "--algorithms", "B-KFAC-C"))
    among = _values(_replay(recording, tmp_path / "b.csv"), ["B-KFAC-C"])
    _assert_close(alone, among, rtol=1e-12)


def test_info_describes_every_layer_in_a_line(tmp_path, capsys):
    path = tmp_path / "r.h5"
    with RecordingWriter(path) as writer:
        for name in ("fc", "empty"):
            writer.add_layer(name, **LAYER, windows=WINDOWS if name == "fc" else ())
        for step in STEPS[:40]:
            writer.append("fc", step)
    assert main(["info", str(path)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{path}: kfacerr-recording version 1, {path.stat().st_size:,} bytes"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}
    assert set(rows) == {"fc", "empty"}
    assert rows["fc"]["windows"] == "20+60 (epoch 2, 38 recorded), 100+15 (epoch 7, 0 recorded)"
    assert (rows["fc"]["d_A"], rows["fc"]["steps"], rows["fc"]["updates"]) == ("24", "40", "6")
    assert (rows["empty"]["iterations"], rows["empty"]["windows"]) == ("none", "none")


def test_two_windows_of_one_epoch_are_two_rows(tmp_path, capsys):
    windows = [Window(20, 10, 1), Window(60, 10, 1)]
    frame = _replay(_ours(tmp_path / "r.h5", windows=windows), tmp_path / "e.csv", "--algorithms", "B-KFAC")
    assert (frame.window == np.where(frame.k < 60, 20, 60)).all()
    means = averages(frame)
    assert list(means.window) == [20, 60]
    for metric in METRICS:
        rows = frame[(frame.metric == metric) & (frame.k < 60)]
        assert means[metric].iloc[0] == pytest.approx(rows.value.mean())


@pytest.mark.parametrize("exponent", [-40, -33, 40])
def test_the_scale_of_the_columns_changes_no_row_in_float32(tmp_path, recording, exponent):
    """1e-12 to 1e12: products of columns, inverses and their squares would leave the range."""
    scaled = [s._replace(A=np.ldexp(s.A, exponent), G=np.ldexp(s.G, exponent)) for s in STEPS]
    options = ("--dtype", "float32", "--algorithms", "B-KFAC", "K-FAC T_inv=50")
    one = _replay(recording, tmp_path / "a.csv", *options)
    two = _replay(_theirs(tmp_path / "r.h5", scaled), tmp_path / "b.csv", *options)
    assert one.equals(two)


def test_info_says_where_a_window_begins_late_and_goes_on_after_a_bad_layer(tmp_path, capsys):
    path = _theirs(tmp_path / "r.h5", [s for s in STEPS if s.k != 20])
    with h5py.File(path, "r+") as file:
        file.copy("layers/fc", "layers/bad")
        del file["layers/bad"].attrs["bias"]
    assert main(["info", str(path)]) == 2
    captured = capsys.readouterr()
    assert "| fc " in captured.out and "20+60 (epoch 2, 59 recorded from 21 on)" in captured.out
    assert captured.err == f"kfacerr: {path}: layer 'bad' lacks the attribute bias\n"


# ---------------------------------------------------------------------------------------------- bad input


def _run(*arguments, **options):
    command = [sys.executable, "-m", "kfacerr.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def _fails(capsys, recording, out, *options, **changes) -> str:
    """The one line on stderr of a replay that exits with status 2 and leaves no table."""
    arguments = {"--layer": "fc", "--rank": "5", "--out": str(out)} | changes
    flat = [word for pair in arguments.items() for word in pair]
    try:
        status = main(["replay", str(recording), *flat, *options])
    except SystemExit as stop:  # argparse's way
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1
    assert captured.err.startswith("kfacerr")
    return captured.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--layer": "fc9"}, "ours.h5: no layer 'fc9'; there are fc"),
        ({"--rank": "0"}, "--rank must be at least 1, got 0"),
        ({"--rank": "-3"}, "--rank must be at least 1, got -3"),
        ({"--rank": "ten"}, "argument --rank: invalid int value: 'ten'"),
        ({"--rho": "1"}, "rho must lie in (0, 1), got 1.0"),
        ({"--rho": "0"}, "rho must lie in (0, 1), got 0.0"),
        ({"--rho": "nan"}, "rho must lie in (0, 1), got nan"),
        ({"--phi": "0"}, "phi"),
        ({"--phi": "-0.1"}, "-0.1"),
        ({"--phi": "nan"}, "nan"),
        ({"--phi": "inf"}, "inf"),
        ({"--seed": "-1"}, "--seed must be at least 0, got -1"),
        ({"--oversampling": "-1"}, "--oversampling must be at least 0, got -1"),
        ({"--n-pwr-it": "-1"}, "--n-pwr-it must be at least 0, got -1"),
        ({"--dtype": "float16"}, "argument --dtype: invalid choice: 'float16'"),
        ({"--backend": "jax"}, "argument --backend: invalid choice: 'jax'"),
        ({"--continuation": "max"}, "argument --continuation: invalid choice: 'max'"),
        ({"--damping": "mine"}, "argument --damping: invalid choice: 'mine'"),
        ({"--algorithms": "SENG"}, "algorithm 'SENG': 'SENG' is not one of K-FAC, R-KFAC"),
        ({"--algorithms": "B-KFAC T_inv=5"}, "algorithm 'B-KFAC T_inv=5': 'T_inv' is not one of "),
        ({"--algorithms": "R-KFAC rank=x"}, "algorithm 'R-KFAC rank=x': rank has no value 'x'"),
        (
            {"--algorithms": "R-KFAC T_inv=0"},
            "algorithm 'R-KFAC T_inv=0': T_inv must be a whole number of at least 1",
        ),
        ({"--algorithms": "B-KFAC-C phi_corct=2"}, "2.0"),
        ({"--algorithms": ""}, "algorithm ''"),
        ({"--plot": "errors.xyz"}, "errors.xyz: a figure's name must end in .pdf, .png, .svg"),
        ({"--plot": "no-such-folder/errors.pdf"}, "the folder no-such-folder does not exist"),
        ({"--no-such-option": "1"}, "unrecognized arguments: --no-such-option"),
    ],
)
def test_bad_value_is_named_in_one_line(tmp_path, recording, capsys, changes, message):
    assert message in _fails(capsys, recording, tmp_path / "e.csv", **changes)
    assert not list(tmp_path.iterdir())


def test_a_metric_that_is_not_finite_is_one_line_and_no_warning(tmp_path, recording, capsys):
    """1/lam is 1e300."""
    line = _fails(capsys, recording, tmp_path / "e.csv", **{"--phi": "1e-300", "--algorithms": "B-KFAC"})
    assert "ours.h5: layer 'fc', iteration 20: " in line


def test_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, recording, capsys, monkeypatch):
    monkeypatch.setattr(ErrorStudy, "push", lambda *_: pytest.fail("nothing must be computed"))
    assert "nowhere does not exist" in _fails(capsys, recording, tmp_path / "nowhere" / "e.csv")
    assert "is a folder" in _fails(capsys, recording, tmp_path)
    assert "is the recording itself" in _fails(capsys, recording, recording)
    figure = tmp_path / "e.pdf"
    assert "e.pdf: is --out" in _fails(capsys, recording, figure, **{"--plot": str(figure)})
    kept = _ours(tmp_path / "e.csv.partial")
    assert "e.csv.partial: is the recording itself" in _fails(capsys, kept, tmp_path / "e.csv")
    monkeypatch.setattr("os.access", lambda *_: False)  # as root, no folder is closed
    assert "is not writable" in _fails(capsys, recording, tmp_path / "e.csv")


def test_a_disk_that_fills_up_is_reported_in_one_line(tmp_path, recording, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert "e.csv: cannot be written: No space left" in _fails(capsys, recording, tmp_path / "e.csv")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_recordings_are_named(tmp_path, capsys):
    out = tmp_path / "e.csv"
    assert "none.h5: no such file" in _fails(capsys, tmp_path / "none.h5", out)
    text = tmp_path / "text.h5"
    text.write_text("hello")
    assert "text.h5: not an HDF5 file" in _fails(capsys, text, out)
    assert f"{tmp_path}: is no regular file" in _fails(capsys, tmp_path, out)
    other = _theirs(tmp_path / "other.h5", format="someone-elses")
    assert "other.h5: not a kfacerr-recording (attribute format is 'someone-elses')" in _fails(capsys, other, out)
    cut = tmp_path / "cut.h5"
    cut.write_bytes(_ours(tmp_path / "whole.h5").read_bytes()[:9000])
    assert "cut.h5: truncated or damaged" in _fails(capsys, cut, out)
    none = _theirs(tmp_path / "nowin.h5", windows=np.empty((0, 3), int))
    assert "nowin.h5: layer 'fc': no windows to measure in" in _fails(capsys, none, out)
    late = _theirs(tmp_path / "late.h5", windows=np.array([[5000, 10, 1]]))
    assert "late.h5: layer 'fc': no recorded iteration lies in a window" in _fails(capsys, late, out)
    early = _theirs(tmp_path / "early.h5", steps=[s._replace(update=False) for s in STEPS])
    assert "early.h5: layer 'fc', iteration 20: " in _fails(capsys, early, out)
    assert not out.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_columns_are_named_and_the_rows_before_them_kept(tmp_path, recording, capsys, value):
    steps = list(STEPS)
    bad = next(i for i, s in enumerate(steps) if s.k == 47)
    G = steps[bad].G.copy()
    G[3, 1] = value
    steps[bad] = steps[bad]._replace(G=G)
    out = tmp_path / "e.csv"
    line = _fails(capsys, _theirs(tmp_path / "r.h5", steps), out)
    assert "r.h5: layer 'fc', iteration 47: G holds NaN or Inf; the" in line
    assert f"rows computed so far are in {out}.partial" in line
    whole = _replay(recording, out)
    assert pd.read_csv(f"{out}.partial").equals(whole[whole.k < 47])


def test_a_file_damaged_on_the_way_keeps_the_rows_before_the_damage(tmp_path, capsys):
    path = _ours(tmp_path / "r.h5")
    content = bytearray(path.read_bytes())
    step = next(s for s in STEPS if s.k == 60)
    content[content.index(step.A.tobytes())] ^= 1
    path.write_bytes(content)
    line = _fails(capsys, path, tmp_path / "e.csv")
    assert "r.h5: layer 'fc', iteration 60: A cannot be read, the file is damaged" in line
    assert pd.read_csv(tmp_path / "e.csv.partial").k.max() == 59


def test_ctrl_c_keeps_the_rows_and_exits_with_130(tmp_path, recording, capsys, monkeypatch):
    push = ErrorStudy.push

    def interrupted(self, step):
        if step.k == 40:
            raise KeyboardInterrupt
        return push(self, step)

    monkeypatch.setattr(ErrorStudy, "push", interrupted)
    out = tmp_path / "e.csv"
    status = main(["replay", str(recording), "--layer", "fc", "--rank", "5", "--out", str(out)])
    assert status == 130
    assert capsys.readouterr().err == (
        f"kfacerr: interrupted; the {20 * 4 * 7} rows computed so far are in {out}.partial\n"
    )
    assert sorted(set(pd.read_csv(f"{out}.partial").k)) == list(range(20, 40))
    assert not out.exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end_keeps_the_rows_as_ctrl_c_does(tmp_path, recording, capsys, monkeypatch, request, name):
    push, number = ErrorStudy.push, getattr(signal, name)
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and stays so

    def stopped(self, step):
        if step.k == 40:
            signal.raise_signal(number)
        return push(self, step)

    monkeypatch.setattr(ErrorStudy, "push", stopped)
    out = tmp_path / "e.csv"
    status = main(["replay", str(recording), "--layer", "fc", "--rank", "5", "--out", str(out)])
    assert status == 128 + number
    line = f"kfacerr: stopped by {name}; the {20 * 4 * 7} rows computed so far are in {out}.partial\n"
    assert capsys.readouterr().err == line
    assert sorted(set(pd.read_csv(f"{out}.partial").k)) == list(range(20, 40))
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_reader_who_has_enough_ends_it_quietly(tmp_path):
    ours = _ours(tmp_path / "r.h5")
    command = [sys.executable, "-m", "kfacerr.cli", "info", str(ours)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(("backend", "package"), [("torch", "PyTorch"), ("cupy", "CuPy")])
def test_a_backend_that_is_not_installed_is_named(tmp_path, recording, capsys, monkeypatch, backend, package):
    monkeypatch.setitem(sys.modules, backend, None)  # as if it were not there
    line = _fails(capsys, recording, tmp_path / "e.csv", **{"--backend": backend})
    assert f"--backend {backend}: {package} is not installed" in line


def test_bad_input_exits_with_2_and_one_line_in_a_process_of_its_own(tmp_path, recording):
    for arguments in (
        ("info", tmp_path / "none.h5"),
        ("replay", recording, "--layer", "fc9", "--rank", 5, "--out", tmp_path / "e.csv"),
        ("replay", recording),
    ):
        done = _run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"kfacerr {kfacerr.__version__}\n"


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["replay", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--layer", "--rank", "--rho", "--phi", "--continuation", "--damping", "--algorithms", "--plot"):
        assert option in text
    assert "(default: 0.95)" in text and "None" not in text


# ------------------------------------------------------------------------------------------ report, advise


def test_report_writes_one_page_and_prints_the_summary(tmp_path, recording, capsys):
    out = tmp_path / "r.html"
    assert main(["report", str(recording), "--rank", "3", "--algorithms", "B-KFAC", "--out", str(out)]) == 0
    page, printed = out.read_text(encoding="utf-8"), capsys.readouterr().out
    assert page.startswith("<!doctype html>") and "B-KFAC" in page and "r = 3" in page
    assert "certified A" in printed and "B-KFAC" in printed


def test_advise_writes_the_table_and_ends_with_the_policy(tmp_path, recording, capsys):
    out, plot = tmp_path / "a.csv", tmp_path / "a.pdf"
    options = ("--layer", "fc", "--rank", "3", "--budget", "1e9x", "--out", str(out), "--plot", str(plot))
    assert main(["advise", str(recording), *options]) == 0
    frame = pd.read_csv(out)
    assert list(frame.columns[:7]) == ["algorithm", "cost", *METRICS, "on_frontier"]
    assert plot.stat().st_size > 1000
    assert re.match(
        r"KFAC\(model, T_updt=\d+, phi_lambda=.+, policy=\{'fc': '.+'\}\)",
        capsys.readouterr().out.splitlines()[-1],
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["advise", "--layer", "fc", "--budget", "much", "--out", "a.csv"], "budget 'much': give milliseconds"),
        (["advise", "--layer", "nope", "--out", "a.csv"], "no layer 'nope'"),
        (["advise", "--layer", "fc", "--phi", "0", "--out", "a.csv"], "phi must be positive"),
        (["report", "--rank", "0", "--out", "r.html"], "--rank must be at least 1"),
        (["report", "--out", "no/r.html"], "the folder no does not exist"),
    ],
)
def test_report_and_advise_refuse_in_one_line(tmp_path, recording, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    name, *options = command
    assert main([name, str(recording), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
