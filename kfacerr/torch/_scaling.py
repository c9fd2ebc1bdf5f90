"""Whether .grad was unscaled and the columns were not: what a GradScaler leaves where nobody declares its scale.

`scaler.step()` divides .grad by the scale; the columns, which the hooks caught in the backward, keep it. Without
`loss_scale` the factors G G^T are then scale^2 too large and the step is scale too short, with no other sign.
"""

import math

import torch
from torch import Tensor

__all__ = ["lost_scale", "probe"]

_LEAST = 2**8  # a GradScaler starts from 2^16


def probe(d: int, like: Tensor) -> Tensor:
    """A fixed vector (d,) of signs."""
    signs = torch.randint(2, (d,), generator=torch.Generator().manual_seed(0))
    return (2 * signs - 1).to(like)


def lost_scale(have: Tensor, want: Tensor, half: bool = False) -> float | None:
    """The power of two, at least 2^8, that all layers' .grad are too small by; None if there is none. Waits.

    Clipping shortens .grad by one factor too, but that is a power of two only by chance: to 1e-4 (1e-3 after a
    backward in half precision) once in thousands of runs among those whose first update clips by more than 2^8.
    Clipping by value and parts from elsewhere leave no common factor at all.

    Args:
        have: .grad times a vector, all layers in one.
        want: G A^T times that vector.
        half: whether the backward ran in half precision.
    """
    have, want = have.double(), want.double()
    square, inner = torch.sum(have**2), torch.sum(have * want)
    apart = torch.linalg.vector_norm(want - have * (inner / square)) / torch.linalg.vector_norm(want)
    ratio, apart = torch.stack([inner / square, apart]).tolist()
    if not (math.isfinite(ratio) and ratio > _LEAST / 2 and apart < 0.02):
        return None
    nearest = 2.0 ** round(math.log2(ratio))
    return nearest if nearest >= _LEAST and abs(ratio / nearest - 1) < (1e-3 if half else 1e-4) else None
