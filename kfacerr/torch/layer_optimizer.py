"""What K-FAC and SENG share: SGD with momentum, whose direction is made layer by layer from columns.

A step of the user's loop is, in this order: the columns of all backwards since the last step are taken from the
follower; a step whose gradients are not finite is skipped; the subclass updates what it keeps of the layers, and
gives each layer's direction d; then `buf = momentum buf + d + weight_decay p`, `p -= lr buf`.
"""

import logging
import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..array import map_arrays
from ..checks import is_number, whole
from ..exceptions import InputError
from ._direction import Direction, descend
from ._layer import Layer
from ._precision import full_precision
from ._scaling import ScaleCheck, forget_scaler, is_declared, read_scale, scale_of_step
from .distributed import Team, is_sharded
from .follower import Capture, Follower, release, shared_parameters, unfollowable
from .linear import forget

__all__ = ["LayerOptimizer", "unwrapped"]

logger = logging.getLogger(__name__)


class LayerOptimizer(torch.optim.Optimizer):
    """An optimizer that follows layers of a model; `KFAC` and `SENG` say what it does with their columns.

    The columns are caught by hooks; a user calls `zero_grad`, `backward` and `step`. All backwards since the last
    step are its micro-batches, whoever called the layers: the model, a part of it, a recomputed segment. A
    backward whose `step()` never came, as after a GradScaler overflow, is dropped when its gradients are cleared.

    State is in `state_dict()` as torch's own optimizers have it, and what is kept of layers in the first parameter
    group; hooks on it, and `torch.distributed.checkpoint.state_dict`, see all. Copies (deepcopy, pickle), made
    together with the model, go on alike.

    Args:
        model: the network; wrappers (DistributedDataParallel, DataParallel, torch.compile) are taken off.
        params: parameters or groups; all of the model's if None.
        defaults: of the parameter groups; "lr", "momentum" and "weight_decay" among them.
        loss_scale: what the loss is multiplied with before `backward()`, while .grad is unscaled before `step()`;
            or a function that gives it. A GradScaler says its scale itself, unless `scaler.unscale_(optimizer)`
            comes before its step, as for clipping: then pass `scaler.get_scale`.
        skip_nonfinite: look at every step for NaN and Inf, and not only where something is updated.
        data_parallel: whether the processes of torch.distributed, if it is initialised, train one model.
        left_out: names of layers that are not to be preconditioned.

    Attributes:
        k: number of steps taken.
        layers: the preconditioned layers by name.
        model: the network inside its wrappers.

    Raises:
        InputError: no module, no trainable parameters, sharded parameters, or settings out of range.
    """

    _key: ClassVar[str]  # of the state in the first parameter group
    _plain: ClassVar[str]  # what is done with the gradients of all other parameters
    _way_out: ClassVar[str]  # what errors in following a layer advise

    _follower: Follower
    _rounding = 0.0  # of float32 products in the backward
    _take_state: Callable[[], None]  # the one that is being loaded

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        *,
        loss_scale: float | Callable[[], float],
        skip_nonfinite: bool,
        data_parallel: bool,
        left_out: Container[str],
    ) -> None:
        self.model = model = unwrapped(model)
        self.loss_scale = loss_scale
        if not callable(loss_scale):
            read_scale(loss_scale)
        self.skip_nonfinite = skip_nonfinite
        self.data_parallel = data_parallel
        self._left_out = left_out
        self.k = 0
        self.layers: dict[str, Any] = {}
        self._mine: set[Tensor] = set()
        self._said: set[str] = set()
        self._skipped = 0  # steps, for NaN or Inf
        self._scale = ScaleCheck()
        if params is None:
            params = list(model.parameters())
            if not any(p.requires_grad for p in model.parameters()):
                raise InputError("the model has no trainable parameters")
        super().__init__(params, defaults)
        self._hook_up()

    # --------------------------------------------------------------------------------- for the subclass

    @abstractmethod
    def _made_layer(self, name: str, module: nn.Module, shared: set[nn.Parameter]) -> Layer:
        """A layer that is followed from now on."""

    @abstractmethod
    def _wanted(self) -> set[str]:
        """The layers whose columns the coming step needs."""

    @abstractmethod
    def _advance(self, captures: Mapping[str, Sequence[Capture]], team: Team) -> bool:
        """Takes one step, with gradients off and products in full precision; False if it is to be skipped."""

    @abstractmethod
    def _prepared(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """What takes a state of `_own_state`'s; refuses another before anything has changed."""

    def _own_state(self) -> dict[str, Any]:
        """What there is beside the state of any optimizer: live arrays and plain values."""
        return {"k": self.k, "layers": tuple((name, layer.state_dict()) for name, layer in self.layers.items())}

    def _keeps_momentum(self, i: int) -> bool:
        """Whether parameters of group i have, or will have, a buffer of their momentum."""
        return bool(self.param_groups[i]["momentum"])

    def _unfollowable(self, module: nn.Module) -> str | None:
        """Why a module's kind cannot be preconditioned, or None if it can."""
        return unfollowable(module)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Refuses settings of a parameter group that are out of range."""
        for name in ("lr", "momentum", "weight_decay"):
            _check_setting(name, group[name])

    def _undirected(self, grad: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The direction of a parameter that no layer gave one to."""
        return grad

    # ----------------------------------------------------------------------------------------- following

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer. Layers whose weight comes in are preconditioned from now on."""
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self._mine.add(p)
            self.state[p]  # torch.distributed.checkpoint takes a parameter without an entry for a missing one
        if hasattr(self, "_follower"):
            self._follow()

    def _hook_up(self) -> None:
        self._follower = Follower({}, several=True, way_out=self._way_out, frozen=False)
        weakref.finalize(self, self._follower.close).atexit = False
        for name, layer in self.layers.items():
            self._follower.follow(name, layer.module)
        self._follow()
        self.register_state_dict_post_hook(_write_state)
        self.register_load_state_dict_pre_hook(_read_state)
        self.register_load_state_dict_post_hook(_take_state)

    def _follow(self) -> None:
        """Follows the layers that can be preconditioned and are not yet; tells the log about the rest."""
        _refuse_sharded(self.model.named_modules())
        shared = shared_parameters(self.model)
        plain: dict[int, list[str]] = {logging.WARNING: [], logging.INFO: []}
        for name, module in self.model.named_modules():
            if name in self.layers or not any(p in self._mine for p in module.parameters(recurse=False)):
                continue
            if why := self._why_plain(name, module, shared):
                reason, level = why
                plain[level].append(f"layer {name!r} {reason}" if name else f"the model itself {reason}")
            else:
                self.layers[name] = self._made_layer(name, module, shared)
                self._follower.follow(name, module)
        for level, reasons in plain.items():
            if reasons:
                message = f"{self._plain}: {'; '.join(reasons)}"
                self._say(message, message, level)
        if not self.layers:
            self._say("none", f"no layer of the model is preconditioned; {self._plain}")
        self._switch()

    def _why_plain(self, name: str, module: nn.Module, shared: Container[nn.Parameter]) -> tuple[str, int] | None:
        """Why a layer is not preconditioned, and how loud to say so; None if it is."""
        if reason := self._unfollowable(module):
            matrices = any(p in self._mine and p.ndim > 1 for p in module.parameters(recurse=False))
            expected = not matrices or isinstance(module, nn.Embedding | nn.EmbeddingBag)
            return reason, logging.INFO if expected else logging.WARNING
        weight = module._parameters.get("weight")
        if name in self._left_out:
            return "is left out, as asked", logging.INFO
        if weight is None:
            return "computes its weight from other parameters", logging.WARNING
        if weight not in self._mine:
            return "has a weight that is not optimized", logging.INFO
        if weight in shared:
            return "shares its weight with another layer", logging.WARNING
        return None

    def _switch(self) -> None:
        """Columns are caught where the coming step needs them."""
        self._follower.active = self._wanted()

    def close(self) -> None:
        """Removes the hooks from the model, as does the end of the optimizer's life."""
        self._follower.close()

    def _say(self, key: str, message: str, level: int = logging.WARNING) -> None:
        """To the log, once."""
        if key not in self._said:
            self._said.add(key)
            logger.log(level, "%s: %s", type(self).__name__, message)

    # ---------------------------------------------------------------------------------------------- step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for any optimizer; drops the columns of the gradients it clears."""
        self._discard()
        forget(self._parameters())  # before they are read, which would form them
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the module's docstring.

        Args:
            closure: evaluates the loss, with gradients, and returns it.

        Returns:
            The closure's loss, or None.

        Raises:
            InputError: the step cannot be taken as things are; the columns are lost, and nothing else is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._take_step()
        except BaseException:
            forget_scaler(self)
            raise
        return loss

    def _take_step(self) -> None:
        self._check()
        captures = self._follower.take()
        try:
            scale = scale_of_step(self, self.loss_scale, self.k)
            if scale is None:
                return  # a GradScaler takes no step then, and says nothing
            self._tell_scale(scale)
            with full_precision(self._home.type) as self._rounding:
                taken = self._advance(captures, Team(self.data_parallel))
        finally:
            release(captures)
            self._discard()
        if taken:
            self.k += 1
        else:
            _say_skipped(self)
        self._switch()

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    @property
    def _home(self) -> torch.device:
        """The device of the first parameter."""
        return next((p.device for p in self._parameters()), torch.device("cpu"))

    def _all(self, flags: Sequence[Tensor]) -> Tensor:
        """Whether all flags are raised, a 0-d boolean at home."""
        home = self._home
        up = torch.ones((), dtype=torch.bool, device=home)
        return torch.stack([up, *(flag.to(home) for flag in flags)]).all()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves .grad scaled for us, and says its scale: unless `loss_scale` says it."""
        return not is_declared(self.loss_scale)

    def _tell_scale(self, scale: float) -> None:
        for layer in self.layers.values():
            layer.loss_scale = scale

    def _check(self) -> None:
        """Refuses a step that cannot be taken; says which layers were changed behind the optimizer's back."""
        _refuse_sharded((name, layer.module) for name, layer in self.layers.items())
        for name, layer in self.layers.items():
            if layer.is_optimized:
                continue
            lost = layer.module._parameters.get("weight") is None
            why = "is computed from other parameters" if lost else "is not the one that is optimized"
            self._say(f"lost {name}", f"layer {name!r}: its weight {why} now; it is no longer preconditioned")

    def _discard(self) -> None:
        self._follower.forget()
        for layer in self.layers.values():
            layer.discard()

    def _descend(self, directions: Iterable[tuple[nn.Parameter, Direction]]) -> None:
        """SGD with momentum: first the parameters that have a direction, then the others by their gradient."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, direction in directions:
            descend(p, direction, groups.pop(p), self.state[p])
        for p, group in groups.items():
            if p.grad is not None:
                descend(p, self._undirected(p.grad, group), group, self.state[p])

    # --------------------------------------------------------------------------------------------- state

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, together with the model: everything but the hooks.

        Also without `step`, which a learning rate scheduler wraps, and what `Optimizer.__setstate__` makes anew.
        """
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("step", "_follower") and not name.startswith(("_optimizer", "_zero_grad"))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "layers" in state:  # and not from torch's load_state_dict
            self._hook_up()


# What torch calls around `state_dict` and `load_state_dict`. No methods, which would keep the optimizer alive. The
# user's hooks come after them, and see the whole state.


def _write_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, LayerOptimizer)
    first, *_ = groups = state_dict["param_groups"]
    first[optimizer._key] = optimizer._own_state()
    # `torch.distributed.checkpoint` loads what a new optimizer has. That has no factors yet: the tuple
    # of the layers is loaded as one value, where dicts are key by key. It has no momentum yet: zeros stand for it.
    state = state_dict["state"]
    for i, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for index, p in zip(group["params"], own["params"], strict=True):
            if p.requires_grad and "momentum_buffer" not in state[index] and optimizer._keeps_momentum(i):
                state[index] = {**state[index], "momentum_buffer": torch.zeros_like(p)}


