"""What passes through layers, caught: inputs in the forward, gradients of outputs in the backward.

`Follower` is the one mechanism. `ColumnHooks` hands its catch out as K-factor columns (`kfacerr.torch.columns`),
and the optimizers (`kfacerr.torch.layer_optimizer`) are built on it too.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..checks import instance, names, positive
from ..exceptions import InputError
from ..stream import Columns
from ._autograd import Backward, gradient_node, wanted
from ._micro_batches import micro_batch
from .columns import is_linear
from .linear import has_gradient

__all__ = [
    "Capture",
    "ColumnHooks",
    "Follower",
    "followable_layers",
    "release",
    "shared_parameters",
    "unfollowable",
]


def unfollowable(module: nn.Module) -> str | None:
    """Why a module's columns do not exist, or None if they do."""
    if not (is_linear(module) or isinstance(module, nn.Conv1d | nn.Conv2d)):
        return f"is a {type(module).__name__}, not a Linear, Conv1d or Conv2d"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "is part of a MultiheadAttention, which uses its weight without calling it"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
        return f"is a grouped convolution (groups={module.groups}), whose gradient is no single G A^T"
    return None


def shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that belong to several modules."""
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    return {p for p, count in owners.items() if count > 1}


def followable_layers(model: nn.Module) -> list[str]:
    """The names of the layers that `ColumnHooks` can follow, in the model's order."""
    shared = shared_parameters(model)
    return [name for name, module in model.named_modules() if _refusal(module, shared) is None]


class Capture:
    """One pass of one layer: its input and, after the backward, the gradient of its output.

    Args:
        module: the layer.
        x: its input; detached, no copy.

    Attributes:
        grad: of its output.
        backward: the number of the backward that brought `grad`.
        statistics: the running mean and variance that a batch norm in eval mode used; None for all else.
    """

    __slots__ = ("_node", "_open", "_version", "backward", "grad", "module", "statistics", "x")

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module = module
        self.x = x.detach()  # shares memory and version; lets go of the graph
        self.grad: Tensor | None = None
        self.backward = -1
        self.statistics: tuple[Tensor, Tensor] | None = None
        if isinstance(module, _BatchNorm) and not module.training and module.running_mean is not None:
            assert module.running_var is not None
            self.statistics = module.running_mean.clone(), module.running_var.clone()
        self._version = x._version
        self._node = gradient_node(module)
        self._open = True

    @property
    def wanted(self) -> bool:
        """Whether the running backward is one that this capture waits for."""
        return self._open and wanted(self._node)

    @property
    def is_of_frozen_weight(self) -> bool:
        """Whether the layer's weight is not trained, or is computed."""
        return self._node is None

    @property
    def overwritten(self) -> bool:
        return self.x._version != self._version

    def close(self) -> None:
        """Later backwards through the same graph do not count."""
        self._open = False

    def release(self) -> None:
        """Closes it and frees the tensors, which the graph would hold as long as it lives."""
        self.close()
        self.x, self.grad, self.statistics = torch.empty(0), None, None


def release(captures: Mapping[str, Sequence[Capture]]) -> None:
    """Frees the tensors of captures by layer."""
    for passes in captures.values():
        for capture in passes:
            capture.release()


