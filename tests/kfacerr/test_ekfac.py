"""The empirical Fisher of a layer from columns: what is dense is the same, and what EKFAC is best at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.ea import EAFactor
from kfacerr.ekfac import NEGLIGIBLE, DampedFisher, ExampleFisher
from tests import bad
from tests.bad import assert_refuses
from tests.strategies import generators, orthogonal, rhos, stream


def layer(rng, *, d_A=5, d_G=4, n=3, steps=4):
    return list(
        zip(
            stream(rng, d=d_A, n=n, steps=steps, kinds=("plain", "repeated", "zero"), decay="slow decay"),
            stream(rng, d=d_G, n=n, steps=steps, kinds=("plain", "in span"), decay="fast decay"),
            strict=True,
        )
    )


def followed(steps, rho) -> ExampleFisher:
    fisher = ExampleFisher(rho)
    for A, G in steps:
        fisher.update(A, G)
    return fisher


def dense(steps, rho) -> np.ndarray:
    """(8) of the Fisher as the docstring has it: example i's own gradient is n G_i A_i^T."""
    F = None
    for A, G in steps:
        n = A.shape[1]
        own = [(n * np.outer(G[:, i], A[:, i])).ravel() for i in range(n)]
        new = sum(np.outer(g, g) for g in own) / n
        F = new if F is None else rho * F + (1 - rho) * new
    return F


def factors(steps, rho) -> tuple[np.ndarray, np.ndarray]:
    A, G = EAFactor(rho), EAFactor(rho)
    for a, g in steps:
        A.update(a)
        G.update(g)
    return A.M, G.M


@given(generators, rhos, st.sampled_from([1e-3, 0.1, 1.0]))
def test_the_natural_gradient_is_that_of_the_dense_fisher(rng, rho, lam):
    steps = layer(rng)
    A, G = rng.standard_normal((5, 3)), rng.standard_normal((4, 3))
    F, J = dense(steps, rho), G @ A.T
    expected = np.linalg.solve(F + lam * np.eye(len(F)), J.ravel()).reshape(J.shape)
    got = DampedFisher(followed(steps, rho), lam).solve(A, G)
    condition = 1 + np.linalg.norm(F, 2) / lam
    assert np.linalg.norm(got - expected) <= 100 * np.finfo(float).eps * condition * np.linalg.norm(expected)


@given(generators, rhos)
def test_the_diagonal_is_that_of_the_dense_fisher_and_of_all_the_nearest(rng, rho):
    steps = layer(rng)
    U_A, U_G = orthogonal(rng, 5), orthogonal(rng, 4)
    F, Q = dense(steps, rho), np.kron(U_G, U_A)
    S = followed(steps, rho).diagonal(U_G, U_A)
    np.testing.assert_allclose(S.ravel(), np.diagonal(Q.T @ F @ Q), rtol=1e-12, atol=1e-12 * np.trace(F))
    assert S.sum() == pytest.approx(np.trace(F), rel=1e-12)

    def off(s):
        return np.linalg.norm(F - (Q * s.ravel()) @ Q.T)

    A, G = factors(steps, rho)
    w_A, w_G = np.diagonal(U_A.T @ A @ U_A), np.diagonal(U_G.T @ G @ U_G)
    assert off(S) <= off(np.outer(w_G, w_A)) + 1e-12 * np.trace(F)  # K-FAC's, in any basis
    assert off(S) <= off(S + 0.1 * np.trace(F) * rng.standard_normal(S.shape))


