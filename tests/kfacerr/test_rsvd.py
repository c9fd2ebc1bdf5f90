"""Exact EVD, RSVD (RS) and randomised EVD (SRE) of an EA factor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.exceptions import InputError
from kfacerr.rsvd import evd, rsvd, srevd
from tests import reference
from tests.strategies import generators, psd, psd_matrices, spectrum

EPS = np.finfo(float).eps
METHODS = pytest.mark.parametrize("method", [rsvd, srevd])


def sketch(method, M, r, *, oversampling=10, n_pwr_it=4, seed=0):
    return method(M, r, oversampling=oversampling, n_pwr_it=n_pwr_it, rng=np.random.default_rng(seed))


def assert_is_representation(low, M, xp) -> np.ndarray:
    """Orthonormal U, ordered D; returns the dense estimate."""
    U, D = xp.numpy(low.U), xp.numpy(low.D)
    assert np.abs(U.T @ U - np.eye(low.m)).max() <= 32 * M.shape[0] * EPS
    assert (D >= 0).all() and (np.diff(D) <= 0).all()
    return xp.numpy(low.dense())


@given(M=psd_matrices(), data=st.data())
def test_evd_is_the_optimal_truncation(xp, M, data):
    d = M.shape[0]
    r = data.draw(st.integers(1, d))
    low = evd(xp.array(M), r)
    tail = np.linalg.eigvalsh(M)[::-1][r:]
    error = M - assert_is_representation(low, M, xp)
    assert np.linalg.norm(error) <= np.linalg.norm(tail) + 32 * d * EPS
    assert low.m == r


@METHODS
@given(M=psd_matrices(), data=st.data())
def test_a_sketch_that_covers_the_space_is_exact(xp, method, M, data):
    d = M.shape[0]
    r = data.draw(st.integers(1, d))
    low = sketch(method, xp.array(M), r, oversampling=d - r)
    error = xp.numpy(low.dense()) - xp.numpy(evd(xp.array(M), r).dense())
    assert np.linalg.norm(error) <= 32 * d * EPS


@METHODS
@given(rng=generators)
def test_a_rank_deficient_factor_is_recovered_exactly(xp, method, rng):
    d = 30
    M = psd(rng, "rank deficient", d)  # rank 10
    error = M - assert_is_representation(sketch(method, xp.array(M), 12, oversampling=3), M, xp)
    assert np.linalg.norm(error) <= 32 * d * EPS * np.linalg.norm(M)


@METHODS
@given(rng=generators)
def test_power_iterations_make_it_nearly_optimal_on_a_decaying_spectrum(xp, method, rng):
    """The paper's settings: projection error is negligible beside the truncation's.

    With l = r + p columns the tangent of the first r eigenvectors to range(Q) is at most
    (s_{l+1}/s_r)^(q+1) ||W_2|| ||W_1^+||
    for the Gaussian W split after row l; the last factor is below 1e3 but for one seed in some hundreds.
    """
    d, r, p, q = 40, 8, 10, 4
    M, s = psd(rng, "fast decay", d), spectrum("fast decay", d)
    low = sketch(method, xp.array(M), r, oversampling=p, n_pwr_it=q, seed=int(rng.integers(1000)))
    optimal = xp.numpy(evd(xp.array(M), r).dense())
    error = xp.numpy(low.dense()) - optimal
    assert np.linalg.norm(error) <= 1e3 * (s[r + p] / s[r - 1]) ** (q + 1) * np.linalg.norm(M)


@METHODS
@given(rng=generators, kind=st.sampled_from(["slow decay", "clustered", "degenerate", "fast decay"]))
def test_the_error_keeps_halkos_bound_without_power_iterations(method, rng, kind):
    """Halko, Martinsson & Tropp (2011), Corollary 10.9: with probability 1 - 6 exp(-p),

    ||(I - QQ^T) M|| <= (1 + 17 sqrt(1 + r/p)) s_{r+1} + 8 sqrt(r+p)/(p+1) (sum_{j>r} s_j^2)^(1/2) =: e.
    Before truncation RS errs by at most e (the square root is operator monotone, so that
    ||M - (M QQ^T M)^(1/2)|| <= ||M (I - QQ^T) M||^(1/2)) and SRE by 2e, their (5.10); truncation adds s_{r+1}.
    """
    d, r, p = 40, 8, 10
    M = psd(rng, kind, d)
    low = sketch(method, M, r, oversampling=p, n_pwr_it=0, seed=int(rng.integers(1000)))
    s = spectrum(kind, d)
    e = (1 + 17 * (1 + r / p) ** 0.5) * s[r] + 8 * (r + p) ** 0.5 / (p + 1) * np.linalg.norm(s[r:])
    error = np.linalg.norm(M - low.dense(), 2)
    assert error <= (1 if method is rsvd else 2) * e + s[r]
    assert error >= s[r] - 32 * d * EPS  # and none beats the optimal truncation


@given(rng=generators, kind=st.sampled_from(["slow decay", "degenerate"]), q=st.integers(0, 1))
def test_rs_never_overestimates_even_with_a_finite_projection_error(xp, rng, kind, q):
    """M~ = (M QQ^T M)^(1/2) <= (M^2)^(1/2) = M by Loewner-Heinz, and truncation only takes away."""
    d = 30
    M = psd(rng, kind, d)
    for r, oversampling in ((4, 0), (4, 3), (10, 2)):
        low = sketch(rsvd, xp.array(M), r, oversampling=oversampling, n_pwr_it=q, seed=int(rng.integers(1000)))
        error = M - xp.numpy(low.dense())
        assert np.linalg.norm(error) > 1e-3  # the projection error is finite
        assert np.linalg.eigvalsh(error)[0] >= -32 * d * EPS


def test_sre_overestimates_in_some_direction():
    """M - QQ^T M QQ^T is not p.s.d. in general (design §4): a found example."""
    M = psd(np.random.default_rng(0), "slow decay", 30)
    error = M - sketch(srevd, M, 4, oversampling=3, n_pwr_it=0).dense()
    assert np.linalg.eigvalsh(error)[0] < -1e-2


@METHODS
def test_one_seed_gives_one_result_on_every_cpu_backend(xp, method):
    if xp.device == "cuda" or xp.name == "cupy":
        pytest.skip("a GPU draws its own numbers")
    M = psd(np.random.default_rng(2), "slow decay", 24)
    expected = sketch(method, M, 5, n_pwr_it=1, oversampling=2, seed=9).dense()
    got = sketch(method, xp.array(M), 5, n_pwr_it=1, oversampling=2, seed=9)
    assert np.linalg.norm(xp.numpy(got.dense()) - expected) <= 32 * 24 * EPS
    other = sketch(method, M, 5, n_pwr_it=1, oversampling=2, seed=10).dense()
    assert np.linalg.norm(other - expected) > 1e-6


@METHODS
def test_float32_gives_the_float64_result_to_its_precision(xp, method):
    M = psd(np.random.default_rng(3), "fast decay", 40)
    got = xp.numpy(sketch(method, xp.array(M, np.float32), 8).dense())
    assert np.linalg.norm(got - reference.projected(M, 8)) <= 1e-5


def test_a_factor_of_zero_has_no_modes(xp):
    for low in (evd(xp.array(np.zeros((5, 5)))), sketch(rsvd, xp.array(np.zeros((20, 20))), 3, oversampling=1)):
        assert (xp.numpy(low.D) == 0).all()


def test_bad_settings_and_values_are_refused(xp):
    M = xp.array(np.eye(20))
    for bad in ({"r": 0}, {"r": 2, "oversampling": -1}, {"r": 2, "n_pwr_it": -1}):
        with pytest.raises(InputError):
            sketch(rsvd, M, **bad)
    with pytest.raises(InputError, match="NaN or Inf"):
        evd(xp.array(np.full((3, 3), np.nan)))


@METHODS
def test_small_modes_of_a_large_factor_are_no_zeros_in_float32(fast_xp, method):
    """At 1e-4 lambda_1 they are below d eps, the worst case of rounding, and a thousand times above what it is."""
    d, rng = 2048, np.random.default_rng(0)
    D = np.array([1.0, *np.linspace(1.2e-4, 0.8e-4, 20)])
    U = np.linalg.qr(rng.standard_normal((d, len(D))))[0]
    M = fast_xp.array((U * D) @ U.T, np.float32)
    low = method(M, 30, oversampling=10, n_pwr_it=2, rng=rng)
    np.testing.assert_allclose(fast_xp.numpy(low.D)[: len(D)], D, rtol=0.01)
    assert not fast_xp.numpy(low.D)[len(D) :].any()


@pytest.mark.parametrize("q", [0, 1, 4])
@METHODS
def test_a_sketch_takes_q_plus_1_products_with_m(xp, method, q):
    """The range is that of M^(q+1) W: of M^q W it would be another one wherever the spectrum decays slowly."""
    M = psd(np.random.default_rng(2), "slow decay", 30)
    Y = np.random.default_rng(0).standard_normal((30, 7))
    for _ in range(q + 1):
        Y = np.linalg.qr(M @ Y)[0]
    P = Y @ Y.T
    low = sketch(method, xp.array(M), 7, oversampling=0, n_pwr_it=q)
    w, V = np.linalg.eigh(M @ P @ M)  # RS: (M Q Q^T M)^(1/2)
    expected = (V * np.sqrt(np.maximum(w, 0))) @ V.T if method is rsvd else P @ M @ P
    assert np.linalg.norm(xp.numpy(low.dense()) - expected) <= 1e-7 * np.linalg.norm(M)