class Follower:
    """Catches passes of layers, by name.

    A forward with gradients makes a `Capture`, which only the graph holds: one whose backward never comes leaves
    nothing behind. The backward that reaches it fills in the gradient and appends it to the layer's captures. So
    captures are matched by the backward that they share, whoever called the layer and how often: recomputed
    forwards (activation checkpointing of either kind) and forwards of single layers are as good as the model's.
    A backward that has no use for the gradient of a layer's trained weight, as `autograd.grad` with respect to the
    inputs, leaves nothing.

    The hooks do not refer to what owns the follower. Copies of a hooked model (deepcopy, pickle) carry none.

    Args:
        modules: the layers; batch norms may be among them.
        several: whether the captures of several backwards may wait side by side, as micro-batches. Those whose
            gradient has been cleared meanwhile are dropped then. If not, a second backward is refused.
        way_out: what errors advise, with "{name!r}" where the layer's name should stand.
        frozen: whether passes of a layer whose weight is not trained are caught too.

    Attributes:
        enabled: whether gradients count.
        active: names of the layers whose forwards are caught; all at the start.
        reached: names of the layers that a caught forward went through since the last `take`.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], *, several: bool, way_out: str, frozen: bool = True
    ) -> None:
        self.enabled = True
        self.active: set[str] = set()
        self.reached: set[str] = set()
        self._several = several
        self._way_out = way_out
        self._frozen = frozen
        self._backward = Backward()
        self._captures: dict[str, list[Capture]] = {}
        self._handles: list[Any] = []
        for name, module in modules.items():
            self.follow(name, module)

    def follow(self, name: str, module: nn.Module) -> None:
        """Follows one more layer, active from the start."""
        # A forward hook that puts a tensor hook on the output: full backward hooks wrap the output in a view,
        # which breaks with an in-place activation behind the layer.
        self._handles.append(module.register_forward_hook(_Hook(self._on_forward, name), with_kwargs=True))
        self.active.add(name)

    def take(self) -> dict[str, list[Capture]]:
        """The captures that backwards have reached since the last time; forgets them.

        Returns:
            By layer, in the order of the backwards.

        Raises:
            InputError: an input has been overwritten in place since the forward.
        """
        captures, self._captures = self._captures, {}
        self.reached.clear()
        for name, passes in captures.items():
            for capture in passes:
                capture.close()
                if capture.overwritten:
                    release(captures)
                    self._refuse(name, "had its input overwritten in place after the forward")
        return captures

    def forget(self) -> None:
        """Drops what `take` would give."""
        captures, self._captures = self._captures, {}
        self.reached.clear()
        release(captures)

    def close(self) -> None:
        """Removes the hooks and forgets what was caught. May be called again."""
        self.enabled = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def _on_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._backward.current()
        if not (self.enabled and name in self.active and torch.is_grad_enabled() and output.requires_grad):
            return
        if torch._C._are_functorch_transforms_active():
            return
        capture = Capture(module, (*args, *kwargs.values())[0])
        if capture.is_of_frozen_weight and not self._frozen:
            return
        self.reached.add(name)
        output.register_hook(lambda grad: self._on_gradient(name, capture, grad))

    def _on_gradient(self, name: str, capture: Capture, grad: Tensor) -> None:
        backward = self._backward.current()
        if not (self.enabled and capture.wanted):
            return
        passes = self._captures.setdefault(name, [])
        if any(other.backward == backward for other in passes):
            self.forget()
            self._refuse(name, "is used twice in one backward: its columns would be mixed up")
        if passes and not self._several:
            self._refuse(name, "got a second backward, and the columns of the first were not taken")
        if passes and _is_cleared(capture.module):
            for other in passes:
                other.grad = None
            passes.clear()
        capture.backward = backward
        if capture.grad is None:
            capture.grad = grad.detach()
            passes.append(capture)
        else:  # another backward through a retained graph
            capture.grad = capture.grad + grad.detach()

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise InputError(f"layer {name!r} {what}; {self._way_out.format(name=name)}")


def _is_cleared(module: nn.Module) -> bool:
    """Whether nothing is left of the weight's gradient of earlier backwards."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.requires_grad and not has_gradient(weight)


