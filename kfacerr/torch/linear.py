"""The drop-in for `nn.Linear` of Algorithm 8: a backward that keeps the factors G, A and does not form `G A^T`.

`KFAC` makes a model's linear layers so, and `factored` does it for an optimizer of your own; parameters and the
keys of `state_dict` stay. `.grad` of such a layer's parameters is there as the factors of each backward, and is
formed when something reads it. `KFAC` does not read it: it preconditions the factors and forms the step alone
(Algorithm 8). Whatever does read it gets the gradient that `nn.Linear` would have left, at the same cost: SGD,
`clip_grad_norm_`, a `GradScaler`, a print. So nothing trains wrongly; at worst nothing is saved.

The gradient is formed in the backward, as by `nn.Linear`, where deferring it would save nothing or could not be
exact: the factors of all backwards since the last step take more memory than the gradient; hooks on the parameters
want it; `autograd.grad` asks for it; `create_graph=True` (a double backward then works); torch.distributed is
initialised (DistributedDataParallel averages gradients below Python); under torch.compile and torch.func.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks
from ..exceptions import InputError
from ._autograd import wanted

__all__ = ["FactoredLinear", "FactoredParameter", "factored"]

Model = TypeVar("Model", bound=nn.Module)
_grad: Any = torch.Tensor.grad  # the slot that autograd and the property below share


class Share(NamedTuple):
    """What one backward adds to a gradient: `grad^T x`, or the sum of the rows of `grad` for a bias.

    Attributes:
        x: (n, d_in) inputs, None for a bias.
        grad: (n, d_out) gradients of the outputs.
        version: of x, which is no copy.
    """

    x: Tensor | None
    grad: Tensor
    version: int

    @property
    def numel(self) -> int:
        return self.grad.numel() + (0 if self.x is None else self.x.numel())

    @property
    def inputs(self) -> Tensor:
        """x of a weight, as it was in the forward."""
        self.check()
        assert self.x is not None
        return self.x

    def formed(self) -> Tensor:
        self.check()
        return self.grad.sum(0) if self.x is None else self.grad.T @ self.x

    def times(self, v: Tensor) -> Tensor:
        """The gradient times v (d_in,), or the scalar v for a bias, in v's precision; linear in d_in + d_out."""
        self.check()
        grad = self.grad.to(v.dtype)
        return grad.sum(0) * v if self.x is None else grad.T @ (self.x.to(v.dtype) @ v)

    def check(self) -> None:
        if self.x is not None and self.x._version != self.version:
            raise InputError("FactoredLinear: its input was overwritten in place before the gradient was used")


