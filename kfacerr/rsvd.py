"""Decompositions of a dense EA factor M: exact EVD (K-FAC), randomised SVD (RS-KFAC), EVD (SRE-KFAC), Nyström.

Halko, Martinsson & Tropp, SIAM Review 53 (2011), for a symmetric p.s.d. M: the range finder is
Q = orth(M^(q+1) W) with W Gaussian of r + r_o columns and q power iterations, orthonormalised in between.
M being symmetric, one power iteration is one product with M.
"""

import numpy as np

from .array import check_square, eigh_descending, eps, namespace, normal
from .checks import choice, instance, whole
from .lowrank import LowRank, without_null
from .stream import Array

__all__ = ["SKETCHES", "check_sketch", "evd", "nystrom", "nystrom_on", "rsvd", "srevd"]


def evd(M: Array, r: int | None = None) -> LowRank:
    """The exact EVD of M (d, d) symmetric p.s.d., truncated to r modes if r is given. Cubic in d."""
    w, V = eigh_descending(M, "EA factor")
    return LowRank(V, without_null(w, eps(w), M.shape[0])).truncate(M.shape[0] if r is None else r)


def rsvd(M: Array, r: int, *, oversampling: int, n_pwr_it: int, rng: np.random.Generator) -> LowRank:
    """RS-KFAC: V diag(S) V^T from the SVD of Q^T M = W diag(S) V^T, truncated to r (Algorithm 1 l.13).

    The right singular vectors are used on both sides, as Algorithm 1 l.16-17 do. Before truncation this is
    (M Q Q^T M)^(1/2), and M Q Q^T M <= M^2 with the operator monotone square root gives M~ <= M: unlike
    Q Q^T M Q Q^T, the RS estimate keeps M - M~ p.s.d. also with a finite projection error.

    Args:
        M: (d, d) symmetric p.s.d.
        r: target rank.
        oversampling: r_o, extra columns of the sketch.
        n_pwr_it: power iterations q.
        rng: where the Gaussian sketch comes from.

    Returns:
        min(r, d) modes; exact if r + r_o >= d.
    """
    if _covers(M, r, oversampling, n_pwr_it, rng):
        return evd(M, r)
    xp = namespace(M)
    Q = _range(M, r + oversampling, n_pwr_it, rng)
    # SVD of the tall M Q through its QR: a Gram matrix would square the singular values.
    QZ, RZ = xp.linalg.qr(M @ Q)
    U, S, _ = xp.linalg.svd(RZ, full_matrices=False)
    return LowRank(QZ @ U[:, :r], without_null(S[:r], eps(S), M.shape[0]))


def srevd(M: Array, r: int, *, oversampling: int, n_pwr_it: int, rng: np.random.Generator) -> LowRank:
    """SRE-KFAC: the EVD of Q^T M Q, so that M~ = Q Q^T M Q Q^T truncated to r. Arguments as for `rsvd`.

    With a finite projection error M - M~ is not p.s.d. in general.
    """
    if _covers(M, r, oversampling, n_pwr_it, rng):
        return evd(M, r)
    Q = _range(M, r + oversampling, n_pwr_it, rng)
    C = Q.T @ (M @ Q)
    w, V = eigh_descending((C + C.T) / 2, "EA factor")
    return LowRank(Q @ V[:, :r], without_null(w[:r], eps(w), M.shape[0]))


def nystrom(M: Array, r: int, *, oversampling: int, n_pwr_it: int, rng: np.random.Generator) -> LowRank:
    """Nyström, (M Q)(Q^T M Q)^+ (M Q)^T truncated to r (Tropp et al. 2017, Algorithm 3). Arguments as for `rsvd`.

    M~ <= M, and at the cost of RS it is never worse: `kfacerr.certificate` has both proofs.
    """
    if _covers(M, r, oversampling, n_pwr_it, rng):
        return evd(M, r)
    return nystrom_on(M, _range(M, r + oversampling, n_pwr_it, rng), r)


def nystrom_on(M: Array, Q: Array, r: int) -> LowRank:
    """`nystrom` from one product of M (d, d) with Q (d, s) of orthonormal columns, truncated to r <= s.

    Tropp et al. add nu I to M, factor Q^T M Q + nu I by Cholesky and take nu off the eigenvalues at the end. Here
    the eigenvalues of C = Q^T M Q are raised to at least nu instead. The inverse of a larger C is smaller, so that
    this cannot break M~ <= M either; nothing can fail, and the eigenvalues above nu are as they are. (A stream's
    sketch never has M, and C there is graded: `kfacerr.sketching`.)
    """
    xp = namespace(M, Q)
    Y = M @ Q
    C = Q.T @ Y
    w, V = eigh_descending((C + C.T) / 2, "EA factor")
    floor = M.shape[0] ** 0.5 * eps(M) * w[0]
    w = xp.maximum(w, floor * xp.ones_like(w))
    w = xp.where(w > 0, w, xp.ones_like(w))  # M = 0
    # M~ = F F^T. Through a QR, not a Gram matrix, for the sake of the small eigenvalues.
    QF, RF = xp.linalg.qr((Y @ V) / xp.sqrt(w)[None, :])
    U, S, _ = xp.linalg.svd(RF, full_matrices=False)
    return LowRank(QF @ U[:, :r], without_null(S[:r] ** 2, eps(S), M.shape[0]))


SKETCHES = {"rs": rsvd, "sre": srevd, "nystrom": nystrom}
"""The three by the name of the setting `sketch`."""


def check_sketch(sketch: str) -> None:
    """Refuses what is none of `SKETCHES`."""
    choice(sketch, "sketch", SKETCHES)


def _covers(M: Array, r: int, oversampling: int, n_pwr_it: int, rng: np.random.Generator) -> bool:
    """Whether the sketch would be as wide as M; refuses what is no argument."""
    check_square(M, "EA factor")
    whole(r, "the rank r", 1)
    whole(oversampling, "oversampling")
    whole(n_pwr_it, "n_pwr_it")
    instance(rng, "rng", np.random.Generator)
    return r + oversampling >= M.shape[0]


def _range(M: Array, columns: int, n_pwr_it: int, rng: np.random.Generator) -> Array:
    """(d, columns) orthonormal basis of M^(q+1) W."""
    xp = namespace(M)
    Y = normal(rng, (M.shape[0], columns), M)
    for _ in range(n_pwr_it + 1):
        Y, _ = xp.linalg.qr(M @ Y)
    return Y
