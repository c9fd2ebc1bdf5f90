"""The loss scale: .grad is unscaled before a step, and the columns, which hooks caught in the backward, are not.

Without the scale the factors G G^T are scale^2 too large and the step is scale too short, with no other sign.

A GradScaler says it to an optimizer that unscales .grad itself, as torch's fused ones do: `scaler.step` looks for
Inf in .grad, sets `grad_scale` and `found_inf` on the optimizer, and calls its `step`. After `scaler.unscale_` it
sets `found_inf` alone, and the scale must be declared. So must one by hand; `ScaleCheck` sees if it is not.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import positive
from ..exceptions import InputError
from .distributed import Team
from .linear import formed

__all__ = [
    "ScaleCheck",
    "ScaleProbe",
    "forget_scaler",
    "is_declared",
    "overflowed",
    "probe",
    "read_scale",
    "scale_of_step",
]

_LEAST = 2**8  # a GradScaler starts from 2^16


def read_scale(loss_scale: float | Callable[[], float]) -> float:
    """The loss scale as it is now; an InputError if it is no scale."""
    return positive(loss_scale() if callable(loss_scale) else loss_scale, "loss_scale")


def is_declared(loss_scale: float | Callable[[], float]) -> bool:
    """Whether the user says what the loss is multiplied with."""
    return callable(loss_scale) or loss_scale != 1.0


def scale_of_step(
    optimizer: torch.optim.Optimizer, loss_scale: float | Callable[[], float], k: int
) -> float | None:
    """The scale of the columns, after which .grad has none; what a GradScaler says waits for the device.

    Args:
        optimizer: whose step is running.
        loss_scale: what counts if no GradScaler says anything.
        k: the step.

    Returns:
        The scale; None if a gradient has overflowed and the step is not to be taken.

    Raises:
        InputError: .grad was unscaled before, so that nothing says by what, or is float16 and would underflow.
    """
    given, overflow = (vars(optimizer).get(name) for name in _TOLD)
    if overflow is None:
        return read_scale(loss_scale)
    if given is None:
        raise InputError(
            f"step {k}: scaler.unscale_() came before scaler.step(), as for clipping, and then nothing says the "
            "scale of the columns: pass loss_scale=scaler.get_scale"
        )
    scale, overflow = torch.stack([given.double(), torch.as_tensor(overflow).to(given.device).double()]).tolist()
    if overflow:
        return None
    positive(scale, "the GradScaler's scale")
    for group in optimizer.param_groups:
        for p in group["params"]:
            if (g := formed(p)) is not None:
                if g.dtype == torch.float16:
                    raise InputError("a GradScaler needs float32 parameters and autocast, and these are float16")
                (g._values() if g.is_sparse else g).mul_(1 / scale)
    return float(scale)


_TOLD = "grad_scale", "found_inf"
"""Attributes that `GradScaler.step` sets on an optimizer with `_step_supports_amp_scaling`."""


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler called a step that is not to be taken, as it does where the optimizer unscales."""
    return bool(vars(optimizer).get("found_inf", False))


def forget_scaler(optimizer: torch.optim.Optimizer) -> None:
    """After an error, where `GradScaler.step` would leave them for the next step."""
    for name in _TOLD:
        vars(optimizer).pop(name, None)


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
        return not (self._known or is_declared(loss_scale))

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
                f"step {k}: .grad is {scale:g} times smaller than G A^T of the columns, in all layers: pass the "
                "loss's scale as loss_scale (loss_scale=lambda: 1.0 if .grad is meant to be smaller)"
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
