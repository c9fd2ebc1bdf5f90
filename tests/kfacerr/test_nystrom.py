"""Nyström: M~ <= M for any sketch, never worse than RS from the same sketch, exact where it can be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.rsvd import evd, nystrom, rsvd, srevd
from tests.strategies import generators, orthogonal, psd, psd_matrices, spectrum


def sketch(method, M, r, *, oversampling=1, n_pwr_it=0, seed=0):
    return method(M, r, oversampling=oversampling, n_pwr_it=n_pwr_it, rng=np.random.default_rng(seed))


def eps(M) -> float:
    return float(np.finfo(M.dtype).eps)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(M=psd_matrices(), data=st.data())
def test_the_error_is_psd_for_any_sketch(xp, dtype, M, data):
    d = M.shape[0]
    r, oversampling = data.draw(st.integers(1, d)), data.draw(st.integers(0, 3))
    n_pwr_it, seed = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 99))
    given_M = xp.array(M, dtype)
    low = sketch(nystrom, given_M, r, oversampling=oversampling, n_pwr_it=n_pwr_it, seed=seed)
    E = xp.numpy(given_M) - xp.numpy(low.dense())
    assert np.linalg.eigvalsh(E)[0] >= -16 * d * eps(M.astype(dtype))
    U, D = xp.numpy(low.U), xp.numpy(low.D)
    assert low.m == min(r, d) and (D >= 0).all() and (np.diff(D) <= 0).all()
    assert np.abs(U.T @ U - np.eye(low.m)).max() <= 32 * d * eps(M.astype(dtype))


@given(M=psd_matrices(), data=st.data())
def test_nystrom_is_never_worse_than_rs_from_the_same_sketch(M, data):
    """RS <= N before truncation, in the order of p.s.d. matrices; in the nuclear norm also after it."""
    d = M.shape[0]
    r, n_pwr_it = data.draw(st.integers(1, d)), data.draw(st.integers(0, 2))
    slack = 32 * d * np.finfo(float).eps
    whole = [sketch(f, M, r, oversampling=0, n_pwr_it=n_pwr_it).dense() for f in (nystrom, rsvd)]
    # (M Q Q^T M)^(1/2) loses half the digits of the modes it is small on.
    assert np.linalg.eigvalsh(whole[0] - whole[1])[0] >= -slack
    N, R = (sketch(f, M, r, oversampling=2, n_pwr_it=n_pwr_it) for f in (nystrom, rsvd))
    assert float(N.trace()) >= float(R.trace()) - slack


@pytest.mark.parametrize("decay", ["slow decay", "harmonic", "graded"])
def test_without_power_iterations_nystrom_is_better_than_rs_and_sre(decay):
    rng = np.random.default_rng(0)
    Q = orthogonal(rng, 200)
    M = (Q * (1 / (1 + np.arange(200)) if decay == "harmonic" else spectrum(decay, 200))) @ Q.T
    error = {
        f: np.linalg.norm(M - sketch(f, M, 20, oversampling=5).dense(), "nuc") for f in (nystrom, rsvd, srevd)
    }
    best = np.linalg.norm(M - evd(M, 20).dense(), "nuc")
    assert best <= error[nystrom] <= 0.97 * error[rsvd] and error[nystrom] <= error[srevd]


@given(rng=generators)
def test_a_rank_deficient_factor_is_recovered_exactly(xp, rng):
    M = psd(rng, "rank deficient", 30)  # rank 10
    error = M - xp.numpy(sketch(nystrom, xp.array(M), 12, oversampling=3).dense())
    assert np.linalg.norm(error) <= 1e-12


def test_a_sketch_that_covers_the_space_is_exact_and_zero_is_zero(xp):
    M = psd(np.random.default_rng(0), "slow decay", 9)
    assert np.linalg.norm(M - xp.numpy(sketch(nystrom, xp.array(M), 9, oversampling=0).dense())) <= 1e-13
    assert not xp.numpy(sketch(nystrom, xp.array(np.zeros((9, 9))), 3).dense()).any()


@pytest.mark.parametrize("decades", [4, 8])
def test_float32_keeps_the_small_eigenvalues_to_rounding(decades):
    rng = np.random.default_rng(1)
    Q, w = orthogonal(rng, 60), 10 ** (-decades * np.arange(60) / 59)
    M = ((Q * w) @ Q.T).astype(np.float32)
    low = sketch(nystrom, M, 20, oversampling=10, n_pwr_it=2)
    assert np.abs(low.D - w[:20]).max() <= 32 * np.finfo(np.float32).eps
