"""Which backward is running, and which gradients it wants."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

__all__ = ["Backward", "gradient_node", "wanted"]


class Backward:
    """Tells one backward from the next, and counts those that run inside another as that one.

    Autograd numbers its graph tasks. A reentrant checkpoint runs a task of its own for each segment inside the
    user's backward; its recomputed forward runs in the outer task, and that is what gives the outer one away.
    `current` must therefore be asked in every forward and at every gradient.
    """

    def __init__(self) -> None:
        self._outermost = -1

    def current(self) -> int:
        """The number of the outermost backward that is running; -1 outside of any."""
        task: int = torch._C._current_graph_task_id()
        if task == -1:
            self._outermost = -1  # also where a backward has ended in an error, and called nothing back
        elif self._outermost == -1:
            self._outermost = task
            engine: Any = Variable._execution_engine
            engine.queue_callback(partial(self._ended, task))
        return self._outermost

    def _ended(self, task: int) -> None:
        if self._outermost == task:
            self._outermost = -1


def gradient_node(module: nn.Module) -> Any:
    """What accumulates the gradient of a layer's trained weight; None if the weight is frozen or computed."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.requires_grad:
        return None
    return weight.view_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def wanted(node: Any) -> bool:
    """Whether the running backward has a use for the gradient that `node` accumulates."""
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so it answers for a leaf that autograd.grad asks for
        return True
