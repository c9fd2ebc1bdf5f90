"""Brand's update of a thin SVD under a low-rank addition: Algorithm 2 (SVD) and Algorithm 3 (symmetric).

Algorithm 3 is done in Gram form. With X = U diag(D) U^T and Y = [U diag(D)^(1/2), A], the updated matrix is
X + A A^T = Y Y^T, and with the EVD of the small Gram matrix K = Y^T Y = V diag(L) V^T its eigenvectors are
Y V diag(L)^(-1/2) with eigenvalues L. K needs only U^T A and A^T A, the same two products as the M_S of (7),
but no QR of tall columns, and only those eigenvectors are formed that a caller asks for.

Accuracy. K is graded: K = S R S with S = diag(|y_i|) and R of unit diagonal, and the products carry an error of
about eps in R, that is eps |S v|^2 along an eigenvector v. So whether a mode is there does not hang on L_i / L_1:
a tiny column orthogonal to all others survives, a column that lies in span(U) adds no mode. The EVD of K is in
float64, for the grading, and adds eps64 L_1 (for small L_i less: `_graded_evd`). The kept modes lose
orthonormality to (eps |S v_i|^2 + eps64 L_1) / L_i, though V diag(L)^(1/2) times its transpose still is K. Where
that is much above eps (columns nearly, but not quite, in the span of others; or strong grading) those modes are
formed and made orthonormal by their own, well-conditioned Gram matrix ("twice is enough"). `orthonormalised`
measures what is left on the carried modes, and does the same if rounding has added up over updates.

Speed. One update of a process is three products with tall matrices and the EVD of K: `carried` forms the r modes
that go on in their place beside the new columns, in one allocation, and the probes of their orthonormality ride
along in the products that form U and K, instead of reading U once more for each purpose.
"""

import functools
from typing import NamedTuple

import array_api_compat as compat
import numpy as np

from .array import check_columns, device_array, eigh_descending, eps, namespace, product_into, to_numpy
from .checks import instance, positive
from .exceptions import InputError
from .lowrank import LowRank, null_level, without_null
from .stream import Array

__all__ = ["Augmented", "brand", "carried", "orthonormalised", "symmetric_brand"]

DOUBT = 64
"""How many times eps the bound on a mode's loss of orthonormality may be before it is made orthonormal again."""

TOLERATED = 4 * DOUBT
"""How many times eps carried modes may be from orthonormal before they are made so again."""

NEARLY_DEPENDENT = 1e-2
"""Squared length below which a formed mode's direction repeats the others: a mode that rounding made."""


PROBES = 8
"""Random probes of orthonormality."""


LINE = 16
"""Rows of the carried columns take a multiple of so many numbers: whole cache lines, a tenth faster."""


class Augmented(NamedTuple):
    """A basis and new columns in one array, with their products: what `symmetric_brand` needs of both.

    Attributes:
        Y: (d, m + n) [U, A].
        products: (m + n, n) Y^T A.
    """

    Y: Array
    products: Array


def brand(U: Array, D: Array, V: Array, A: Array, B: Array) -> tuple[Array, Array, Array]:
    """Algorithm 2: the SVD of U diag(D) V^T + A B^T.

    Reads (7) as [U A] diag(D, I) [V B]^T and takes one Householder QR of each outer factor instead of a
    projection followed by a QR: the same matrices up to signs (footnote 5 allows any orthonormal basis), but
    orthonormal to rounding also for zero, repeated or in-span columns.

    Args:
        U: (m, r) orthonormal columns.
        D: (r,) singular values.
        V: (d, r) orthonormal columns.
        A: (m, n) columns.
        B: (d, n) columns.

    Returns:
        (m, q), (q,) descending and (d, q) with q = min(r + n, m, d).

    Raises:
        InputError: shapes, dtypes or backends do not fit.
    """
    xp = namespace(U, D, V, A, B)
    check_columns(A, U.shape[0], "A")
    check_columns(B, V.shape[0], "B")
    if A.shape[1] != B.shape[1]:
        raise InputError(f"A and B need as many columns, got {A.shape[1]} and {B.shape[1]}")
    QA, RA = xp.linalg.qr(xp.concat([U, A], axis=1))
    QB, RB = xp.linalg.qr(xp.concat([V, B], axis=1))
    scale = xp.concat([D, xp.ones_like(A[0, :])])
    UM, DM, VMt = xp.linalg.svd((RA * scale[None, :]) @ RB.T, full_matrices=False)
    return QA @ UM, DM, QB @ VMt.T