def _read_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, LayerOptimizer)
    first, *others = state_dict.get("param_groups") or [{}]
    first = dict(first)
    own = first.pop(optimizer._key, None)
    if own is None:
        name = type(optimizer).__name__
        raise InputError(f"the state is not of a {name} optimizer: it has no {optimizer._key!r} entry")
    try:
        whole(own["k"], "the state's k")
        optimizer._take_state = optimizer._prepared({**own, "layers": dict(own["layers"])})
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the state is damaged or of another version: {type(error).__name__}: {error}") from error
    state = map_arrays(state_dict["state"], torch.clone)  # momentum is updated in place
    return {**state_dict, "state": state, "param_groups": [first, *others]}


def _take_state(optimizer: torch.optim.Optimizer) -> None:
    assert isinstance(optimizer, LayerOptimizer)
    optimizer._take_state()
    del optimizer._take_state
    optimizer._discard()
    optimizer._switch()


def _check_setting(name: str, value: Any) -> None:
    if not is_number(value):
        raise InputError(f"{name} must be a number, got {value!r}")
    if not value >= 0:
        raise InputError(f"{name} must not be negative, got {value}")
    if value == math.inf:
        raise InputError(f"{name} must be finite, got {value}")


def _say_skipped(optimizer: LayerOptimizer) -> None:
    """To the log, at the 1st, 2nd, 4th, 8th, ... time."""
    optimizer._skipped = times = optimizer._skipped + 1
    if times & (times - 1):
        return
    so_far = f" ({times} so far)" if times > 1 else ""
    what = "NaN or Inf in the gradients or columns, the step is skipped"
    logger.warning("%s, step %d: %s%s", type(optimizer).__name__, optimizer.k, what, so_far)


def _refuse_sharded(modules: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if is_sharded(module):
            where = f"layer {name!r}" if name else "the model"
            raise InputError(
                f"{where}: its parameters are sharded (FSDP), and K-FAC and SENG need them whole: use "
                "DistributedDataParallel"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """What names the layers: the module that DistributedDataParallel, DataParallel and torch.compile call.

    Args:
        model: the module, or what wraps it.

    Returns:
        The module.

    Raises:
        InputError: that is no module.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be an nn.Module, got {type(model).__name__}")
        parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        inner = model.module if parallel else model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = cast(nn.Module, inner)
