"""Nyström: what a sketch Y = M Omega sees of a symmetric p.s.d. matrix M.

    N = Y C^+ Y^T,  C = Omega^T Y,  0 <= N <= M.

With R = M^(1/2) Omega it is N = M^(1/2) P M^(1/2), P = R (R^T R)^+ R^T the orthogonal projector on the range of R,
and P <= I. N depends on the range of Omega alone, N Omega = Y, and of all p.s.d. matrices with that product N is
the least (docs/mathematics/streaming.md). Tropp, Yurtsever, Udell & Cevher (2017), Algorithm 3.

**Rounding.** Y and C are sums over columns X of M = sum X X^T, so their errors are graded as C is: about eps
(C_ii C_jj)^(1/2) in C_ij, and eps (||M|| C_jj)^(1/2) in column j of Y. So C + SHIFT eps diag(C) stands for C. It
is at least C, and the inverse of a larger matrix is smaller: M~ <= N <= M stays true. It has a Cholesky factor,
also where columns of Omega are zero, alike, or see nothing. A column that sees 1e-9 of M sees it to as many
digits as one that sees all. M~ loses SHIFT eps tr M at most, and rounding of Y adds eps ||M||/SHIFT along a
direction that sees nothing. Tropp et al. shift M by a multiple of I and take that off the eigenvalues at the
end, which is not graded and does not keep the order. All s x s matrices are in float64, whatever the dtype.
"""

import array_api_compat as compat
import numpy as np

from .array import eps, namespace, normal
from .brand import symmetric_brand
from .lowrank import LowRank
from .stream import Array

__all__ = ["nystrom_of", "with_fresh"]

SHIFT = 8
"""How many times eps the diagonal of C is raised by, relative to itself."""

FLOAT64 = float(np.finfo(np.float64).eps)


def nystrom_of(Y: Array, C: Array) -> LowRank:
    """The EVD of Y C^+ Y^T as F F^T, F = Y S L^-T with S = diag(C)^(-1/2) and S C S + shift I = L L^T.

    Args:
        Y: (d, s) M Omega, s <= d.
        C: (s, s) Omega^T M Omega, in Y's dtype or in float64.

    Returns:
        s modes; U is not formed yet (see `kfacerr.brand.symmetric_brand`).

    Raises:
        InputError: NaN or Inf.
    """
    xp = namespace(Y)
    s = Y.shape[1]
    C = xp.astype(C, xp.float64)
    diagonal = xp.linalg.diagonal(C)
    seen = diagonal > 0  # a column of Omega that sees nothing of M has a zero column in Y
    scale = xp.where(seen, 1 / xp.sqrt(xp.where(seen, diagonal, xp.ones_like(diagonal))), xp.zeros_like(diagonal))
    # Cholesky of a matrix of order s and unit diagonal rounds by about s eps at most (Higham 2002, Theorem 10.7).
    shift = SHIFT * eps(Y) + 2 * s * FLOAT64 + xp.astype(~seen, xp.float64)
    identity = xp.eye(s, dtype=xp.float64, device=compat.device(Y))
    L = xp.linalg.cholesky(scale[:, None] * (C + C.T) / 2 * scale[None, :] + shift[:, None] * identity)
    T = scale[:, None] * xp.linalg.inv(L).T
    return symmetric_brand(None, Y @ xp.astype(T, Y.dtype))


def with_fresh(U: Array, count: int, rng: np.random.Generator) -> Array:
    """U beside Gaussian columns made orthonormal, to U also: (d, count).

    What a sketch sees depends on their range alone. Being orthonormal they lose nothing to rounding where count is
    near d, and orthogonal to U they see what U does not.

    Args:
        U: (d, m) orthonormal columns, m <= count <= d.
        count: of all columns.
        rng: the random source.

    Returns:
        (d, count) of orthonormal columns, the first of them U's.
    """
    xp = namespace(U)
    G = normal(rng, (U.shape[0], count - U.shape[1]), U)
    for _ in range(2):  # twice is enough
        G, _ = xp.linalg.qr(G - U @ (U.T @ G))
    return xp.concat([U, G], axis=1)
