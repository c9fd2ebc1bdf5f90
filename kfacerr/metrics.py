"""The four error metrics of §4.2, each as a difference of what is compared, so that none cancels near zero.

Expanding |x - y|^2 would cost half of the digits; here the entries are subtracted first, in row blocks.

All four are invariant to the scale of what is compared, which may be anything: 1/lam is 1e21 where the columns
are 1e-10. Where a plain sum of squares may leave the dtype's range it is taken of the entries times a power of 2.
"""

import math

import array_api_compat as compat
import numpy as np

from .array import namespace, sum_of_squares
from .inverse import DampedInverse, Inverse
from .stream import Array

__all__ = ["METRICS", "angle_error", "inverse_error", "norm_error", "step_coordinates"]

METRICS = ("inverse_A", "inverse_G", "step_norm", "step_angle")
"""Names of metrics (1)-(4) in every table."""

BLOCK = 256

_MENDED = np.errstate(over="ignore", invalid="ignore")  # what overflows is seen and taken again


@_MENDED
def inverse_error(inverse: Inverse, reference: Inverse) -> float:
    """Metrics (1) and (2): ||M~^-1 - M_ref^-1||_F / ||M_ref^-1||_F.

    Both are symmetric: of each block of columns only what stands from the diagonal on is computed.
    """
    R = reference.dense()
    size = _norm(R)
    error = _distance(inverse, R, 1.0)
    if not _in_range(error, R):
        unit = _power_of_2(max(size, float(inverse.shift) if isinstance(inverse, DampedInverse) else 0.0), R)
        error = _distance(inverse, R, unit) / unit
    return error / size


def _distance(inverse: Inverse, R: Array, unit: float) -> float:
    """unit ||M~^-1 - R||_F."""
    d = R.shape[0]
    total = sum_of_squares(R[:0, :])
    for a in range(0, d, BLOCK):
        b = min(a + BLOCK, d)
        if isinstance(inverse, DampedInverse) and 2 * inverse.lowrank.m < d:
            block = _block(inverse, a, b)
            block -= R[a:, a:b]
        else:  # forming it once (it is kept) costs less than its rows anew at every update
            block = inverse.dense()[a:, a:b] - R[a:, a:b]
        if unit != 1:
            block *= unit
        total = total + sum_of_squares(block[: b - a, :])
        if b < d:
            total = total + 2 * sum_of_squares(block[b - a :, :])
    return float(total) ** 0.5


def _block(inverse: DampedInverse, start: int, stop: int) -> Array:
    """Columns start:stop of U diag(h) U^T + shift I, from the diagonal on."""
    U = inverse.lowrank.U
    xp = namespace(U)
    count = stop - start
    block = U[start:, :] @ (U[start:stop, :] * inverse.weights[None, :]).T
    block[:count, :] += inverse.shift * xp.eye(count, dtype=block.dtype, device=compat.device(block))
    return block


def step_coordinates(P: Array, Q: Array, P_ref: Array, Q_ref: Array) -> tuple[Array, Array]:
    """S^T = Q P^T and S_ref^T = Q_ref P_ref^T in coordinates that keep norms and inner products.

    Both are (d_A, d_G), but their rows lie in a space of dimension 2n: in an orthonormal basis of it, from the QR
    [P_ref, P - P_ref] = Z [R, R'], they are Q (R + R')^T and Q_ref R^T, (d_A, 2n) each. Where P = P_ref and
    Q = Q_ref the two are the same to the bit.

    Args:
        P, P_ref: (d_G, n).
        Q, Q_ref: (d_A, n).

    Returns:
        (d_A, 2n) twice; the transposed steps themselves where 2n >= d_G.
    """
    xp = namespace(P, P_ref)
    n = P.shape[1]
    if 2 * n >= P.shape[0]:
        return Q @ P.T, Q_ref @ P_ref.T
    _, R = xp.linalg.qr(xp.concat([P_ref, P - P_ref], axis=1))
    return Q @ (R[:, :n] + R[:, n:]).T, Q_ref @ R[:, :n].T


@_MENDED
def norm_error(S: Array, reference: Array) -> float:
    """Metric (3): ||s~ - s_ref||_F / ||s_ref||_F; 0 if both steps vanish, inf if only the reference does."""
    namespace(S, reference)
    difference, size = _norm(S - reference), _norm(reference)
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


@_MENDED
def angle_error(S: Array, reference: Array) -> float:
    """Metric (4): 1 - cos(s~, s_ref) = |s~/|s~| - s_ref/|s_ref||^2 / 2; 0 if both vanish, 1 if one does."""
    namespace(S, reference)
    one, other = _direction(S), _direction(reference)
    if one is None or other is None:
        return 0.0 if one is other else 1.0
    return float(sum_of_squares(one - other)) / 2


def _direction(X: Array) -> Array | None:
    """X/||X||_F; None for X = 0."""
    xp = namespace(X)
    size = float(sum_of_squares(X)) ** 0.5
    if not _in_range(size, X):
        largest = float(xp.max(xp.abs(X)))
        if largest == 0:
            return None
        X = X * _power_of_2(largest, X)
        size = float(sum_of_squares(X)) ** 0.5
    return X / size


def _norm(X: Array) -> float:
    """||X||_F."""
    xp = namespace(X)
    size = float(sum_of_squares(X)) ** 0.5
    if _in_range(size, X):
        return size
    unit = _power_of_2(float(xp.max(xp.abs(X))), X)
    return float(sum_of_squares(X * unit)) ** 0.5 / unit


def _in_range(size: float, X: Array) -> bool:
    """Whether no square that counts can have left the range of X's dtype where the norm came out as `size`."""
    limits = namespace(X).finfo(X.dtype)
    return float(limits.smallest_normal) ** 0.25 < size < float(limits.max) ** 0.25


def _power_of_2(size: float, X: Array) -> float:
    """Near 1/size, but within the range of X's dtype; 1 where there is nothing to scale."""
    if not 0 < size < math.inf:
        return 1.0
    limit = int(0.9 * math.log2(float(namespace(X).finfo(X.dtype).max)))
    return 2.0 ** -min(max(math.frexp(size)[1], -limit), limit)
