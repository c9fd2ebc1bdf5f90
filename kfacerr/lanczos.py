"""The largest eigenvalue of an EA factor without an EVD."""

import numpy as np
import scipy.linalg

from .array import device_array, eps, namespace, norm
from .exceptions import InputError
from .stream import Array

__all__ = ["lambda_max"]


def lambda_max(M: Array) -> float:
    """Largest eigenvalue of a symmetric p.s.d. M (d, d) by Lanczos with full reorthogonalisation.

    Stops at a Ritz residual of 1e3 eps theta (float64; 3e-6 theta in float32). The eigenvalue's error is never
    more than the residual, also in a cluster; where there is a gap it is the residual's square over the gap.

    Args:
        M: (d, d).

    Returns:
        The eigenvalue.

    Raises:
        InputError: M has NaN or Inf.
    """
    xp = namespace(M)
    d = M.shape[0]
    start = np.random.default_rng(0).standard_normal(d)
    v = V = device_array(start[:, None] / np.linalg.norm(start), M)
    alphas: list[float] = []
    betas: list[float] = []
    tolerance = min(1e3 * eps(M), 1e-2 * eps(M) ** 0.5)
    for j in range(d):
        w = (
            M @ v
        )  # v by itself, not as a column of V: a product with one that lies apart takes three times as long
        alphas.append(float((v.T @ w)[0, 0]))
        for _ in range(2):
            w = w - V @ (V.T @ w)
        beta = float(norm(w))
        if not np.isfinite(beta + alphas[-1]):
            raise InputError("EA factor: NaN or Inf")
        theta, S = scipy.linalg.eigh_tridiagonal(alphas, betas)
        if beta * abs(S[-1, -1]) <= tolerance * abs(theta[-1]) or j == d - 1:
            break
        betas.append(beta)
        v = w / beta
        V = xp.concat([V, v], axis=1)
    return float(theta[-1])
