"""The yardsticks compute what they stand for."""

import numpy as np
import pytest
import torch

from kfacerr.algorithms import SEVEN
from kfacerr.brand import symmetric_brand
from kfacerr.lowrank import LowRank
from kfacerr.process import Settings
from kfacerr.stream import Step, Window
from kfacerr.study import ErrorStudy
from studies.bench import yardsticks
from tests.strategies import orthogonal, spectrum


def test_the_textbook_update_is_algorithm_3():
    rng = np.random.default_rng(0)
    U, D, A = (
        torch.from_numpy(x)
        for x in (orthogonal(rng, 20)[:, :4], spectrum("slow decay", 4), rng.normal(size=(20, 3)))
    )
    V, E = yardsticks.textbook_brand(U, D, A)
    low = symmetric_brand(LowRank(U, D), A)
    torch.testing.assert_close(E, low.D)
    torch.testing.assert_close((V * E) @ V.T, low.dense())


def test_the_naive_study_measures_what_the_error_study_does():
    """After the window's start, K-FAC's four errors of one step agree."""
    rng = np.random.default_rng(0)
    first, X = (torch.from_numpy(yardsticks.columns(24, 6, rng)).double() for _ in range(2))
    naive = yardsticks.NaiveStudy(4, first)
    naive.update(X)
    settings = Settings(rank=4, rho=yardsticks.RHO)
    study = ErrorStudy(SEVEN, settings, [Window(0, 100)], phi=yardsticks.PHI)
    study.push(Step(0, first, first))
    rows = study.push(Step(10, X, X))
    values = {(row.algorithm, row.metric): row.value for row in rows}
    expected = dict(zip(values, yardsticks.naive_errors(naive, naive, X, X), strict=True))
    for name in ("K-FAC T_inv=50", "B-KFAC"):
        for metric in ("inverse_A", "inverse_G", "step_norm", "step_angle"):
            assert values[name, metric] == pytest.approx(expected[name, metric], rel=1e-6, abs=1e-9)
