"""The comparison of sketches: what is equal is equal, means are the windows', variants are what they say."""

import numpy as np
import pandas as pd
import pytest

from kfacerr.metrics import METRICS
from kfacerr.process import Settings
from kfacerr.recording import Recording
from kfacerr.study import ErrorStudy, table
from studies.sketches import Sizes, _fresh, _named, compare, contestants, main, within, write_flat
from tests.studies.helpers import refused

SIZES = Sizes(300, 100, 8, 10)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    path = tmp_path_factory.mktemp("flat") / "flat.h5"
    write_flat(path, 0.5, d_A=40, d_G=30, n=6)
    return path


@pytest.mark.parametrize("kind", ["rank", "columns", "memory", "flops"])
def test_an_equal_sketch_is_the_largest_that_spends_no_more(kind):
    limit = getattr(_named("B-KFAC rank=20", "").spent(SIZES), kind)
    s = within(kind, limit, SIZES)
    spent = [getattr(_named(f"N-KFAC s={one}", "").spent(SIZES), kind) for one in (s, s + 1)]
    assert spent[0] <= limit < spent[1]


def test_what_is_compared_has_every_base_once_and_each_variant():
    names = [one.name for one in contestants(SIZES, 12, True)]
    assert len(names) == len(set(names))
    assert {name.split()[0] for name in names} == {
        *("K-FAC", "FD", "R-KFAC", "B-R-KFAC", "W-KFAC", "B-KFAC", "N-KFAC")
    }
    assert any("T_base=0" in name for name in names) and any("handed out" in name for name in names)
    assert not any("fresh" in one.name for one in contestants(SIZES, 12, False))


def test_fresh_columns_are_kept_back_or_handed_out():
    kept, out = (_fresh(16, 1 / 4, handed_out).make(0, "A") for handed_out in (False, True))
    X = np.random.default_rng(0).standard_normal((50, 20))
    for process in (kept, out):
        process.update(0, X, None)
    assert (kept.fresh, kept.estimate.lowrank.m, out.estimate.lowrank.m) == (4, 12, 16)


def test_a_flat_recording_has_the_tail_it_is_asked_for(flat):
    with Recording(flat) as recording:
        layer = recording.layer("flat")
        M = sum(step.A.astype(float) @ step.A.T for step in layer.steps()) / len(layer)
    assert np.trace(M) == pytest.approx(1, rel=0.05)
    w = np.linalg.eigvalsh(M)
    assert w[:10].sum() / np.trace(M) == pytest.approx(0.5 * 10 / 40, rel=0.3)


def test_errors_are_means_over_the_windows(flat):
    """With every iteration measured, the mean over the window; here a plain one stands for nine."""
    chosen = [_named("B-KFAC rank=4", "B-KFAC"), _named("N-KFAC s=8", "N-KFAC")]
    with Recording(flat) as recording:
        layer = recording.layer("flat")
        frame = compare(layer, chosen, draws=2, phi=None, dtype="float64")
        study = ErrorStudy(["B-KFAC rank=4"], Settings(), layer.windows)
        rows = [
            row
            for step in layer.steps()
            for row in study.push(step._replace(A=step.A.astype(float), G=step.G.astype(float)))
        ]
    full = table(rows).groupby("metric").value.mean()
    brand = frame[(frame.algorithm == "B-KFAC rank=4") & (frame.continuation == "min")].iloc[0]
    assert brand["inverse_A"] == pytest.approx(full["inverse_A"], rel=1e-9)
    assert brand["step_norm"] == pytest.approx(full["step_norm"], rel=0.1)
    assert len(frame) == 2 * (1 + 2) and sorted(frame.draw.unique()) == [0, 1]
    draws = frame[(frame.algorithm == "N-KFAC s=8") & (frame.continuation == "trace")].inverse_A
    assert draws.nunique() == 2


def test_the_command_writes_tables_and_a_figure(tmp_path, flat, capsys):
    out = tmp_path / "out"
    arguments = [
        str(flat),
        "--layer",
        "flat",
        "--rank",
        "6",
        "--draws",
        "1",
        "--labels",
        "even",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    errors = pd.read_csv(out / "errors.csv")
    assert set(errors.recording) == {"even"} and not errors[list(METRICS)].isna().any().any()
    text = (out / "sketches.md").read_text()
    assert "B-KFAC's error over N-KFAC's" in text and "| flops " in text and text in capsys.readouterr().out
    assert {"sketches.png", "sketches.pdf", "environment.json"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draws", "0", "r.h5"], "--draws must be at least 1, got 0"),
        ([], "nothing to compare on: give a recording, or --flat"),
        (["r.h5", "s.h5", "--labels", "one"], "1 --labels for 2 recordings: give one each"),
        (["--flat", "1.5"], "--flat is a share of the trace, in (0, 1), got 1.5"),
        (["r.h5", "--phi", "-1"], "damping ratio phi must be positive and finite, got -1.0"),
        (["nowhere.h5"], "nowhere.h5"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, main, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "errors.csv").exists()