class FactoredParameter(nn.Parameter):
    """A parameter whose `.grad` may be there as factors until it is read."""

    _shares: tuple[Share, ...] = ()
    _spent = False  # whether a step has used shares that are still there

    @property
    def grad(self) -> Tensor | None:
        self.form()
        return formed(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._shares, self._spent = (), False
        _grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    @torch.no_grad()
    def form(self, loss_scale: float = 1.0) -> None:
        """Adds what is held as factors, divided by `loss_scale`, to the gradient that is there."""
        shares, self._shares, self._spent = self._shares, (), False
        for share in shares:
            with torch.autocast(self.device.type, enabled=False):
                J = share.formed().to(self.dtype)
            if loss_scale != 1.0:
                J /= loss_scale
            there = formed(self)
            if there is None:
                _grad.__set__(self, J)
            else:
                there += J

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


def held(p: Tensor) -> tuple[Share, ...]:
    """The part of a parameter's gradient that is held as factors."""
    return p._shares if isinstance(p, FactoredParameter) else ()


def formed(p: Tensor) -> Tensor | None:
    """The part of a parameter's gradient that is formed; unlike `.grad`, this forms nothing."""
    return cast(Tensor | None, _grad.__get__(p))


def has_gradient(p: Tensor) -> bool:
    """`p.grad is not None`, without forming it."""
    return bool(held(p)) or formed(p) is not None


def finite_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """0-d booleans: whether the gradients, formed or held as factors, are finite."""
    finite = []
    for p in parameters:
        parts = [] if (g := formed(p)) is None else [g.coalesce().values() if g.is_sparse else g]
        for share in held(p):
            parts += [share.grad] if share.x is None else [share.grad, share.x]
        finite += [torch.stack(torch.aminmax(X)).isfinite().all() for X in parts if X.numel()]
    return finite


def forget(parameters: Iterable[Tensor]) -> None:
    """Drops what is held as factors."""
    for p in parameters:
        if isinstance(p, FactoredParameter):
            p._shares, p._spent = (), False


def spend(parameters: Iterable[Tensor]) -> None:
    """Marks what is held as factors as used by a step: it can be read until it is cleared."""
    for p in parameters:
        if isinstance(p, FactoredParameter):
            p._spent = bool(p._shares)


def is_spent(p: Tensor) -> bool:
    """Whether a part of a parameter's gradient was used by a step before, and not cleared."""
    return isinstance(p, FactoredParameter) and p._spent


class _Linear(torch.autograd.Function):
    """x W^T + b, whose backward leaves Mat(g) = G A^T in its factors (Algorithm 8 l.2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FactoredParameter, bias: FactoredParameter | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameters = weight, bias
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        for_weight = for_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            for_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
            if ctx.needs_input_grad[1] and wanted(_node(ctx, 1)):
                share = Share(x_rows.detach(), rows.detach(), x_rows._version)
                if not _deferred(ctx, 1, share):
                    for_weight = rows.T @ x_rows
            if ctx.needs_input_grad[2] and wanted(_node(ctx, 2)):
                share = Share(None, rows.detach(), 0)
                # Beside a weight whose gradient is formed there is nothing to save.
                if for_weight is not None or not _deferred(ctx, 2, share):
                    for_bias = rows.sum(0)
        return for_x, for_weight, for_bias


def _node(ctx: Any, index: int) -> Any:
    return ctx.next_functions[index][0]


def _deferred(ctx: Any, index: int, share: Share) -> bool:
    """Leaves the gradient in its factors, if it may and this saves memory."""
    p: FactoredParameter = ctx.parameters[index - 1]
    if torch.is_grad_enabled() or p._backward_hooks or p._post_accumulate_grad_hooks:
        return False
    try:
        torch._C._will_engine_execute_node(_node(ctx, index))
    except RuntimeError:
        return False  # autograd.grad hands it out and accumulates nothing
    if share.x is None:
        weight = ctx.parameters[0]
        if not weight.requires_grad or not weight._shares:
            return False
    elif sum(s.numel for s in p._shares) + share.numel > p.numel():
        return False
    p._shares = (*p._shares, share)
    return True


class FactoredLinear(nn.Linear):
    """`nn.Linear` with the backward of this module; arguments, parameters and state_dict are those of nn.Linear.

    Attributes:
        defer: whether the backward may leave the gradient in its factors; False makes it an `nn.Linear`.
    """

    defer = True

    def forward(self, input: Tensor) -> Tensor:
        if not (self.defer and torch.is_grad_enabled() and self._may_defer()):
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and input.is_floating_point() and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(kind))  # what the backward reads, as with nn.Linear
        return cast(Tensor, _Linear.apply(input, self.weight, self.bias))

    def _may_defer(self) -> bool:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False
        for name in ("weight", "bias"):
            p = self._parameters.get(name)
            if p is None:
                if name == "weight" or self.bias is not None:
                    return False  # computed from other parameters
            elif type(p) is nn.Parameter:  # new, or replaced by load_state_dict(assign=True), a pickle, ...
                p.__class__ = FactoredParameter
            elif type(p) is not FactoredParameter:
                return False
        return self.weight.requires_grad


def factored(model: Model, names: Iterable[str] | None = None) -> Model:
    """Makes Linear layers of a model `FactoredLinear`s, in place; each stays the object it is, with its hooks.

    Args:
        model: the network.
        names: of the layers, as in `model.named_modules()`; all that are an `nn.Linear` if None. Subclasses of
            nn.Linear have a forward of their own, or none that is called, and are left alone.

    Returns:
        `model`.

    Raises:
        InputError: there is no such layer, or it is not an nn.Linear.
    """
    modules = dict(checks.instance(model, "the model", nn.Module).named_modules())
    chosen: Iterable[str] = [n for n, m in modules.items() if type(m) is nn.Linear]
    if names is not None:
        chosen = checks.names((names,) if isinstance(names, str) else names, "names")
    for name in chosen:
        if name not in modules:
            raise InputError(f"the model has no layer {name!r}")
        if type(modules[name]) not in (nn.Linear, FactoredLinear):
            raise InputError(f"layer {name!r} is a {type(modules[name]).__name__}, not an nn.Linear")
    for name in chosen:
        modules[name].__class__ = FactoredLinear
    return model
