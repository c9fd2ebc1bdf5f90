"""Damping, continuation and the application of the inverse: Algorithm 1 l.15-18, Algorithm 8, §3.5."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr import inverse as inverse_module
from kfacerr.array import cholesky_inverse
from kfacerr.brand import symmetric_brand
from kfacerr.exceptions import InputError
from kfacerr.inverse import (
    CONTINUATIONS,
    DenseInverse,
    Exact,
    application_flops,
    continuation_level,
    damped_inverse,
    exact_inverse,
    precondition,
    precondition_linear,
)
from kfacerr.lowrank import LowRank
from kfacerr.metrics import inverse_error
from tests import reference
from tests.strategies import SPECTRA, generators, orthogonal, psd, psd_matrices, spectrum

EPS = np.finfo(float).eps
PHIS = st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 10.0])
KINDS = pytest.mark.parametrize("continuation", list(CONTINUATIONS))


@st.composite
def representations(draw, max_d=12):
    """(U, D, trace of a factor above it)."""
    d = draw(st.integers(1, max_d))
    m = draw(st.integers(1, d))
    D = spectrum(draw(st.sampled_from(SPECTRA)), m)
    return orthogonal(draw(generators), d)[:, :m], D, float(D.sum()) * draw(st.sampled_from([0.5, 1.0, 1.3]))


def lift(xp, U, D):
    return LowRank(xp.array(U), xp.array(D))


@KINDS
@given(case=representations(), phi=PHIS)
def test_the_damped_continued_inverse_is_the_dense_inverse(xp, continuation, case, phi):
    U, D, trace = case
    d = len(U)
    inverse = damped_inverse(lift(xp, U, D), phi=phi, continuation=continuation, trace=xp.array(trace))
    tau = reference.level(D, d, continuation, trace)
    expected = reference.damped_inverse((U, D), phi * D[0], tau)
    slack = 64 * d * EPS * (1 + 1 / phi) * np.linalg.norm(expected)
    assert float(inverse.lam) == phi * D[0]
    assert float(inverse.tau) == pytest.approx(tau, abs=4 * d * EPS * trace)
    assert np.linalg.norm(xp.numpy(inverse.dense()) - expected) <= slack
    X = np.random.default_rng(0).standard_normal((d, 3))
    assert np.linalg.norm(xp.numpy(inverse.apply(xp.array(X))) - expected @ X) <= slack * np.linalg.norm(X)


@given(case=representations(), phi=PHIS)
def test_min_is_the_papers_replacement_of_lambda_and_d(xp, case, phi):
    """§3.5: lam <- lam + min D and D <- D - min D in Algorithm 1 l.16."""
    U, D, _ = case
    d = len(U)
    if len(D) == d:
        return  # nothing is missing, nothing is continued
    lam, tau = phi * D[0], D.min()
    J = np.random.default_rng(1).standard_normal((4, d))
    one = (np.eye(4)[:, :1], np.zeros(1))
    expected = reference.algorithm_1(J, (U, D - tau), one, lam + tau, 1.0)
    got = damped_inverse(lift(xp, U, D), phi=phi, continuation="min").apply(xp.array(J.T))
    slack = 64 * d * EPS * (1 + 1 / phi) * np.linalg.norm(J) / (lam + tau)
    assert np.linalg.norm(xp.numpy(got).T - expected) <= slack


def test_numerically_zero_modes_count_as_zero_for_min(xp):
    d = 10
    Q = orthogonal(np.random.default_rng(0), d)
    A = Q[:, :3] @ np.array([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]])  # three columns of rank two
    low = symmetric_brand(None, xp.array(A))
    assert float(continuation_level(low, "min")) == 0
    assert float(continuation_level(low, "trace", xp.array(12.0))) == pytest.approx((12 - np.sum(A**2)) / 8)
    inverse = xp.numpy(damped_inverse(low, phi=0.1, continuation="trace", trace=xp.array(12.0)).dense())
    expected = reference.evd(A @ A.T, 2)
    tau = (12 - np.sum(A**2)) / 8
    np.testing.assert_allclose(inverse, reference.damped_inverse(expected, 0.1 * expected[1][0], tau), atol=1e-12)


@given(rng=generators, kind=st.sampled_from(SPECTRA), data=st.data())
def test_trace_is_the_isotropic_tail_of_least_frobenius_error_and_keeps_the_trace(xp, rng, kind, data):
    """D are Rayleigh quotients of M on an orthonormal U (no eigenvectors needed); tau is scanned."""
    d = data.draw(st.integers(2, 12))
    m = data.draw(st.integers(1, d - 1))
    M, U = psd(rng, kind, d), orthogonal(rng, d)[:, :m]
    D, V = np.linalg.eigh(U.T @ M @ U)
    U, D = (U @ V)[:, ::-1], np.maximum(D[::-1], 0)
    trace = float(np.trace(M))
    low = lift(xp, U, D)
    tau = float(continuation_level(low, "trace", xp.array(trace)))

    present = U[:, D > 0]

    def error(level):
        return np.linalg.norm(M - (U * D) @ U.T - level * (np.eye(d) - present @ present.T))

    for level in np.concatenate([[0.0], tau * np.linspace(0, 3, 31), np.linspace(0, 1, 21)]):
        assert error(tau) <= error(level) + 32 * d * EPS
    assert D.sum() + tau * (d - present.shape[1]) == pytest.approx(trace, rel=1e-12)


@KINDS
def test_a_full_representation_is_not_continued(xp, continuation):
    D = spectrum("slow decay", 6)
    low = lift(xp, np.eye(6), D)
    assert float(continuation_level(low, continuation, xp.array(float(D.sum()) * (1 + 1e-15)))) == 0


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(a=representations(), g=representations(), n=st.integers(0, 4), phi=PHIS)
def test_algorithm_8_is_algorithm_1(xp, dtype, a, g, n, phi):
    rng = np.random.default_rng(2)
    A, G = rng.standard_normal((len(a[0]), n)), rng.standard_normal((len(g[0]), n))
    A, G, UA, DA, UG, DG = (xp.array(x, dtype) for x in (A, G, *a[:2], *g[:2]))
    inverse_A = damped_inverse(LowRank(UA, DA), phi=phi, continuation="none")
    inverse_G = damped_inverse(LowRank(UG, DG), phi=phi, continuation="none")
    J = G @ A.T
    by_1 = xp.numpy(precondition(J, inverse_G, inverse_A))
    P, Q = precondition_linear(G, A, inverse_G, inverse_A)
    by_8 = xp.numpy(P @ Q.T)
    lams = float(inverse_A.lam), float(inverse_G.lam)
    size = np.linalg.norm(xp.numpy(G)) * np.linalg.norm(xp.numpy(A)) / (lams[0] * lams[1])
    slack = 64 * 12 * float(np.finfo(dtype).eps) * size
    assert np.linalg.norm(by_8 - by_1) <= slack
    pairs = [(xp.numpy(u), xp.numpy(w)) for u, w in ((UA, DA), (UG, DG))]
    printed = reference.algorithm_1(xp.numpy(G) @ xp.numpy(A).T, *pairs, *lams)
    assert np.linalg.norm(by_1 - printed) <= slack


@given(M=psd_matrices(), phi=PHIS)
def test_the_reference_is_the_exact_inverse(xp, M, phi):
    d = len(M)
    inverse, lam = exact_inverse(xp.array(M), phi=phi)
    expected = np.linalg.inv(M + phi * np.linalg.eigvalsh(M)[-1] * np.eye(d))
    slack = (64 * d * EPS + 1e3 * EPS) * (1 + 1 / phi)  # the second is what lam may err by, in a cluster
    got = xp.numpy(inverse.dense())
    assert np.linalg.norm(got - expected) <= slack * np.linalg.norm(expected)
    assert np.linalg.norm(got - got.T) <= slack * np.linalg.norm(got)
    assert np.linalg.norm(xp.numpy(exact_inverse(xp.array(M), lam=lam)[0].dense()) - got) == 0


@KINDS
@pytest.mark.parametrize("phi", [1e-8, 1e-6, 1e-3, 1.0])
def test_the_inverse_of_a_complete_float32_representation_does_not_cancel(xp, continuation, phi):
    """All d modes present and a flat spectrum: 1/lam is far above all eigenvalues of the inverse."""
    d = 30
    U, D = orthogonal(np.random.default_rng(0), d), np.linspace(2, 1, d)
    low, trace = LowRank(xp.array(U, np.float32), xp.array(D, np.float32)), xp.array(D.sum(), np.float32)
    inverse = damped_inverse(low, phi=phi, continuation=continuation, trace=trace)
    expected = (U / (D + 2 * phi)) @ U.T
    X = np.random.default_rng(1).standard_normal((d, 3))
    applied = xp.numpy(inverse.apply(xp.array(X, np.float32)))
    for got, true in ((xp.numpy(inverse.dense()), expected), (applied, expected @ X)):
        assert np.linalg.norm(got - true) <= 4e-7 * np.linalg.norm(true)
    assert inverse_error(inverse, DenseInverse(xp.array(expected, np.float32))) <= 4e-7


def test_an_absent_mode_among_d_keeps_its_eigenvalue(xp):
    """m = d, but a mode is numerically zero and its column of U too: 1/(lam + tau) is there all the same."""
    U, D = np.eye(4), np.array([4.0, 2.0, 1.0, 0.0])
    U[3, 3] = 0
    inverse = damped_inverse(lift(xp, U, D), phi=0.1, continuation="none")
    np.testing.assert_allclose(xp.numpy(inverse.dense()), np.diag(1 / (D + 0.4)), rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1.0, 1e20, 1e37])
@KINDS
def test_the_inverse_of_a_scaled_factor_is_the_scaled_inverse_over_all_of_float32(continuation, scale):
    """The product of two eigenvalues would leave the range from 1e-19 and 1e19 on."""
    U, D = np.eye(4, 3, dtype=np.float32), np.array([4, 2, 1], np.float32) * np.float32(scale)
    inverse = damped_inverse(LowRank(U, D), phi=0.1, continuation=continuation, trace=np.float32(7.5) * D[2])
    tau = reference.level(D / scale, 4, continuation, 7.5)
    expected = reference.damped_inverse((np.eye(4, 3), np.array([4.0, 2.0, 1.0])), 0.4, tau)
    assert np.linalg.norm(inverse.dense() * np.float64(scale) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_bad_damping_is_refused(xp):
    low, M = lift(xp, np.eye(3)[:, :1], np.ones(1)), xp.array(np.eye(3))
    for phi in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="phi"):
            damped_inverse(low, phi=phi)
        with pytest.raises(InputError, match="phi"):
            exact_inverse(M, phi=phi)
    with pytest.raises(InputError, match="one of phi and lam"):
        damped_inverse(low)
    with pytest.raises(InputError, match="one of phi and lam"):
        exact_inverse(M)
    with pytest.raises(InputError, match="not one of none, min, trace"):
        damped_inverse(low, phi=0.1, continuation="max")
    with pytest.raises(InputError, match="trace"):
        damped_inverse(low, phi=0.1, continuation="trace")
    with pytest.raises(InputError, match="no modes"):
        damped_inverse(symmetric_brand(None, xp.array(np.zeros((3, 0)))), phi=0.1)
    with pytest.raises(InputError, match="zero"):
        exact_inverse(xp.array(np.zeros((3, 3))), phi=0.1)
    with pytest.raises(InputError, match="NaN or Inf"):
        exact_inverse(xp.array(np.full((3, 3), np.nan)), phi=0.1)


@given(M=psd_matrices(), phi=PHIS)
def test_a_factor_kept_whole_has_the_modes_of_its_evd_and_the_references_inverse(xp, M, phi):
    held = Exact(xp.array(M))
    assert held.d == held.m == len(M) and held.mix is None
    slack = 64 * len(M) * EPS * np.linalg.norm(M)
    assert np.linalg.norm(xp.numpy(held.dense()) - M) <= slack
    assert abs(float(held.trace()) - np.trace(M)) <= slack
    inverse, lam = held.inverse(phi=phi)
    expected, of_reference = exact_inverse(xp.array(M), phi=phi)
    assert float(lam) == float(of_reference)
    assert np.array_equal(xp.numpy(inverse.dense()), xp.numpy(expected.dense()))


def test_a_factor_kept_whole_is_inverted_once_a_damping_and_without_an_evd(fast_xp, monkeypatch):
    held = Exact(fast_xp.array(psd(np.random.default_rng(0), "slow decay", 9)))
    monkeypatch.setattr(inverse_module, "evd", None)
    one, lam = held.inverse(phi=0.1)
    assert held.inverse(phi=0.1)[0] is one and held.inverse(lam=lam)[0] is one
    other, more = held.inverse(phi=0.2)
    assert other is not one and float(more) == pytest.approx(2 * float(lam), rel=1e-14)
    assert np.array_equal(fast_xp.numpy(held.inverse(lam=lam)[0].dense()), fast_xp.numpy(one.dense()))


def test_the_reference_needs_one_array_of_the_factors_size_and_leaves_the_factor_as_it_is():
    d = 700
    M = np.diag(np.linspace(1, 2, d)) + np.ones((d, d))
    before = M.copy()
    tracemalloc.start()
    inverse, lam = exact_inverse(M, phi=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 1.3 * M.nbytes
    assert np.array_equal(M, before)
    assert np.abs(inverse.dense() @ (M + float(lam) * np.eye(d)) - np.eye(d)).max() <= 1e-12
    assert np.array_equal(inverse.dense(), inverse.dense().T)


def test_torch_inverts_in_the_place_of_what_may_be_overwritten():
    torch = pytest.importorskip("torch")
    M = torch.eye(300, dtype=torch.float64) + 1
    inverse = cholesky_inverse(M, overwrite=True)
    assert inverse.data_ptr() == M.data_ptr()
    assert (inverse @ (torch.eye(300, dtype=torch.float64) + 1) - torch.eye(300)).abs().max() <= 1e-13


def test_the_flops_of_an_application_are_those_of_its_products():
    """Counted by hand: d_A = 7, d_G = 5, n = 3; A with 2 modes, G with all 5."""
    A_of_J, G_of_J = 2 * (2 * 7 * 2 * 5), 2 * 5 * 5 * 7  # U^T J^T and U times that; one dense product
    A_of_columns, G_of_columns = 2 * (2 * 7 * 2 * 3), 2 * 5 * 5 * 3
    assert application_flops(7, 5, 3, 2, 5) == (A_of_J + G_of_J, A_of_columns + G_of_columns)