class ColumnHooks:
    """Follows named layers of any model and hands out their columns after each backward.

        with ColumnHooks(model, ["features.0", "classifier.0"]) as hooks:
            loss_function(model(x), y).backward()
            A, G = hooks.pop()["classifier.0"]

    Linear, Conv1d and Conv2d layers (groups = 1), and the Conv1D of transformers. Nothing is captured while
    `enabled` is False, under `no_grad`, or where a layer's output needs no gradient, so evaluation between the
    steps disturbs nothing; nor by a backward that has no use for the gradient of a layer's trained weight, as
    `autograd.grad` with respect to the inputs. The input is held by reference, not copied, from the forward
    until `pop()`, where the columns are formed. Copies of a hooked model (deepcopy, pickle) carry no live hooks.

    One backward, one `pop()`: with micro-batches, pop after each. A forward whose backward never comes is
    forgotten. What would give wrong columns is refused with an `InputError`: a layer used twice in one backward,
    two backwards without a `pop()`, an input overwritten in place before `pop()`.

    Args:
        model: the model.
        layers: names as in `model.named_modules()`.

    Attributes:
        enabled: switch; True at the start.
        layers: the names, in the order given.

    Raises:
        InputError: for an unknown or repeated name, another type of layer, a grouped convolution, or a layer that
            shares its weight with another, so that G A^T is not the weight's gradient.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        instance(model, "the model", nn.Module)
        self.layers = names((layers,) if isinstance(layers, str) else layers, "layers")
        self._modules = _find_layers(model, self.layers)
        self._follower = Follower(
            self._modules,
            several=False,
            way_out="call pop() after each backward, set enabled = False, or follow other layers",
        )

    def __repr__(self) -> str:
        return f"<kfacerr ColumnHooks on {', '.join(map(repr, self.layers))}; see .pop()>"

    @property
    def enabled(self) -> bool:
        return self._follower.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._follower.enabled = enabled

    def pop(self, *, loss_scale: float = 1.0) -> dict[str, Columns]:
        """The columns of the last backward, by layer name in the order of `layers`; clears them.

        Args:
            loss_scale: what the loss was multiplied with before `backward()` (a GradScaler's scale, the
                inverse of a number of micro-batches); G is divided by it.

        Returns:
            Detached tensors, float32 (float64 for a float64 model) whatever the precision of the forward.

        Raises:
            InputError: if a layer was not reached by the forward or by the backward, or its input has been
                overwritten in place since the forward.
        """
        positive(loss_scale, "loss_scale")
        reached = set(self._follower.reached)
        captures = self._follower.take()
        columns = {}
        try:
            for name in self._modules:
                if name not in captures:
                    raise InputError(f"layer {name!r} was {self._missed(name in reached)}")
                (capture,) = captures[name]
                with torch.no_grad():
                    columns[name] = micro_batch(capture, loss_scale).columns
            return columns
        finally:
            release(captures)

    def _missed(self, reached: bool) -> str:
        if reached:
            return "reached by a forward but by no backward: nothing to pop()"
        why = "" if self.enabled else " (the hooks are disabled or closed)"
        return f"not reached by a forward with gradients since the last pop(){why}"

    def close(self) -> None:
        """Removes the hooks and forgets what was captured. May be called again."""
        self._follower.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Hook:
    """A module hook bound to its owner; its deep copies and pickles are inert.

    Without this a deepcopy of the model would copy the owner with its captured graph tensors (which torch
    refuses), or let the copy's forwards write into the original's captures. torch.compile leaves it to run as it
    is: traced, it would see neither versions nor nodes of the graph.
    """

    def __init__(self, call: Callable[..., None] | None = None, *bound: Any) -> None:
        self._call = call and torch.compiler.disable(call)
        self._bound = bound

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*self._bound, *args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()


def _refusal(module: nn.Module, shared: set[nn.Parameter]) -> str | None:
    """Why `ColumnHooks` cannot follow a module, or None if it can."""
    if reason := unfollowable(module):
        return reason
    if module._parameters.get("weight") in shared:
        return "shares its weight with another layer, so that G A^T is not the weight's gradient"
    return None


def _find_layers(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The named modules, or an error that lists what could have been named."""
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates = f"the layers that can be followed: {', '.join(followable_layers(model)) or 'none'}"
    if not names:
        raise InputError(f"no layer is named; {candidates}")
    shared = shared_parameters(model)
    found: dict[str, nn.Module] = {}
    for name in names:
        if name not in modules:
            raise InputError(f"the model has no layer {name!r}; {candidates}")
        if reason := _refusal(modules[name], shared):
            raise InputError(f"layer {name!r} {reason}; {candidates}")
        if name in found:
            raise InputError(f"layer {name!r} is named twice")
        found[name] = modules[name]
    return found
