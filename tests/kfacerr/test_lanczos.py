"""`lambda_max` against an EVD."""

import numpy as np
import pytest

from kfacerr.lanczos import lambda_max
from tests.strategies import SPECTRA, psd


@pytest.mark.parametrize("d", [1, 2, 40, 150])
@pytest.mark.parametrize("kind", SPECTRA)
def test_lanczos_finds_the_largest_eigenvalue(xp, kind, d):
    M = psd(np.random.default_rng(d), kind, d)
    assert lambda_max(xp.array(M)) == pytest.approx(np.linalg.eigvalsh(M)[-1], rel=1e-12)
    assert lambda_max(xp.array(M, np.float32)) == pytest.approx(np.linalg.eigvalsh(M)[-1], rel=2e-6)


def test_lanczos_survives_invariant_subspaces(xp):
    assert lambda_max(xp.array(np.eye(30))) == pytest.approx(1, rel=1e-14)
    assert lambda_max(xp.array(np.zeros((30, 30)))) == 0
    spike = np.zeros((30, 30))
    spike[3, 3] = 5
    assert lambda_max(xp.array(spike)) == pytest.approx(5, rel=1e-14)


@pytest.mark.parametrize("exponent", [-110, -70, -40, 40, 70, 110])
def test_lanczos_finds_it_over_all_of_float32(xp, exponent):
    """The residual's squares vanish from 1e-20 on: it seemed to have converged at once."""
    M = psd(np.random.default_rng(0), "slow decay", 40)
    top = lambda_max(xp.array(np.ldexp(M, exponent), np.float32))
    assert np.ldexp(top, -exponent) == pytest.approx(1, rel=2e-6)
