"""`LowRank` is the matrix it stands for, in either of its two forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.lowrank import LowRank
from tests.strategies import generators, orthogonal, spectrum


def _both_forms(xp, rng, d, m):
    """The same matrix with U formed and as basis @ mix, and (U, D) in NumPy."""
    U, D = orthogonal(rng, d)[:, :m], spectrum("fast decay", m)
    basis = rng.standard_normal((d, m)) + 2 * np.eye(d, m)
    mix = np.linalg.lstsq(basis, U, rcond=None)[0]
    basis = basis + (U - basis @ mix) @ np.linalg.pinv(mix)  # now basis @ mix = U to rounding
    formed = LowRank(xp.array(U), xp.array(D))
    return formed, LowRank(xp.array(basis), xp.array(D), xp.array(mix)), U, D


@given(rng=generators, d=st.integers(1, 12), data=st.data())
def test_both_forms_apply_project_expand_and_trace_as_the_dense_matrix(xp, rng, d, data):
    m = data.draw(st.integers(1, d))
    formed, product, U, D = _both_forms(xp, rng, d, m)
    X, Z = rng.standard_normal((d, 3)), rng.standard_normal((m, 3))
    M = (U * D) @ U.T
    slack = 1e3 * d * np.finfo(float).eps
    for low in (formed, product):
        assert (low.d, low.m) == (d, m)
        np.testing.assert_allclose(xp.numpy(low.dense()), M, atol=slack * 10)
        np.testing.assert_allclose(xp.numpy(low.apply(xp.array(X))), M @ X, atol=slack * 10)
        np.testing.assert_allclose(xp.numpy(low.project(xp.array(X))), U.T @ X, atol=slack * 10)
        np.testing.assert_allclose(xp.numpy(low.expand(xp.array(Z))), U @ Z, atol=slack * 10)
        assert float(low.trace()) == pytest.approx(D.sum(), rel=1e-14)
        assert float(low.lambda_max) == D[0]


@given(rng=generators, d=st.integers(1, 12), data=st.data())
def test_truncation_is_optimal_in_the_spectral_and_frobenius_norm(xp, rng, d, data):
    m = data.draw(st.integers(1, d))
    r = data.draw(st.integers(1, d + 2))
    formed, product, _, D = _both_forms(xp, rng, d, m)
    for low in (formed, product):
        kept = low.truncate(r)
        assert kept.m == min(r, m)
        error = xp.numpy(low.dense()) - xp.numpy(kept.dense())
        tail = D[r:]
        assert np.linalg.norm(error) == pytest.approx(np.linalg.norm(tail), abs=1e-12)
        assert np.linalg.norm(error, 2) == pytest.approx(tail[0] if len(tail) else 0.0, abs=1e-12)
