"""(M + lam I)^-p for p in (0, 1]: in factored form, its metric, and certificates that hold and are sharp."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.certificate import Certificate, _turn
from kfacerr.exceptions import InputError
from kfacerr.inverse import CONTINUATIONS, Exact, continuation_level, damped_inverse, exact_inverse
from kfacerr.lowrank import LowRank
from kfacerr.metrics import inverse_error
from kfacerr.rsvd import nystrom, rsvd
from tests.strategies import SPECTRA, generators, orthogonal, psd, psd_matrices, spectrum

POWERS = pytest.mark.parametrize("p", [1.0, 0.5, 0.25, 0.01])
powers = st.sampled_from([1.0, 0.5, 0.25, 0.05])


def power_of(M: np.ndarray, lam: float, p: float) -> np.ndarray:
    """(M + lam I)^-p by an EVD, in float64."""
    w, V = np.linalg.eigh(M)
    return (V * (w + lam) ** -p) @ V.T


def f(t: np.ndarray, lam: float, p: float) -> np.ndarray:
    return lam**-p - (t + lam) ** -p


@given(psd_matrices(max_d=10), st.integers(1, 10), powers, st.sampled_from(list(CONTINUATIONS)))
def test_the_power_of_an_estimate_is_that_of_its_dense_continuation(M, r, p, continuation):
    w, V = np.linalg.eigh(M)
    low = LowRank(V[:, ::-1][:, :r], np.maximum(w[::-1][:r], 0))
    inverse = damped_inverse(low, phi=0.1, continuation=continuation, trace=np.asarray(np.trace(M)), power=p)
    U = low.U[:, low.D > 0]
    tau = inverse.tau if U.shape[1] < len(M) else 0
    dense = low.dense() + tau * (np.eye(len(M)) - U @ U.T)
    expected = power_of(dense, float(inverse.lam), p)
    np.testing.assert_allclose(inverse.dense(), expected, atol=1e-11 * np.abs(expected).max())
    X = np.random.default_rng(0).standard_normal((len(M), 3))
    np.testing.assert_allclose(inverse.apply(X), expected @ X, atol=1e-10 * np.abs(expected).max())


@POWERS
def test_the_exact_power_is_the_dense_one(p):
    M = psd(np.random.default_rng(0), "graded", 9)
    inverse, lam = exact_inverse(M, phi=1e-3, power=p)
    expected = power_of(M, float(lam), p)
    np.testing.assert_allclose(inverse.dense(), expected, rtol=1e-9, atol=1e-12 * expected.max())
    held = damped_inverse(Exact(M), phi=1e-3, power=p)
    assert inverse_error(held, inverse) < 1e-12
    root, _ = exact_inverse(M, lam=lam, power=0.5)
    np.testing.assert_allclose(root.matrix @ root.matrix, np.linalg.inv(M + lam * np.eye(9)), rtol=1e-8)


def test_weights_do_not_cancel_where_modes_are_close_to_the_level():
    low = LowRank(np.eye(4, 2), np.array([1.0 + 1e-13, 1.0]))
    inverse = damped_inverse(low, lam=np.asarray(1.0), continuation="min", power=0.5)
    assert (
        inverse.weights[0] == pytest.approx(-0.5 * 2**-1.5 * (low.D[0] - 1), rel=1e-12) and inverse.weights[1] == 0
    )


@pytest.mark.parametrize("p", [0, -0.5, 1.5, float("nan")])
def test_other_powers_are_refused(p):
    low, lam = LowRank(np.eye(2), np.ones(2)), np.asarray(0.1)
    known = Certificate.of_decomposition(low, np.asarray(2.0))
    for use in (
        lambda: damped_inverse(low, lam=lam, power=p),
        lambda: exact_inverse(np.eye(2), lam=lam, power=p),
        lambda: known.inverse_bound(lam, p),
    ):
        with pytest.raises(InputError, match=r"power must lie in \(0, 1\]"):
            use()
    with pytest.raises(InputError, match="not positive definite"):
        exact_inverse(np.diag([1.0, -0.5]), lam=lam, power=0.5)


# -------------------------------------------------------------------------------------------- certificates


@POWERS
def test_the_turn_is_where_the_square_over_its_argument_is_largest(p):
    x = _turn(p)
    ratio = lambda t: (1 - (1 + t) ** -p) ** 2 / t  # noqa: E731
    grid = np.geomspace(1e-3, 1e3, 4001)
    assert ratio(grid).max() <= ratio(x) * (1 + 1e-12)
    assert p != 1 or x == pytest.approx(1, rel=1e-13)


@given(rng=generators, d=st.integers(1, 12), lam=st.sampled_from([1e-3, 0.1, 1.0, 10.0]), p=powers)
def test_no_spectrum_exceeds_the_bound(rng, d, lam, p):
    t = rng.exponential(size=d) ** rng.integers(1, 5) * (rng.random(d) < 0.7)
    norms = map(np.float64, (t.sum(), np.linalg.norm(t), t.max(), 0))
    bound = Certificate(*norms, d).inverse_bound(np.float64(lam), p)
    # 1e-12 of f(t), and what 1 - (1 + x)^-p rounds where it is formed naively, as here
    slack = 1e-14 * lam**-p * d
    assert f(t, lam, p).max() <= float(bound.spectral) * (1 + 1e-12) + slack
    assert np.linalg.norm(f(t, lam, p)) <= float(bound.frobenius) * (1 + 1e-12) + slack


@POWERS
@pytest.mark.parametrize("lam", [0.01, 0.4, 7.0])
@pytest.mark.parametrize("flat", [1, 3, 8])
def test_the_bound_is_attained(p, lam, flat):
    """M~ and E on orthogonal ranges, E flat: its norms are those of the worst case."""
    d = 8
    Q = orthogonal(np.random.default_rng(0), d)
    t = np.where(np.arange(d) < flat, 0.3, 0.0)
    E, estimate = (Q * t) @ Q.T, (Q * np.where(t == 0, 5.0, 0.0)) @ Q.T
    difference = power_of(estimate, lam, p) - power_of(estimate + E, lam, p)
    norms = map(np.float64, (t.sum(), np.linalg.norm(t), 0.3, 0))
    bound = Certificate(*norms, d).inverse_bound(np.float64(lam), p)
    assert float(bound.spectral) == pytest.approx(np.linalg.norm(difference, 2), rel=1e-9)
    if flat == d or lam * _turn(p) >= 0.3:  # all equal; or eigenvalues u = sigma <= x_p and 0
        assert float(bound.frobenius) == pytest.approx(np.linalg.norm(difference), rel=1e-9)
    assert float(bound.frobenius) >= np.linalg.norm(difference) * (1 - 1e-9)


@POWERS
def test_the_worst_case_given_the_trace_alone_is_a_spectrum(p):
    """Eigenvalues x_p and 0, as many as the trace holds."""
    d, lam, count = 8, 0.25, 3
    t = np.where(np.arange(d) < count, _turn(p) * lam, 0.0)
    N = np.float64(t.sum())
    known = Certificate(N, N, N, np.float64(0), d)
    assert float(known.inverse_bound(np.float64(lam), p).frobenius) == pytest.approx(np.linalg.norm(f(t, lam, p)))


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("sketch", [rsvd, nystrom])
@POWERS
def test_the_relative_bound_holds_of_decompositions_and_continuations(kind, sketch, p):
    rng = np.random.default_rng(0)
    M = psd(rng, kind, 30)
    trace = np.asarray(np.trace(M))
    low = sketch(M, 8, oversampling=2, n_pwr_it=0, rng=rng)
    known = Certificate.of_decomposition(low, trace, np.linalg.norm(M))
    lam = np.asarray(0.1 * spectrum(kind, 30)[0])
    reference, _ = exact_inverse(M, lam=lam, power=p)
    for name in CONTINUATIONS:
        inverse = damped_inverse(low, lam=lam, continuation=name, trace=trace, power=p)
        tau = None if name == "none" else continuation_level(low, name, trace)
        bound = float(known.relative_inverse_bound(low, lam, tau, p))
        assert inverse_error(inverse, reference) <= bound + 1e-12


def test_the_relative_bound_is_tight_where_the_tail_is_flat():
    """All that is missing is one level: nothing but the denominator is lost."""
    w = np.array([1.0] * 3 + [0.01] * 7)
    low, lam = LowRank(np.eye(10, 3), w[:3]), np.asarray(0.1)
    known = Certificate.of_decomposition(low, np.asarray(w.sum()), np.linalg.norm(w))
    for p in (1.0, 0.5, 0.25):
        exact, _ = exact_inverse(np.diag(w), lam=lam, power=p)
        error = inverse_error(damped_inverse(low, lam=lam, continuation="none", power=p), exact)
        assert error <= float(known.relative_inverse_bound(low, lam, power=p)) <= 1.02 * error


def test_a_smaller_power_costs_less():
    M = psd(np.random.default_rng(0), "slow decay", 30)
    errors = []
    for p in (1.0, 0.5, 0.25):
        reference, lam = exact_inverse(M, phi=0.1, power=p)
        low = rsvd(M, 8, oversampling=4, n_pwr_it=2, rng=np.random.default_rng(0))
        errors.append(inverse_error(damped_inverse(low, lam=lam, continuation="min", power=p), reference))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