@given(generators, rhos)
def test_where_inputs_and_gradients_are_independent_kfac_is_the_fisher(rng, rho):
    """Every pair of some a's and some g's, as often: E[aa^T (x) gg^T] is the product of the means."""
    a, g = rng.standard_normal((5, 3)), rng.standard_normal((4, 2))
    pairs = [(i, j) for i in range(3) for j in range(2)]
    n = len(pairs)
    A = np.stack([a[:, i] for i, _ in pairs], axis=1) / n**0.5
    G = np.stack([g[:, j] for _, j in pairs], axis=1) / n**0.5
    steps = [(A, G)] * 3
    M_A, M_G = factors(steps, rho)
    F = dense(steps, rho)
    np.testing.assert_allclose(F, np.kron(M_G, M_A), atol=1e-13 * np.trace(F))
    (w_A, U_A), (w_G, U_G) = np.linalg.eigh(M_A), np.linalg.eigh(M_G)
    S = followed(steps, rho).diagonal(U_G, U_A)
    np.testing.assert_allclose(S, np.outer(w_G, w_A), atol=1e-13 * np.trace(F))


def test_columns_that_weigh_nothing_are_dropped():
    rng = np.random.default_rng(0)
    steps = layer(rng, steps=40)
    fisher = followed(steps, 0.5)
    assert len(fisher.weights) == fisher.A.shape[1] == fisher.G.shape[1] == 3 * 27  # 2^-26 is above, 2^-27 below
    F, V = dense(steps, 0.5), np.einsum("it,jt->ijt", fisher.G, fisher.A).reshape(20, -1)
    kept = (V * fisher.weights) @ V.T
    lost = np.linalg.eigvalsh(F - kept)
    assert lost[0] > -1e-12 * np.trace(F) and lost.sum() < 10 * NEGLIGIBLE * np.trace(F)


@pytest.mark.parametrize("rho", [0.01, 0.5, 0.9])
def test_a_gram_matrix_is_that_of_the_columns_that_are_kept(rho):
    """Asked for at some updates and not at others, while columns are dropped."""
    fisher = ExampleFisher(rho)
    for k, (A, G) in enumerate(layer(np.random.default_rng(4), steps=30)):
        fisher.update(A, G)
        if k % 3 != 1:
            expected = (fisher.A.T @ fisher.A) * (fisher.G.T @ fisher.G)
            np.testing.assert_allclose(fisher.gram(), expected, rtol=1e-12, atol=1e-14 * expected.max())


def test_batches_may_differ_in_size():
    rng = np.random.default_rng(1)
    steps = layer(rng, n=3) + layer(rng, n=2)
    F, Q = dense(steps, 0.9), np.eye(20)
    S = followed(steps, 0.9).diagonal(np.eye(4), np.eye(5))
    np.testing.assert_allclose(S.ravel(), np.diagonal(Q.T @ F @ Q), rtol=1e-12)


def test_what_is_taken_later_does_not_count():
    rng = np.random.default_rng(2)
    (first, second) = layer(rng, steps=2)
    fisher = followed([first], 0.9)
    inverse = DampedFisher(fisher, 0.1)
    before = inverse.solve(*first)
    fisher.update(*second)
    np.testing.assert_array_equal(inverse.solve(*first), before)


def test_bad_input_is_refused_in_one_line():
    A, G = layer(np.random.default_rng(3), steps=1)[0]
    assert_refuses(ExampleFisher, {"rho": 0.9}, {"rho": bad.NO_DECAY})
    fisher = followed([(A, G)], 0.9)
    wrong = {"A": (*bad.no_matrix(A), A[:4], A[:, :2], A[:, :0]), "G": (*bad.no_matrix(G), G[:3], G[:, :2])}
    assert_refuses(fisher.update, {"A": A, "G": G}, wrong)
    assert_refuses(DampedFisher, {"fisher": fisher, "lam": 0.1}, {"lam": bad.NOT_POSITIVE})
    assert_refuses(DampedFisher(fisher, 0.1).solve, {"A": A, "G": G}, wrong)
    assert_refuses(DampedFisher, {"fisher": fisher, "lam": 0.1}, {"fisher": [ExampleFisher(0.9)]})
    assert_refuses(DampedFisher, {"fisher": fisher, "lam": 0.1}, {"lam": [1e-300]})
