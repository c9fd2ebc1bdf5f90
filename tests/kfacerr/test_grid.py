"""Steps in both eigenbases: those of dense matrices, for low rank, continued and complete representations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.damping import KINDS, Damping, Scale
from kfacerr.exceptions import InputError
from kfacerr.grid import Continued, damped_step, in_eigenbases, one_inverse
from kfacerr.inverse import Exact, damped_inverse, precondition
from kfacerr.lowrank import LowRank
from tests.strategies import SPECTRA, generators, orthogonal, psd, spectrum


def continued(rng, d: int, m: int, kind: str, tau: float) -> tuple[Continued, np.ndarray]:
    """A representation of m modes, one of them absent where m > 1, and the dense matrix."""
    Q, D = orthogonal(rng, d), spectrum(kind, m).copy()
    U = Q[:, :m].copy()
    if 1 < m < d:
        D[-1], U[:, -1] = 0, 0
    w = np.full(d, tau)
    w[:m] = np.where(D > 0, D, tau)
    return Continued(LowRank(U, D), tau), (Q * w) @ Q.T


def dense_step(J, M_G, M_A, damping, levels):
    (w_G, U_G), (w_A, U_A) = np.linalg.eigh(M_G), np.linalg.eigh(M_A)
    C = damping.grid(np.maximum(w_G, 0), np.maximum(w_A, 0), levels)
    return U_G @ (C * (U_G.T @ J @ U_A)) @ U_A.T


@given(
    generators,
    st.sampled_from(KINDS),
    st.sampled_from([k for k in SPECTRA if k != "graded"]),
    st.sampled_from([(1, 2), (3, 6), (4, 3), (4, 6)]),
    st.sampled_from([0.0, 0.3]),
)
def test_a_step_is_that_of_the_dense_matrices(rng, kind, spectral, ranks, tau):
    (G, M_G), (A, M_A) = (continued(rng, d, m, spectral, tau) for d, m in zip((4, 6), ranks, strict=True))
    damping, J = Damping(kind, 0.05), rng.standard_normal((4, 6))
    levels = damping.levels(Scale(6, 1.0, 2.0), Scale(4, 1.0, 1.5))
    got, expected = damped_step(J, G, A, damping, levels), dense_step(J, M_G, M_A, damping, levels)
    size = np.abs(damping.grid(np.zeros(1), np.zeros(1), levels)).max() + np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * size * np.linalg.norm(J))
    if kind != "product":
        one, other = one_inverse(G, damping, levels[1]), one_inverse(A, damping, levels[0])
        by_inverses = precondition(J, one, other)
        np.testing.assert_allclose(by_inverses, expected, rtol=0, atol=1e-12 * size * np.linalg.norm(J))


@given(generators, st.sampled_from([0.0, 0.2]))
def test_an_inverse_under_the_papers_damping_is_the_damped_inverse(rng, tau):
    X, _ = continued(rng, 6, 3, "slow decay", tau)
    continuation = (
        {"continuation": "none"}
        if tau == 0
        else {"continuation": "trace", "trace": np.asarray(X.lowrank.D.sum() + tau * 4)}
    )
    expected = damped_inverse(X.lowrank, lam=np.asarray(0.1), **continuation).dense()
    np.testing.assert_allclose(one_inverse(X, Damping("lam", 0.1), 0.1).dense(), expected, rtol=1e-12, atol=1e-12)


def test_a_unit_of_the_columns_is_not_seen():
    rng = np.random.default_rng(0)
    M_G, M_A, J = psd(rng, "slow decay", 4), psd(rng, "slow decay", 5), rng.standard_normal((4, 5))
    damping, unit = Damping("product", 0.1), 2.0**-8
    scaled = [Continued(Exact(M * unit**2), 0.0, unit**2) for M in (M_G, M_A)]
    expected = np.linalg.solve(np.kron(M_G, M_A) + 0.1 * np.eye(20), J.ravel()).reshape(J.shape)
    np.testing.assert_allclose(damped_step(J, *scaled, damping, (0.1, 0.1)), expected, rtol=1e-11)


def test_shapes_that_do_not_fit_are_refused():
    low = LowRank(np.eye(4)[:, :2], np.ones(2))
    for J, C in ((np.ones((4, 3)), np.ones((3, 3))), (np.ones((4, 4)), np.ones((2, 2)))):
        with pytest.raises(InputError, match=r"J \(4, 4\) and C \(3, 3\) are needed"):
            in_eigenbases(J, low, low, C)
    with pytest.raises(InputError, match="both factors"):
        one_inverse(Continued(low), Damping("product", 0.1), 0.1)
