"""The one interface that ties training to error analysis: a stream of steps of one layer.

A stream is any iterable of `Step`. Training yields it live (`kfacerr.torch.follower`), a file yields it again
(`kfacerr.recording`), and `kfacerr.study` consumes it; none of them knows the other.
"""

import itertools
from collections.abc import Iterable
from numbers import Integral
from typing import Any, NamedTuple

from .checks import names, whole
from .exceptions import InputError

Array = Any  # a NumPy, CuPy, torch or any other Array API array


class Columns(NamedTuple):
    """The columns of one layer at one iteration, with `Mat(g_k) = G_k A_k^T` (eq. (20)).

    Attributes:
        A: (d_A, n). Column i is `[a_i; 1]/sqrt(b)`, b the batch size; the 1 only if the layer has a bias.
        G: (d_G, n). Column i is `sqrt(b) * dLoss/do_i`, the loss averaged over the batch.
    """

    A: Array
    G: Array


class Step(NamedTuple):
    """Iteration `k` of one layer's stream.

    Attributes:
        k: iteration, strictly increasing along the stream.
        A: (d_A, n) forward columns `A_k`.
        G: (d_G, n) backward columns `G_k`.
        update: whether the EA factors (8) take this step's columns (once in T_updt iterations).
        phi: damping ratio phi_lambda of this iteration, or None to use the reader's.
    """

    k: int
    A: Array
    G: Array
    update: bool = True
    phi: float | None = None


class Window(NamedTuple):
    """`length` consecutive iterations from `start` over which the errors are measured (§4.2)."""

    start: int
    length: int
    epoch: int = 0

    def __contains__(self, k: object) -> bool:
        return isinstance(k, Integral) and self.start <= int(k) < self.start + self.length


Windows = Window | Iterable[tuple[int, ...]]
"""What stands for windows: one, several, or tuples (start, length) that are some."""


def ordered(windows: Windows) -> list[Window]:
    """Windows by their start.

    Args:
        windows: one, or several; (start, length) or (start, length, epoch) will do.

    Returns:
        The same as `Window`s.

    Raises:
        InputError: one is no window, or two overlap.
    """
    found = []
    for one in names([windows] if isinstance(windows, Window) else windows, "windows", tuple, list):
        if len(one) not in (2, 3):
            raise InputError(f"a window is (start, length) or (start, length, epoch), got {one!r}")
        limits = zip(("start", "length", "epoch"), one, (0, 1, 0), strict=False)
        found.append(Window(*(whole(value, f"a window's {name}", least) for name, value, least in limits)))
    found.sort()
    for one, other in itertools.pairwise(found):
        if other.start in one:
            raise InputError(f"windows overlap: {tuple(one)} and {tuple(other)}")
    return found
