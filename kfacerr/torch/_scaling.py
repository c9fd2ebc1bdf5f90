"""Whether .grad was unscaled and the columns were not: what a GradScaler leaves where nobody declares its scale.

`scaler.step()` divides .grad by the scale; the columns, which the hooks caught in the backward, keep it. Without
`loss_scale` the factors G G^T are then scale^2 too large and the step is scale too short, with no other sign.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import positive
from ..exceptions import InputError
from .distributed import Team

__all__ = ["ScaleCheck", "ScaleProbe", "probe", "read_scale"]

_LEAST = 2**8  # a GradScaler starts from 2^16


def read_scale(loss_scale: float | Callable[[], float]) -> float:
    """The loss scale as it is now; an InputError if it is no scale."""
    return positive(loss_scale() if callable(loss_scale) else loss_scale, "loss_scale")


class ScaleProbe(NamedTuple):
    """A layer's `.grad v` and `G A^T v` (d_G,), and whether the backward ran in half precision."""

    have: Tensor
    want: Tensor
    half: bool


class ScaleCheck:
    """Sees once that .grad has the scale of the columns, where no `loss_scale` says that it has not."""

    def __init__(self) -> None:
        self._known = False

    def is_open(self, loss_scale: float | Callable[[], float]) -> bool:
        """Whether nobody knows as yet."""
        return not (self._known or callable(loss_scale) or loss_scale != 1.0)

    def look(self, probes: Iterable[ScaleProbe], team: Team, k: int) -> None:
        """Looks at all layers of step k; waits for the device.

        Args:
            probes: this process's.
            team: the processes.
            k: the step.

        Raises:
            InputError: .grad is smaller by one power of two in all layers.
        """
        probes = list(probes)
        if not probes:
            return
        home = probes[0].have.device
        have = torch.cat([p.have.to(home, torch.float64) for p in probes])
        want = team.sum(torch.cat([p.want.to(home, torch.float64) for p in probes]))
        scale = _lost_scale(have, want, any(p.half for p in probes))
        if scale is not None:
            raise InputError(
                f"step {k}: .grad is {scale:g} times smaller than G A^T of the columns, in all layers: with a "
                "GradScaler pass loss_scale=scaler.get_scale (if .grad is meant to be, loss_scale=lambda: 1.0)"
            )
        self._known = True


def probe(d: int, like: Tensor) -> Tensor:
    """A fixed vector (d,) of signs."""
    signs = torch.randint(2, (d,), generator=torch.Generator().manual_seed(0))
    return (2 * signs - 1).to(like)


def _lost_scale(have: Tensor, want: Tensor, half: bool) -> float | None:
    """The power of two, at least 2^8, that all layers' .grad are too small by; None if there is none.

    Clipping shortens .grad by one factor too, but that is a power of two only by chance: to 1e-4 (1e-3 after a
    backward in half precision) once in thousands of runs among those whose first update clips by more than 2^8.
    Clipping by value and parts from elsewhere leave no common factor at all.
    """
    square, inner = torch.sum(have**2), torch.sum(have * want)
    apart = torch.linalg.vector_norm(want - have * (inner / square)) / torch.linalg.vector_norm(want)
    ratio, apart = torch.stack([inner / square, apart]).tolist()
    if not (math.isfinite(ratio) and ratio > _LEAST / 2 and apart < 0.02):
        return None
    nearest = 2.0 ** round(math.log2(ratio))
    return nearest if nearest >= _LEAST and abs(ratio / nearest - 1) < (1e-3 if half else 1e-4) else None
