"""Steps on the grid of products: a gradient in the eigenbases of both factors, each entry times its own number.

(Gamma^-1 J A^-1 under a separable damping is such a step, with C_ij = 1/((lambda_i + lam_G)(lambda_j + lam_A)).
Dampings of the products, C_ij = 1/(lambda_i lambda_j + lam), are no inverse of one factor; nor is EKFAC's
diagonal, `kfacerr.ekfac`.) Representations of low rank are continued, as in `kfacerr.inverse`: all directions that
one misses have the eigenvalue tau.
"""

from typing import NamedTuple

import array_api_compat as compat
import numpy as np

from .array import check_columns, device_array, to_numpy
from .damping import Damping
from .exceptions import InputError
from .inverse import DenseInverse
from .lowrank import LowRank
from .stream import Array

__all__ = ["Continued", "damped_step", "in_eigenbases", "one_inverse"]


class Continued(NamedTuple):
    """A representation and the eigenvalue of what it misses.

    Attributes:
        lowrank: with m modes.
        tau: level of the continuation.
        scale: what eigenvalues are divided by: the square of a factor's unit.
    """

    lowrank: LowRank
    tau: float = 0.0
    scale: float = 1.0

    @property
    def complete(self) -> bool:
        """Whether all d modes are present."""
        return bool(self.lowrank.modes == self.lowrank.d)

    @property
    def values(self) -> np.ndarray:
        """(m + 1,) the eigenvalues, tau where a mode is absent, and tau."""
        D = to_numpy(self.lowrank.D).astype(np.float64)
        return np.append(np.where(D > 0, D, self.tau), self.tau) / self.scale


def in_eigenbases(J: Array, G: LowRank, A: LowRank, C: np.ndarray) -> Array:
    """The gradient in both eigenbases, entry by entry times C, and back.

    With c = C[-1, -1] of the directions that both miss it is c J + U_G (...) + (...) U_A^T: three products with
    each basis, and none of d x d.

    Args:
        J: (d_G, d_A).
        G: with m_G modes.
        A: with m_A modes.
        C: (m_G + 1, m_A + 1), the last row and column for what G and A miss; zero where they miss nothing.

    Returns:
        (d_G, d_A).

    Raises:
        InputError: shapes that do not fit.
    """
    check_columns(J, G.d, "J")
    if J.shape[1] != A.d or C.shape != (G.m + 1, A.m + 1):
        raise InputError(
            f"J ({G.d}, {A.d}) and C ({G.m + 1}, {A.m + 1}) are needed, got {tuple(J.shape)} and {C.shape}"
        )
    rest = C[-1, -1]
    left, right = C[:-1, -1:] - rest, C[-1:, :-1] - rest
    both = C[:-1, :-1] - C[:-1, -1:] - C[-1:, :-1] + rest
    left, right, both = (device_array(part, J) for part in (left, right.T, both.T))
    by_G, by_A = G.project(J), A.project(J.T)  # (m_G, d_A), (m_A, d_G)
    inner = A.expand(both * A.project(by_G.T)).T
    return float(rest) * J + G.expand(left * by_G + inner) + A.expand(right * by_A).T


def damped_step(J: Array, G: Continued, A: Continued, damping: Damping, levels: tuple[float, float]) -> Array:
    """The step that a damping makes of a gradient.

    Args:
        J: (d_G, d_A).
        G: of Gamma.
        A: of A.
        damping: any.
        levels: its, of A and of G.

    Returns:
        (d_G, d_A).

    Raises:
        InputError: shapes that do not fit.
    """
    C = damping.grid(G.values, A.values, levels)
    if G.complete:
        C[-1, :] = 0
    if A.complete:
        C[:, -1] = 0
    return in_eigenbases(J, G.lowrank, A.lowrank, C)


def one_inverse(X: Continued, damping: Damping, level: float) -> DenseInverse:
    """One factor's inverse under a damping, as a matrix.

    Args:
        X: the factor.
        damping: any but "product".
        level: its lam, or its cut.

    Returns:
        (d, d).

    Raises:
        InputError: a grid of products has no inverse of one factor.
    """
    h = damping.inverse(X.values, level)
    rest = 0.0 if X.complete else float(h[-1])
    U = X.lowrank.U
    matrix = (U * device_array(h[:-1] - rest, U)[None, :]) @ U.T
    xp = compat.array_namespace(U)
    return DenseInverse(matrix + rest * xp.eye(X.lowrank.d, dtype=U.dtype, device=compat.device(U)))
