"""The speed study runs in miniature and writes its files; its yardsticks compute what they stand for."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from kfacerr.brand import symmetric_brand
from kfacerr.lowrank import LowRank
from studies import speed
from tests.strategies import orthogonal, spectrum


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")
    assert speed.main(["--quick", "--out", str(out)]) == 0
    return out


def test_the_study_writes_its_files(out):
    for name in (
        "times.csv",
        "ratios.csv",
        "exponents.csv",
        "memory.csv",
        "accuracy.csv",
        "speed.pdf",
        "speed.png",
    ):
        assert (out / name).stat().st_size > 0
    assert "torch_threads" in json.loads((out / "environment.json").read_text())
    assert "## Growth with d" in (out / "speed.md").read_text()


def test_every_way_is_measured_at_every_size_in_every_round(out):
    times = pd.read_csv(out / "times.csv")
    counted = times.groupby(["task", "d"]).way.agg(["nunique", "size"])
    assert counted["nunique"].to_dict() == {
        **{("update", d): 10 for d in (64, 96, 128)},
        **{("application", d): 3 for d in (64, 96, 128)},
        ("study step", 64): 3,
    }
    assert (counted["size"] == 2 * counted["nunique"]).all()
    assert (times.seconds > 0).all()
    table = pd.read_csv(out / "ratios.csv")
    assert (table[table.way == table.base].ratio == 1).all()
    assert (table.low <= table.ratio).all() and (table.ratio <= table.high).all()


def test_the_accuracy_table_keeps_the_contract(out):
    exact = pd.read_csv(out / "accuracy.csv")
    assert len(exact) == 4
    assert (exact[["orthonormality", "error"]] <= 1e-4).all(axis=None)


def test_the_textbook_update_is_algorithm_3():
    rng = np.random.default_rng(0)
    U, D, A = (
        torch.from_numpy(x)
        for x in (orthogonal(rng, 20)[:, :4], spectrum("slow decay", 4), rng.normal(size=(20, 3)))
    )
    V, E = speed.textbook_brand(U, D, A)
    low = symmetric_brand(LowRank(U, D), A)
    torch.testing.assert_close(E, low.D)
    torch.testing.assert_close((V * E) @ V.T, low.dense())


def test_the_naive_study_measures_what_the_error_study_does():
    """After the window's start, K-FAC's four errors of one step agree."""
    rng = np.random.default_rng(0)
    first, X = (torch.from_numpy(speed.columns(24, 6, rng)).double() for _ in range(2))
    naive = speed.NaiveStudy(4, first)
    naive.update(X)
    study = speed.ErrorStudy(
        speed.SEVEN, speed.Settings(rank=4, rho=speed.RHO), [speed.Window(0, 100)], phi=speed.PHI
    )
    study.push(speed.Step(0, first, first))
    rows = study.push(speed.Step(10, X, X))
    values = {(row.algorithm, row.metric): row.value for row in rows}
    expected = dict(zip(values, speed.naive_errors(naive, naive, X, X), strict=True))
    for name in ("K-FAC T_inv=50", "B-KFAC"):
        for metric in ("inverse_A", "inverse_G", "step_norm", "step_angle"):
            assert values[name, metric] == pytest.approx(expected[name, metric], rel=1e-6, abs=1e-9)


def test_sizes_that_do_not_fit_are_refused(tmp_path, capsys):
    assert speed.main(["--quick", "--d", "16", "--out", str(tmp_path / "x")]) == 2
    assert "d > r + n = 20, got 16" in capsys.readouterr().err