def symmetric_brand(
    X: LowRank | None, A: Array, augmented: Augmented | None = None, *, decay: float = 1.0
) -> LowRank:
    """Algorithm 3: the EVD of decay X + A A^T, exact.

    The decay is applied in float64. In float32 each would lose the same 3e-8 of what X holds, 3e-5 in 1000
    updates, and a burst that fades among the other modes takes their places too early.

    Args:
        X: (d, d) of rank r, or None for the zero matrix.
        A: (d, n) columns; n = 0 is allowed.
        augmented: X.U and A with their products, if the caller has it.
        decay: the weight of X.

    Returns:
        r + n modes (at most d), of which those that are numerically zero have D_i = 0. U is not formed yet; it is
        orthonormal to a small multiple of eps on the others.

    Raises:
        InputError: shapes, dtypes or backends do not fit, or NaN or Inf in the columns.
    """
    positive(decay, "the decay", or_zero=True)
    check_columns(A, None if X is None else instance(X, "X", LowRank).d)
    if X is None or X.m == 0:
        return _once_more(*_evd_of_gram(A, None, A.T @ A))
    xp = namespace(X.basis, A)
    D = decay * xp.astype(X.D, xp.float64)
    if X.m + A.shape[1] >= X.d:
        return _dense_evd(LowRank(X.U, xp.astype(D, A.dtype)).dense() + A @ A.T)
    Y, products = augmented or _augment(X.U, A)
    identity = xp.eye(X.m, dtype=A.dtype, device=compat.device(A))
    gram = xp.concat([xp.concat([identity, products[: X.m, :].T], axis=0), products], axis=1)
    scale = xp.concat([xp.sqrt(D), xp.astype(xp.ones_like(A[0, :]), xp.float64)])
    return _once_more(*_evd_of_gram(Y, scale, gram))


def _augment(U: Array, A: Array) -> Augmented:
    Y = namespace(U, A).concat([U, A], axis=1)
    return Augmented(Y, Y.T @ A)


