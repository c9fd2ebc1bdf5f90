"""The empirical Fisher block of a fully connected layer from the columns of its steps, and its EKFAC diagonal.

Column i of A_k and of G_k is [a_i; 1]/sqrt(n) and sqrt(n) dLoss/do_i (`kfacerr.stream`): example i's own gradient
is n G_i A_i^T. Averaged over the batch, and over the steps as (8) averages the factors,

    F_k = rho F_{k-1} + (1 - rho) n sum_i vec(G_i A_i^T) vec(G_i A_i^T)^T,    F_0 likewise without 1 - rho,

which is sum_t w_t vec(G_t A_t^T) vec(G_t A_t^T)^T over all columns t of all steps. K-FAC's A (x) Gamma is a model
of it; EKFAC (George et al. 2018) is its diagonal in K-FAC's eigenbasis, U diag(S) U^T with

    S_ij = u_ij^T F u_ij = sum_t w_t (U_G^T G_t)_i^2 (U_A^T A_t)_j^2,    u_ij = vec(U_G[:, i] U_A[:, j]^T),

of all diagonals the one nearest to F in the Frobenius norm. Both need the columns alone, F itself is never formed:
with V (d_A d_G, N) of the columns sqrt(w_t) vec(G_t A_t^T), V^T V = (A^T A) o (G^T G) up to the weights, and

    (F + lam I)^-1 g = (g - V (lam I + V^T V)^-1 V^T g)/lam    (Woodbury; SENG's direction, over all steps).

Convolutions are not covered: an example's gradient there is a sum over positions.
"""

import numpy as np
import scipy.linalg

from .array import add_to_diagonal, check_columns
from .checks import positive
from .ea import check_rho
from .exceptions import InputError

__all__ = ["DampedFisher", "ExampleFisher"]

NEGLIGIBLE = 1e-8
"""Columns of less weight than this share of the newest ones' are dropped: F loses a p.s.d. part, as small."""


class ExampleFisher:
    """F_k by the columns that it is of, NumPy arrays.

    Args:
        rho: EA decay.

    Attributes:
        A: (d_A, N) columns of all steps that count.
        G: (d_G, N) likewise.
        weights: (N,), those of `A` and `G`.

    Raises:
        InputError: rho is no decay.
    """

    def __init__(self, rho: float) -> None:
        check_rho(rho)
        self.rho = rho
        self.A: np.ndarray = np.empty((0, 0))
        self.G: np.ndarray = np.empty((0, 0))
        self.weights: np.ndarray = np.empty(0)
        self._gram: np.ndarray = np.empty((0, 0))  # of the first columns

    def __repr__(self) -> str:
        return f"<kfacerr ExampleFisher: {self.G.shape[0]} x {self.A.shape[0]}, {len(self.weights)} columns>"

    def update(self, A: np.ndarray, G: np.ndarray) -> None:
        """Takes the columns of one step.

        Args:
            A: (d_A, n), n the batch's size: one column an example.
            G: (d_G, n).

        Raises:
            InputError: no columns of examples, or of other dimensions than before.
        """
        n, first = _examples(A, G), not len(self.weights)
        if first:
            self.A, self.G = A[:, :0], G[:, :0]
        check_columns(A, self.A.shape[0], "A")
        check_columns(G, self.G.shape[0], "G")
        old = self.weights * self.rho
        weights = np.concatenate([old, np.full(n, n * (1.0 if first else 1 - self.rho))])
        kept = weights >= NEGLIGIBLE * weights[-1]
        if not kept.all():
            known = kept[: len(self._gram)]
            self._gram = self._gram[np.ix_(known, known)]
        self.weights = weights[kept]
        self.A, self.G = (np.concatenate([X, new], axis=1)[:, kept] for X, new in ((self.A, A), (self.G, G)))

    def diagonal(self, U_G: np.ndarray, U_A: np.ndarray) -> np.ndarray:
        """EKFAC's S (d_G, d_A) in the bases U_G (d_G, d_G) and U_A (d_A, d_A); sum S = tr F."""
        return np.asarray(((U_G.T @ self.G) ** 2 * self.weights) @ ((U_A.T @ self.A) ** 2).T)

    def gram(self) -> np.ndarray:
        """(A^T A) o (G^T G), (N, N): V^T V without the weights; what new columns add is computed."""
        known, count = len(self._gram), len(self.weights)
        if known < count:
            gram = np.empty((count, count))
            gram[:known, :known] = self._gram
            gram[:, known:] = (self.A.T @ self.A[:, known:]) * (self.G.T @ self.G[:, known:])
            gram[known:, :known] = gram[:known, known:].T
            self._gram = gram
        return self._gram


class DampedFisher:
    """(F + lam I)^-1 by the Cholesky factor of lam I + V^T V (N, N).

    Args:
        fisher: F; what it takes afterwards does not count.
        lam: damping, positive.

    Raises:
        InputError: lam is not positive or below the rounding of F, or no columns came in yet.
    """

    def __init__(self, fisher: ExampleFisher, lam: float) -> None:
        if not len(fisher.weights):
            raise InputError("no columns came in yet: there is no Fisher to invert")
        self.lam = positive(lam, "the damping lam")
        self._A, self._G, self._root = fisher.A, fisher.G, np.sqrt(fisher.weights)
        K = fisher.gram() * self._root  # a copy
        K *= self._root[:, None]
        add_to_diagonal(K, np.asarray(self.lam))
        try:  # K is symmetric: its rows are the columns that LAPACK works on
            self._factor = scipy.linalg.cho_factor(K.T, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            raise InputError(f"F + lam I is not positive definite: lam = {self.lam:g} is below rounding") from None

    def solve(self, A: np.ndarray, G: np.ndarray) -> np.ndarray:
        """The natural gradient of g = vec(G A^T).

        Args:
            A: (d_A, n) columns of the gradient.
            G: (d_G, n).

        Returns:
            (d_G, d_A).

        Raises:
            InputError: columns that do not fit.
        """
        _examples(A, G)
        check_columns(A, self._A.shape[0], "A")
        check_columns(G, self._G.shape[0], "G")
        by_columns = self._root * np.einsum("tj,tj->t", self._G.T @ G, self._A.T @ A)  # V^T g
        solved = scipy.linalg.cho_solve(self._factor, by_columns, check_finite=False)
        return np.asarray((G @ A.T - (self._G * (self._root * solved)) @ self._A.T) / self.lam)


def _examples(A: np.ndarray, G: np.ndarray) -> int:
    """How many columns both have."""
    for X, what in ((A, "A"), (G, "G")):
        if not isinstance(X, np.ndarray):
            raise InputError(f"{what}: a NumPy array is needed, got {type(X).__name__}")
        check_columns(X, what=what)
        if not np.isfinite(X).all():
            raise InputError(f"{what}: NaN or Inf in the columns")
    if A.shape[1] != G.shape[1] or not A.shape[1]:
        raise InputError(f"A and G need as many columns, at least one, got {A.shape[1]} and {G.shape[1]}")
    return A.shape[1]
