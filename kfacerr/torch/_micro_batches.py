"""What backwards left for one layer, and the columns of the whole step that they make up.

**Micro-batches.** With b_j samples in micro-batch j and b in all, and the gradients of the micro-batches summed,
the columns of the full batch are `sqrt(b_j/b) A_j` and `sqrt(b/b_j) G_j`, side by side: (20) holds for the sum.
Several processes: see `kfacerr.torch.distributed`.

**Convolutions, and layers with positions T besides the batch.** The columns (`kfacerr.torch.columns`) give
`G G^T = |T| Gamma`, with Gamma of Grosse & Martens (2016); before any process sees them, the columns of G are
divided by sqrt(|T|), so that the Fisher block is theirs, Omega (x) Gamma. As damping is a share of the largest
eigenvalue, this is a scalar |T| on the step, which clipping and learning rate see.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..stream import Columns
from .columns import batch_size, layer_columns

if TYPE_CHECKING:
    from .follower import Capture

__all__ = ["LayerTotals", "MicroBatch", "factor_columns", "gradient_columns", "micro_batch"]


class MicroBatch(NamedTuple):
    """What one backward left for one layer.

    Attributes:
        columns: as `layer_columns` gives them, of the unscaled loss.
        batch: b_j.
        dtype: precision the backward ran in.
    """

    columns: Columns
    batch: int
    dtype: torch.dtype

    @property
    def positions(self) -> float:
        """|T|, columns per sample."""
        return self.columns.A.shape[1] / max(self.batch, 1)


def micro_batch(capture: "Capture", loss_scale: float) -> MicroBatch:
    """What the backward behind a capture left, of a loss that was multiplied with `loss_scale`."""
    assert capture.grad is not None
    A, G = layer_columns(capture.module, capture.x, capture.grad)
    if loss_scale != 1.0:
        G /= loss_scale  # G is no view: `layer_columns` scales it by the batch
    return MicroBatch(Columns(A, G), batch_size(capture.module, capture.x), capture.grad.dtype)


class LayerTotals(NamedTuple):
    """What all processes together have of a layer for the coming step.

    Attributes:
        batch: b, samples of all micro-batches of all processes.
        widths: columns of each process.
        double: whether any has columns in float64.
    """

    batch: int
    widths: tuple[int, ...]
    double: bool

    @property
    def n(self) -> int:
        return sum(self.widths)


def gradient_columns(parts: Sequence[MicroBatch], totals: LayerTotals) -> Columns:
    """A (d_A, n), G (d_G, n), this process's columns of the step's gradient `G A^T`."""
    shares = _shares(parts, totals)
    return _side_by_side(parts, shares, [1 / (share * len(totals.widths)) for share in shares])


def factor_columns(parts: Sequence[MicroBatch], totals: LayerTotals, *, sampled: bool) -> Columns:
    """A (d_A, n), G (d_G, n), this process's columns of `A A^T` = Omega and `G G^T` = Gamma: what processes see.

    With sampled labels each micro-batch has a mean loss of its own, not a part of the whole one.
    """
    shares = _shares(parts, totals)
    scales = [share if sampled else 1 / (share * len(totals.widths)) for share in shares]
    weights = [1 / math.sqrt(part.positions or 1) for part in parts]
    return _side_by_side(parts, shares, [w * s for w, s in zip(weights, scales, strict=True)])


def _side_by_side(parts: Sequence[MicroBatch], for_A: Sequence[float], for_G: Sequence[float]) -> Columns:
    A = [part.columns.A if s == 1 else part.columns.A * s for part, s in zip(parts, for_A, strict=True)]
    G = [part.columns.G if s == 1 else part.columns.G * s for part, s in zip(parts, for_G, strict=True)]
    return Columns(A[0], G[0]) if len(parts) == 1 else Columns(torch.cat(A, dim=1), torch.cat(G, dim=1))


def _shares(parts: Sequence[MicroBatch], totals: LayerTotals) -> list[float]:
    """sqrt(b_j/b)."""
    return [math.sqrt(max(part.batch, 1) / max(totals.batch, 1)) for part in parts]