def carried(X: LowRank, r: int, A: Array, weight: float = 1.0) -> tuple[LowRank, Augmented]:
    """`orthonormalised(X.truncate(r))`, and the same beside the columns weight A that are to be added to it.

    [U, weight A, U P] with probes P is one array, and so are its products with weight A and with U P.

    Args:
        X: the representation, (d, d).
        r: the rank to truncate to.
        A: (d, n).
        weight: of A, which is written to its place with it.

    Returns:
        The truncated representation, and [U, weight A] with its products.

    Raises:
        InputError: shapes, dtypes or backends do not fit.
    """
    check_columns(A, X.d)
    xp = namespace(X.basis, A)
    m, n = min(r, X.m), A.shape[1]
    D = X.D[:m]
    if m == 0:
        return LowRank(X.basis[:, :0], D), _augment(X.basis[:, :0], weight * A)
    width = -(-(m + n + PROBES) // LINE) * LINE
    together = xp.empty((X.d, width), dtype=A.dtype, device=compat.device(A))
    probes = _probes_on(D)
    if X.mix is None:
        together[:, :m] = X.basis[:, :m]
        product_into(together, m + n, together[:, :m], probes)
    else:  # [U, U P] in one product, and then U P goes where A leaves it room
        mix = X.mix[:, :m]
        product_into(together, 0, X.basis, xp.concat([mix, mix @ probes], axis=1))
        together[:, m + n : m + n + PROBES] = xp.asarray(together[:, m : m + PROBES], copy=True)
    together[:, m : m + n] = A
    together[:, m : m + n] *= weight
    together[:, m + n + PROBES :] = 0  # the padding: a checkpoint saves it with the rest
    U, Y = together[:, :m], together[:, : m + n]
    products = Y.T @ together[:, m : m + n + PROBES]
    if not _defect(products[:m, n:], probes, D) <= TOLERATED * eps(D):
        again = _made_orthonormal(LowRank(U, D))
        B = LowRank(again.U, again.D)
        return B, _augment(B.U, Y[:, m:])
    return LowRank(U, D), Augmented(Y, products[:, :n])


def orthonormalised(X: LowRank) -> LowRank:
    """X with U formed and orthonormal to a small multiple of eps, made so if it is not."""
    if X.m == 0:
        return LowRank(X.U, X.D)
    probes = _probes_on(X.D)
    if _defect(X.U.T @ (X.U @ probes), probes, X.D) <= TOLERATED * eps(X.D):
        return LowRank(X.U, X.D)
    again = _made_orthonormal(X)
    return LowRank(again.U, again.D)


def _evd_of_gram(Y: Array, scale: Array | None, gram: Array) -> tuple[LowRank, np.ndarray]:
    """The EVD of (Y S)(Y S)^T, S = diag(scale), from the small matrix `gram` = Y^T Y.

    Args:
        Y: (d, p).
        scale: (p,) float64, or None for ones.
        gram: (p, p).

    Returns:
        All modes, and (m,) booleans on the host: the modes that may have lost orthonormality.
    """
    xp = namespace(Y)
    if Y.shape[1] > Y.shape[0]:
        return _dense_evd(Y @ Y.T), np.zeros(Y.shape[0], dtype=bool)
    if Y.shape[1] == 0:
        return LowRank(Y, Y[0, :]), np.zeros(0, dtype=bool)
    s = xp.astype(xp.ones_like(Y[0, :]), xp.float64) if scale is None else scale
    K = s[:, None] * xp.astype(gram, xp.float64) * s[None, :]
    L, V = _graded_evd((K + K.T) / 2)
    # |S v|^2 with S = diag(|y_i|), see the module's docstring.
    graded = xp.sum(xp.linalg.diagonal(K)[:, None] * V**2, axis=0)
    p = Y.shape[1]
    unit = eps(L)
    kept = without_null(L, unit, p) > 2 * p**0.5 * eps(Y) * graded
    one = xp.ones_like(L)
    inverse_root = xp.where(kept, 1 / xp.sqrt(xp.where(kept, L, one)), 0 * one)
    L = xp.where(kept, L, 0 * one)
    mix = s[:, None] * V * inverse_root[None, :]
    top = xp.max(L) * one
    small = xp.minimum(xp.sqrt(L / xp.where(top > 0, top, one)) * unit**-0.25, one)  # `_graded_evd`
    loss = xp.maximum(eps(Y) * graded, unit * top * small)
    doubt = to_numpy(kept & (loss > DOUBT * eps(Y) * L))
    values = to_numpy(L)
    if (np.diff(values) > 0).any():  # a null mode stands before a tiny one that is real
        order = np.argsort(-values, stable=True)
        doubt, order = doubt[order], device_array(order, Y)
        L, mix = xp.take(L, order), xp.take(mix, order, axis=1)
    return LowRank(Y, xp.astype(L, Y.dtype), xp.astype(mix, Y.dtype)), doubt


def _graded_evd(K: Array) -> tuple[Array, Array]:
    """`eigh_descending` of a graded K (p, p), with small eigenvalues on their own scale.

    An EVD rounds all of them by u L_1, u = eps64. Where some are below s = u^(1/2) L_1, their eigenvectors V_t are
    off by u in the direction of the large ones. So T = V_t^T K V_t has lost u^2 L_1, and by the coupling that it
    leaves out u^2 L_1^2 / s = u^(3/2) L_1; it is rounded on its own scale, as V_t is small where K is large. Its
    EVD gives them anew. Nothing below `null_level` u L_1 is a mode, so once is enough. The coupling itself, u L_1,
    costs a small mode and a large one u L_1 / (L_i s)^(1/2) of their orthonormality.
    """
    xp = namespace(K)
    L, V = eigh_descending(K, "Brand update")
    unit = eps(L)
    split, size = unit**0.5 * L[0], xp.abs(L)
    if not bool(xp.any((size < split) & (size > null_level(K.shape[0]) * unit * L[0]))):
        return L, V
    first, last = (int(xp.sum(xp.astype(which, L.dtype))) for which in (L >= split, L > -split))
    Vt = V[:, first:last]
    T = Vt.T @ (K @ Vt)
    lower, P = eigh_descending((T + T.T) / 2, "Brand update")
    return xp.concat([L[:first], lower, L[last:]]), xp.concat([V[:, :first], Vt @ P, V[:, last:]], axis=1)


def _once_more(X: LowRank, doubt: np.ndarray) -> LowRank:
    """X with its modes in doubt formed, W = U[:, doubt], and U = [U[:, others], W] made orthonormal.

    Only the Gram matrix's rows of W are computed: the others are orthonormal already. The basis becomes [Y, W],
    since as a product Y mix a mode cannot be better than eps |S v_i| / L_i^(1/2).
    """
    if not doubt.any():
        return X
    xp = namespace(X.basis)
    sure, unsure = (device_array(np.flatnonzero(which), X.basis) for which in (~doubt, doubt))
    mix = xp.take(X.mix, sure, axis=1)
    W = X.basis @ xp.take(X.mix, unsure, axis=1)
    C = mix.T @ (X.basis.T @ W)
    eye = xp.eye(mix.shape[1], dtype=W.dtype, device=compat.device(W))
    gram = xp.concat([xp.concat([eye, C], axis=1), xp.concat([C.T, W.T @ W], axis=1)], axis=0)
    D = xp.concat([xp.take(X.D, sure), xp.take(X.D, unsure)])
    defect = xp.where((D > 0)[:, None], gram - xp.eye(X.m, dtype=W.dtype, device=compat.device(W)), 0 * gram)
    if float(xp.max(xp.abs(defect))) <= TOLERATED * eps(W):
        return X
    D, rotation = _orthonormalising(gram, D)
    return LowRank(
        xp.concat([X.basis, W], axis=1),
        D,
        xp.concat([mix @ rotation[: mix.shape[1], :], rotation[mix.shape[1] :, :]], axis=0),
    )


def _made_orthonormal(X: LowRank) -> LowRank:
    """X = U diag(D) U^T, U formed and nearly orthonormal, as the same matrix with U orthonormal to rounding."""
    D, rotation = _orthonormalising(X.U.T @ X.U, X.D)
    return LowRank(X.U, D, rotation)


def _orthonormalising(gram: Array, D: Array) -> tuple[Array, Array]:
    """(D', R) with U R orthonormal and (U R) diag(D') (U R)^T = U diag(D) U^T, for gram = U^T U near I.

    R = H P with H = gram^(-1/2) and P from the EVD of H^-1 diag(D) H^-1: orthogonal to rounding, however graded D
    is. Modes with D = 0 stay absent; at the eigenvalue -max(D) they do not mix with the small ones.

    In float32 R is rounded, and a column of it longer or shorter than it should be; D' makes up for that. Else a
    mode that hardly changes would be rounded alike at every update, and drift by 1e-7 each time.
    """
    xp = namespace(gram, D)
    values = xp.astype(D, xp.float64)
    eye = xp.eye(D.shape[0], dtype=xp.float64, device=compat.device(D))
    alive = (values > 0)[:, None] & (values > 0)[None, :]
    g, Q = eigh_descending(xp.where(alive, xp.astype(gram, xp.float64), eye), "Brand update")
    independent = g > NEARLY_DEPENDENT
    root = xp.sqrt(xp.where(independent, g, xp.ones_like(g)))
    absent = -xp.max(values)
    values = xp.where(values > 0, values, absent)
    half = (Q * xp.where(independent, root, 0 * root)[None, :]) @ Q.T  # symmetric, near I: K is graded as D is
    K = (half * values[None, :]) @ half + (Q * xp.where(independent, 0 * root, absent)[None, :]) @ Q.T
    w, P = _graded_evd((K + K.T) / 2)
    exact = (Q / root[None, :]) @ (Q.T @ P)
    R = xp.astype(exact, D.dtype)
    longer = xp.sum(xp.astype(R, xp.float64) ** 2, axis=0) / xp.sum(exact**2, axis=0)
    return xp.astype(without_null(w, eps(w), w.shape[0]) / longer, D.dtype), R


def _dense_evd(M: Array) -> LowRank:
    """All d modes of a dense matrix: used where r + n >= d and nothing is low-rank any more."""
    xp = namespace(M)
    w, V = eigh_descending(xp.astype(M, xp.float64), "Brand update")
    return LowRank(xp.astype(V, M.dtype), xp.astype(without_null(w, eps(M), w.shape[0]), M.dtype))


def _defect(products: Array, probes: Array, D: Array) -> float:
    """Estimates max_i |row i of U^T U - I|, an upper bound of its largest entry, over modes with D > 0.

    Args:
        products: (m, PROBES) U^T U P. Two thin products, where U^T U itself would cost as much as the update.
        probes: (m, PROBES) P.
        D: (m,) eigenvalues.
    """
    xp = namespace(products)
    rows = (products - probes) * xp.astype(D > 0, D.dtype)[:, None]
    return float(xp.max(xp.sqrt(xp.sum(rows**2, axis=1)))) / PROBES**0.5


def _probes_on(D: Array) -> Array:
    """Fixed random probes, zero on the modes that are absent."""
    return device_array(_probes(D.shape[0]), D) * namespace(D).astype(D > 0, D.dtype)[:, None]


@functools.lru_cache(maxsize=8)
def _probes(m: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((m, PROBES))
