"""A recorded layer's steps, given to whatever measures them."""

from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .exceptions import InputError
from .stream import Array, Step
from .study import Row

if TYPE_CHECKING:
    from .recording import LayerRecording

__all__ = ["replay"]


def replay(
    layer: "LayerRecording",
    push: Callable[[Step], list[Row]],
    *,
    convert: Callable[[np.ndarray], Array],
    phi: float | None = None,
    plain: Container[int] | None = None,
    title: str = "",
) -> Iterator[list[Row]]:
    """Pushes the layer's steps, with a progress bar.

    Args:
        layer: of an open recording.
        push: takes a step and returns its rows, as `ErrorStudy.push`.
        convert: columns as they are read to those that are pushed.
        phi: damping ratio in place of the recording's: steps then bring none.
        plain: of the steps that bring no update, the iterations to push; all if None.
        title: of the bar; the layer's name if empty.

    Yields:
        The rows of each step.

    Raises:
        InputError: no windows, none with a recorded iteration, or bad columns; names file, layer and iteration.
    """
    from tqdm import tqdm

    where = f"{layer.path}: layer {layer.name!r}"
    if not layer.windows:
        raise InputError(f"{where}: no windows to measure in")
    measured = False
    for step in tqdm(layer.steps(), total=len(layer), unit="step", desc=title or layer.name, disable=None):
        if not step.update and plain is not None and step.k not in plain:
            continue
        own = step.phi if phi is None else None
        try:
            rows = push(step._replace(A=convert(step.A), G=convert(step.G), phi=own))
        except InputError as error:
            raise InputError(f"{where}, {error}") from None
        measured = measured or bool(rows)
        yield rows
    if not measured:
        raise InputError(f"{where}: no recorded iteration lies in a window")
