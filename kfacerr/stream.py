"""The one interface that ties training to error analysis: a stream of steps of one layer.

A stream is any iterable of `Step`. Training yields it live (`kfacerr.torch.follower`), a file yields it again
(`kfacerr.recording`), and `kfacerr.study` consumes it; none of them knows the other.
"""

import operator
from collections.abc import Iterable
from numbers import Integral
from typing import Any, NamedTuple

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
"""What stands for windows: one, several, or pairs (start, length) as well."""


def as_windows(windows: Windows) -> list[Window]:
    """In the order that they are given in.

    >>> as_windows(Window(100, 50)) == as_windows([(100, 50)])
    True

    Args:
        windows: one, or several; (start, length) and (start, length, epoch) will do.

    Returns:
        The windows.

    Raises:
        InputError: what is given is none of this.
    """
    try:
        return [Window(*map(operator.index, w)) for w in ([windows] if isinstance(windows, Window) else windows)]
    except TypeError:
        raise InputError(
            f"windows must be (first iteration, length) pairs of whole numbers, got {windows!r}"
        ) from None
