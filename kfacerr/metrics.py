"""The four error metrics of §4.2, each as a difference of what is compared, so that none cancels near zero.

Expanding |x - y|^2 would cost half of the digits; here the entries are subtracted first, in row blocks.
"""

import array_api_compat as compat

from .backend import namespace
from .inverse import DampedInverse, Inverse
from .stream import Array

__all__ = ["METRICS", "angle_error", "inverse_error", "norm_error"]

METRICS = ("inverse_A", "inverse_G", "step_norm", "step_angle")
"""Names of metrics (1)-(4) in every table."""

BLOCK = 1024


def inverse_error(inverse: Inverse, reference: Inverse) -> float:
    """Metrics (1) and (2): ||M~^-1 - M_ref^-1||_F / ||M_ref^-1||_F."""
    R = reference.dense()
    xp = namespace(R)
    total = 0.0
    for a in range(0, R.shape[0], BLOCK):
        b = min(a + BLOCK, R.shape[0])
        rows = R[a:b, :]
        if isinstance(inverse, DampedInverse) and 2 * inverse.lowrank.m < inverse.lowrank.d:
            block = _rows(inverse, a, b - a)
        else:  # forming it once (it is kept) costs less than its rows anew at every update
            block = inverse.dense()[a:b, :]
        total += float(xp.linalg.vector_norm(block - rows)) ** 2
    return total**0.5 / float(xp.linalg.vector_norm(R))


def _rows(inverse: DampedInverse, start: int, count: int) -> Array:
    """Rows start:start+count of U diag(h) U^T + shift I."""
    U = inverse.lowrank.U
    xp = namespace(U)
    rows = (U[start : start + count, :] * inverse.weights[None, :]) @ U.T
    identity = xp.eye(count, inverse.lowrank.d, k=start, dtype=rows.dtype, device=compat.device(rows))
    return rows + inverse.shift * identity


def norm_error(S: Array, reference: Array) -> float:
    """Metric (3): ||s~ - s_ref||_F / ||s_ref||_F; 0 if both steps vanish, inf if only the reference does."""
    xp = namespace(S, reference)
    difference, size = float(xp.linalg.vector_norm(S - reference)), float(xp.linalg.vector_norm(reference))
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def angle_error(S: Array, reference: Array) -> float:
    """Metric (4): 1 - cos(s~, s_ref) = |s~/|s~| - s_ref/|s_ref||^2 / 2; 0 if both vanish, 1 if one does."""
    xp = namespace(S, reference)
    size, reference_size = xp.linalg.vector_norm(S), xp.linalg.vector_norm(reference)
    if float(size) == 0 or float(reference_size) == 0:
        return 0.0 if float(size) == float(reference_size) else 1.0
    return float(xp.linalg.vector_norm(S / size - reference / reference_size)) ** 2 / 2
