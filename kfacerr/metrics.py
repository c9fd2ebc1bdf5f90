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

BLOCK = 256


def inverse_error(inverse: Inverse, reference: Inverse) -> float:
    """Metrics (1) and (2): ||M~^-1 - M_ref^-1||_F / ||M_ref^-1||_F.

    Both are symmetric: of each block of rows only what stands from the diagonal on is computed.
    """
    R = reference.dense()
    xp = namespace(R)
    d = R.shape[0]
    total = 0.0 * R[0, 0]
    for a in range(0, d, BLOCK):
        b = min(a + BLOCK, d)
        if isinstance(inverse, DampedInverse) and 2 * inverse.lowrank.m < d:
            block = _block(inverse, a, b)
            block -= R[a:b, a:]
        else:  # forming it once (it is kept) costs less than its rows anew at every update
            block = inverse.dense()[a:b, a:] - R[a:b, a:]
        total = total + xp.linalg.vector_norm(block[:, : b - a]) ** 2
        if b < d:
            total = total + 2 * xp.linalg.vector_norm(block[:, b - a :]) ** 2
    return float(total) ** 0.5 / float(xp.linalg.vector_norm(R))


def _block(inverse: DampedInverse, start: int, stop: int) -> Array:
    """Rows start:stop of U diag(h) U^T + shift I, from the diagonal on."""
    U = inverse.lowrank.U
    xp = namespace(U)
    block = (U[start:stop, :] * inverse.weights[None, :]) @ U[start:, :].T
    count = stop - start
    block[:, :count] += inverse.shift * xp.eye(count, dtype=block.dtype, device=compat.device(block))
    return block


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
