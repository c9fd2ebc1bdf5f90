"""An optimizer and the model that it hooks: neither keeps the other alive, and a copy carries no hooks."""

import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch

__all__ = ["weakly", "without_hooks"]


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """The method while its object lives: a model must not keep its optimizers alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*args)

    return call


def without_hooks(optimizer: torch.optim.Optimizer, left: Collection[str]) -> dict[str, Any]:
    """An optimizer's attributes for `__getstate__`, without those in `left`.

    Also without `step`, which a learning rate scheduler wraps, and what `Optimizer.__setstate__` makes anew.
    """
    return {
        name: value
        for name, value in optimizer.__dict__.items()
        if name != "step" and name not in left and not name.startswith(("_optimizer", "_zero_grad"))
    }
