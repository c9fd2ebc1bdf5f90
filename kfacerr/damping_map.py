"""Damping maps: errors (1)-(4) of a truncated inverse, and its condition, over damping and rank, of two factors.

An exact truncation has the eigenvectors of its factor, so that everything is said by eigenvalues: metrics (1) and
(2) are of vectors, and a step is the gradient in both eigenbases times `Damping.grid`, entry by entry. Each is
held against the exact inverse with the same damping: the map says what truncation costs under it, and the
condition of the exact preconditioner says what the damping leaves of the curvature.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .damping import RELATIVE, Damping, Scale
from .inverse import continuation_level
from .lowrank import LowRank
from .metrics import angle_error, norm_error

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["VALUES", "damping_map", "ranks_around"]

VALUES = tuple(float(f"{value:.3g}") for value in np.geomspace(1e-4, 1, 13))


def ranks_around(rank: int, d: int) -> list[int]:
    """A quarter, a half, once, twice and four times the rank, as far as they lie below d."""
    return sorted({r for r in (rank // 4, rank // 2, rank, 2 * rank, 4 * rank) if 1 <= r < d}) or [d]


def damping_map(
    G: np.ndarray,
    A: np.ndarray,
    J: np.ndarray,
    ranks: Sequence[int],
    *,
    values: Sequence[float] = VALUES,
    continuation: str = "min",
) -> "pd.DataFrame":
    """Errors over damping and rank.

    Args:
        G: (d_G,) all eigenvalues, descending; negative ones count as 0.
        A: (d_A,) likewise.
        J: (d_G, d_A), a gradient in the eigenbases of both.
        ranks: of truncations.
        values: shares of what `RELATIVE` says.
        continuation: of the spectra, see `kfacerr.inverse`.

    Returns:
        Columns damping, share, rank, metric (the four, without (1) and (2) for "product", and "condition", of the
        exact preconditioner), value.
    """
    import pandas as pd

    exact = {"A": np.maximum(A, 0), "G": np.maximum(G, 0)}
    scales = {side: Scale.of(w) for side, w in exact.items()}
    cheap = {r: {side: _truncated(w, r, continuation) for side, w in exact.items()} for r in ranks}
    rows = []
    for kind in RELATIVE:
        for share in values:
            mean = scales["A"].mean * scales["G"].mean
            damping = Damping(kind, share * mean if kind == "product" else share)
            levels = damping.levels(scales["A"], scales["G"])
            grid = damping.grid(exact["G"], exact["A"], levels)
            kept, S = grid[grid > 0], grid * J
            condition = kept.max() / kept.min() if kept.size else float("nan")
            for r, held in cheap.items():
                step = damping.grid(held["G"], held["A"], levels) * J
                found = {
                    "step_norm": norm_error(step, S),
                    "step_angle": angle_error(step, S),
                    "condition": condition,
                }
                for side, level in zip("AG", levels, strict=True):
                    if kind != "product":
                        one, other = (damping.inverse(w[side], level)[:, None] for w in (held, exact))
                        found[f"inverse_{side}"] = norm_error(one, other)
                rows += [(kind, share, r, metric, float(value)) for metric, value in found.items()]
    return pd.DataFrame(rows, columns=["damping", "share", "rank", "metric", "value"])


def _truncated(w: np.ndarray, r: int, continuation: str) -> np.ndarray:
    """The spectrum of the truncation to r, continued."""
    low = LowRank(np.eye(len(w), min(r, len(w))), w[:r])  # in its eigenvectors
    tau = float(continuation_level(low, continuation, np.asarray(w.sum())))
    return np.concatenate([w[:r], np.full(max(0, len(w) - r), tau)])
