"""The four error metrics of §4.2, each as a difference of what is compared, so that none cancels near zero.

Expanding |x - y|^2 would cost half of the digits; here the entries are subtracted first, in row blocks.

All four are invariant to the scale of what is compared, which may be anything: 1/lam is 1e21 where the columns
are 1e-10.
"""

import array_api_compat as compat

from .array import namespace, norm, upper_factor
from .exceptions import InputError
from .inverse import DampedInverse, Inverse, check_applies
from .stream import Array

__all__ = ["METRICS", "ROUNDING", "angle_error", "inverse_error", "norm_error", "step_coordinates"]

METRICS = ("inverse_A", "inverse_G", "step_norm", "step_angle")
"""Names of metrics (1)-(4) in every table."""

ROUNDING = 1e-9
"""Errors below are rounding: float64 leaves 1e-14, float32 1e-7 squared in the angle."""

BLOCK = 256


def inverse_error(inverse: Inverse, reference: Inverse) -> float:
    """Metrics (1) and (2): ||M~^-1 - M_ref^-1||_F / ||M_ref^-1||_F.

    Both are symmetric: of each block of rows only what stands from the diagonal on is computed.
    """
    check_applies(inverse)
    check_applies(reference, inverse.d)
    R = reference.dense()
    xp = namespace(R)
    d = R.shape[0]
    norms = []
    for a in range(0, d, BLOCK):
        b = min(a + BLOCK, d)
        if isinstance(inverse, DampedInverse) and 2 * inverse.lowrank.m < d:
            block = _block(inverse, a, b)
            block -= R[a:b, a:]
        else:  # forming it once (it is kept) costs less than its rows anew at every update
            block = inverse.dense()[a:b, a:] - R[a:b, a:]
        norms += [norm(block[:, : b - a]), 2**0.5 * norm(block[:, b - a :])]
    return float(norm(xp.stack(norms))) / float(norm(R))


def _block(inverse: DampedInverse, start: int, stop: int) -> Array:
    """Rows start:stop of U diag(h) U^T + shift I, from the diagonal on."""
    U = inverse.lowrank.U
    xp = namespace(U)
    block = (U[start:stop, :] * inverse.weights[None, :]) @ U[start:, :].T
    count = stop - start
    block[:, :count] += inverse.shift * xp.eye(count, dtype=block.dtype, device=compat.device(block))
    return block


def _check_alike(S: Array, reference: Array) -> None:
    namespace(S, reference)
    if S.shape != reference.shape:
        raise InputError(f"steps of one shape are needed, got {tuple(S.shape)} and {tuple(reference.shape)}")


def step_coordinates(P: Array, Q: Array, P_ref: Array, Q_ref: Array) -> tuple[Array, Array]:
    """S^T = Q P^T and S_ref^T = Q_ref P_ref^T in coordinates that keep norms and inner products.

    Both are (d_A, d_G), but their rows lie in a space of dimension 2n: in an orthonormal basis of it, from the QR
    [P_ref, P - P_ref] = Z [R, R'], they are Q (R + R')^T and Q_ref R^T, (d_A, 2n) each. Where P = P_ref and
    Q = Q_ref the two are the same to the bit.

    Args:
        P: (d_G, n).
        Q: (d_A, n).
        P_ref: (d_G, n).
        Q_ref: (d_A, n).

    Returns:
        (d_A, 2n) twice; the transposed steps themselves where 2n >= d_G.
    """
    xp = namespace(P, P_ref)
    n = P.shape[1]
    if 2 * n >= P.shape[0]:
        return Q @ P.T, Q_ref @ P_ref.T
    R = upper_factor(xp.concat([P_ref, P - P_ref], axis=1))
    return Q @ (R[:, :n] + R[:, n:]).T, Q_ref @ R[:, :n].T


def norm_error(S: Array, reference: Array) -> float:
    """Metric (3): ||s~ - s_ref||_F / ||s_ref||_F; 0 if both steps vanish, inf if only the reference does."""
    _check_alike(S, reference)
    difference, size = float(norm(S - reference)), float(norm(reference))
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def angle_error(S: Array, reference: Array) -> float:
    """Metric (4): 1 - cos(s~, s_ref) = |s~/|s~| - s_ref/|s_ref||^2 / 2; 0 if both vanish, 1 if one does."""
    _check_alike(S, reference)
    size, other = norm(S), norm(reference)
    if size == 0 or other == 0:
        return 0.0 if size == other else 1.0
    return float(norm(S / size - reference / other)) ** 2 / 2
