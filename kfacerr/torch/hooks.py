"""The live stream: K-factor columns `(A_k, G_k)` of named layers, caught during forward and backward.

The mathematics (`linear_columns`, `conv2d_columns`) stands apart from the hooks (`ColumnHooks`).

**Scaling.** With b the batch size and a loss that is averaged over the batch, column i of A is
`[a_i; 1]/sqrt(b)` and column i of G is `sqrt(b) dLoss/do_i`, so that eq. (20), `Mat(g) = G A^T`, holds
exactly: `G A^T = [weight.grad.flatten(1), bias.grad]`. Further dimensions of a Linear's input (a sequence)
and the spatial positions T of a convolution are extra columns, n = b |T|, as in Grosse & Martens (2016), "A
Kronecker-factored approximate Fisher matrix for convolution layers". Their factors are
`Omega = E[sum_t a_t a_t^T]` and `Gamma = (1/|T|) E[sum_t ds_t ds_t^T]`, E the mean over the batch and ds the
gradient of one sample's own loss. Here `A A^T = Omega` and `G G^T = |T| Gamma`. Damping by a share of the
largest eigenvalue scales with the factor, so the constant |T| only divides the inverse of G by |T|: no
relative error, and no angle, sees it.
"""

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..exceptions import InputError
from ..stream import Columns

__all__ = ["ColumnHooks", "conv2d_columns", "followable_layers", "layer_columns", "linear_columns"]


# ------------------------------------------------------------------------------------------- mathematics


def linear_columns(layer: nn.Linear, x: Tensor, grad: Tensor) -> Columns:
    """The columns of a fully connected layer; see the module docstring for the scaling.

    Args:
        layer: the layer; only whether it has a bias is used.
        x: its input (b, ..., d_in); the first dimension is the batch, the others are positions.
        grad: dLoss/do (b, ..., d_out), o the layer's output and the loss averaged over the batch.

    Returns:
        A (d_in + bias, n) and G (d_out, n), n = b times the number of positions, in float32, or float64 if
        either input is.
    """
    batch = x.shape[0] if x.ndim > 1 else 1
    return _scaled(x.reshape(-1, x.shape[-1]).T, grad.reshape(-1, grad.shape[-1]).T, batch, layer.bias is not None)


def conv2d_columns(layer: nn.Conv2d, x: Tensor, grad: Tensor) -> Columns:
    """The columns of a 2-D convolution (Grosse & Martens 2016, §3); scaling in the module docstring.

    Args:
        layer: the layer, with groups = 1; kernel, stride, padding (numbers, "same" or "valid"), padding mode
            and dilation are honoured.
        x: its input (b, c_in, h, w) or, unbatched, (c_in, h, w).
        grad: dLoss/do (b, c_out, h', w'), o the layer's output and the loss averaged over the batch.

    Returns:
        A (c_in * kh * kw + bias, n), its rows in the order of `layer.weight.flatten(1)`, and G (c_out, n),
        n = b h' w' with the positions of one image side by side; float32, or float64 if either input is.
    """
    if x.ndim == 3:
        x, grad = x.unsqueeze(0), grad.unsqueeze(0)
    # im2col has no half-precision kernel everywhere, so the cast comes first.
    x = F.pad(x.to(_common_dtype(x, grad)), _pad_widths(layer), mode=_pad_mode(layer))
    patches = F.unfold(x, _pair(layer.kernel_size), _pair(layer.dilation), 0, _pair(layer.stride))
    a = patches.transpose(0, 1).flatten(1)  # (b, c kh kw, T) -> (c kh kw, b T)
    g = grad.transpose(0, 1).flatten(1)  # (b, c_out, h', w') -> (c_out, b T)
    return _scaled(a, g, x.shape[0], layer.bias is not None)


def layer_columns(layer: nn.Module, x: Tensor, grad: Tensor) -> Columns:
    """`linear_columns` or `conv2d_columns`, by the layer's type."""
    if isinstance(layer, nn.Linear):
        return linear_columns(layer, x, grad)
    if isinstance(layer, nn.Conv2d):
        return conv2d_columns(layer, x, grad)
    raise InputError(f"columns are defined for Linear and Conv2d, not for {type(layer).__name__}")


def _scaled(a: Tensor, g: Tensor, batch: int, bias: bool) -> Columns:
    """[a; 1]/sqrt(b) and sqrt(b) g from a (d_in, n) and g (d_out, n), in the common dtype."""
    dtype = _common_dtype(a, g)
    scale = math.sqrt(max(batch, 1))  # an empty batch has no columns to scale
    A = a.new_empty((a.shape[0] + bias, a.shape[1]), dtype=dtype)
    A[: a.shape[0]] = a
    A[a.shape[0] :] = 1
    return Columns(A.div_(scale), g.to(dtype).mul(scale).contiguous())


def _common_dtype(x: Tensor, grad: Tensor) -> torch.dtype:
    """float64 if either is; otherwise float32, for bf16 would spoil the second moments."""
    return torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)


def _pad_widths(layer: nn.Conv2d) -> list[int]:
    """The padding (left, right, top, bottom) as `F.pad` takes it."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        # Conv2d puts the odd one of the d (k - 1) zeros at the end.
        total = [d * (k - 1) for d, k in zip(_pair(layer.dilation), _pair(layer.kernel_size), strict=True)]
        (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
        return [left, right, top, bottom]
    height, width = _pair(cast(tuple[int, ...], layer.padding))
    return [width, width, height, height]


def _pad_mode(layer: nn.Conv2d) -> str:
    return "constant" if layer.padding_mode == "zeros" else layer.padding_mode


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width


# ------------------------------------------------------------------------------------------------- hooks


def followable_layers(model: nn.Module) -> list[str]:
    """The names of the layers that `ColumnHooks` can follow, in the model's order."""
    return [name for name, module in model.named_modules() if _unfollowable(module) is None]


def _unfollowable(module: nn.Module) -> str | None:
    """Why a module cannot be followed, or None if it can."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"is a {type(module).__name__}, not a Linear or Conv2d"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "is part of a MultiheadAttention, which uses its weight without calling it"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"is a grouped convolution (groups={module.groups}), whose gradient is no single G A^T"
    return None


class ColumnHooks:
    """Follows named Linear and Conv2d layers of any model and hands out their columns after each backward.

        with ColumnHooks(model, ["features.0", "classifier.0"]) as hooks:
            loss_function(model(x), y).backward()
            A, G = hooks.pop()["classifier.0"]

    Nothing is captured while `enabled` is False, under `no_grad`, or where a layer's output needs no
    gradient, so evaluation between the steps disturbs nothing; nor by a backward that has no use for the gradient
    of a layer's trained weight, as `autograd.grad` with respect to the inputs. The input is held by reference, not
    copied, from the forward until `pop()`, where the columns are formed. Copies of a hooked model (deepcopy,
    pickle) carry no live hooks.

    One forward, one backward, one `pop()`: with micro-batches, pop after each. A forward whose backward never
    came is forgotten at the next forward of the model. What would give wrong columns is refused with an
    `InputError`: a layer used twice in one forward (activation checkpointing included), two forwards in one
    backward, two backwards without a `pop()`, an input overwritten in place before `pop()`.

    Args:
        model: the model whose call makes up one forward.
        layers: names as in `model.named_modules()`.
        way_out: what errors in training advise in place of the methods of this class, which a user may not see.

    Attributes:
        enabled: switch; True at the start.
        layers: the names, in the order given.

    Raises:
        InputError: for an unknown or repeated name, another type of layer, or a grouped convolution.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], way_out: str | None = None) -> None:
        self.enabled = True
        self._way_out = way_out
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self._modules = _find_layers(model, self.layers)
        self._captures: dict[str, _Capture] = {}
        # A forward hook that puts a tensor hook on the output: full backward hooks wrap the output in a view,
        # which breaks with an in-place activation behind the layer.
        self._handles = [model.register_forward_pre_hook(_Hook(self._on_model_forward))]
        for name, module in self._modules.items():
            hook = _Hook(self._on_layer_forward, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

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
        captures, self._captures = self._captures, {}
        try:
            return {name: self._columns(name, captures.get(name), loss_scale) for name in self.layers}
        finally:
            for capture in captures.values():
                capture.release()

    def pending(self) -> "dict[str, Pending]":
        """What `pop()` would find: the layers that a forward and a backward have reached since the last one."""
        return {
            name: Pending(_batch_size(self._modules[name], capture.x), capture.grad.dtype)
            for name, capture in self._captures.items()
            if capture.x is not None and capture.grad is not None
        }

    def forget(self) -> None:
        """Drops what was captured, as `pop()` does, without forming columns."""
        captures, self._captures = self._captures, {}
        for capture in captures.values():
            capture.release()

    def close(self) -> None:
        """Removes the hooks and forgets what was captured. May be called again."""
        self.enabled = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for capture in self._captures.values():
            capture.release()
        self._captures.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _columns(self, name: str, capture: "_Capture | None", loss_scale: float) -> Columns:
        if capture is None or capture.x is None:
            why = "" if self.enabled else " (the hooks are disabled or closed)"
            raise InputError(
                f"layer {name!r} was not reached by a forward with gradients since the last pop(){why}"
            )
        if capture.grad is None:
            raise InputError(f"layer {name!r} was reached by the forward but by no backward: nothing to pop()")
        if capture.overwritten:
            self._refuse(name, "had its input overwritten in place after the forward", "call pop() before")
        with torch.no_grad():
            columns = layer_columns(self._modules[name], capture.x, capture.grad)
            return columns if loss_scale == 1.0 else columns._replace(G=columns.G.div_(loss_scale))

    def _on_model_forward(self, model: nn.Module, args: Any) -> None:
        """A new forward begins: what an earlier one left without a backward is stale."""
        if not (self.enabled and torch.is_grad_enabled()):
            return
        self._refuse_unpopped()
        for capture in self._captures.values():
            capture.replace()
        self._captures.clear()

    def _on_layer_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not (self.enabled and torch.is_grad_enabled() and output.requires_grad):
            return
        if name in self._captures:
            self._refuse_unpopped()
            self._refuse(
                name,
                "is used twice in one forward (activation checkpointing included): its columns would be mixed up",
                "follow the other layers only",
            )
        x = (args[0] if args else kwargs["input"]).detach()  # shares memory and version; lets go of the graph
        capture = self._captures[name] = _Capture(x, gradient_node(module))
        output.register_hook(lambda grad: self._on_gradient(name, capture, grad))

    def _on_gradient(self, name: str, capture: "_Capture", grad: Tensor) -> None:
        if not (self.enabled and wanted(capture.node)):
            return
        if capture.replaced:
            self._refuse(
                name,
                "is reached by a backward through a forward that a later one has replaced (use one forward per "
                "backward, and evaluate under no_grad)",
                "set enabled = False meanwhile",
            )
        if capture.grad is not None:
            self._refuse_unpopped()
        if capture.x is not None:  # None: popped already, this is another backward through a retained graph
            capture.grad = grad.detach()

    def _refuse_unpopped(self) -> None:
        for name, capture in self._captures.items():
            if capture.grad is not None:
                self._refuse(
                    name,
                    "got a second backward through one forward, or the columns of the previous one were not taken",
                    "call pop() after each backward, or set enabled = False",
                )

    def _refuse(self, name: str, what: str, advice: str) -> NoReturn:
        raise InputError(f"layer {name!r} {what}; {self._way_out or advice}")


def gradient_node(module: nn.Module) -> Any:
    """What accumulates the gradient of a layer's trained weight; None if the weight is frozen or computed.

    Nor does the compiler let one see it.
    """
    weight = module._parameters.get("weight")
    if weight is None or not weight.requires_grad or torch.compiler.is_compiling():
        return None
    return weight.view_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def wanted(node: Any) -> bool:
    """Whether the running backward has a use for the gradient that `node` accumulates."""
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so it answers for a leaf that autograd.grad asks for
        return True


class Pending(NamedTuple):
    """A layer's completed pass: its batch size and the precision its backward ran in."""

    batch: int
    dtype: torch.dtype


def _batch_size(module: nn.Module, x: Tensor) -> int:
    """The b of the scaling of `layer_columns`; inputs without a batch dimension are a batch of one."""
    return x.shape[0] if x.ndim > (3 if isinstance(module, nn.Conv2d) else 1) else 1


def version(x: Tensor) -> int | None:
    """Counts the writes to x; None where the compiler runs, which makes them without writing."""
    return None if torch.compiler.is_compiling() else x._version


class _Capture:
    """One pass of one layer: its input and, after the backward, the gradient of its output."""

    __slots__ = ("grad", "node", "replaced", "version", "x")

    def __init__(self, x: Tensor, node: Any) -> None:
        self.x: Tensor | None = x
        self.version = version(x)
        self.node = node
        self.grad: Tensor | None = None
        self.replaced = False

    @property
    def overwritten(self) -> bool:
        return self.x is not None and self.version not in (None, self.x._version)

    def release(self) -> None:
        """Frees the tensors; a later backward through the same graph is ignored."""
        self.x = self.grad = None

    def replace(self) -> None:
        """Frees the tensors; a later backward through the same graph is refused."""
        self.release()
        self.replaced = True


class _Hook:
    """A module hook bound to its owner; its deep copies and pickles are inert.

    Without this a deepcopy of the model would copy the owner with its captured graph tensors (which torch
    refuses), or let the copy's forwards write into the original's captures.
    """

    def __init__(self, call: Callable[..., None] | None = None, *bound: Any) -> None:
        self._call, self._bound = call, bound

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*self._bound, *args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()


def _find_layers(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The named modules, or an error that lists what could have been named."""
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates = f"the model's Linear and Conv2d layers: {', '.join(followable_layers(model)) or 'none'}"
    if not names:
        raise InputError(f"no layer is named; {candidates}")
    found: dict[str, nn.Module] = {}
    for name in names:
        if name not in modules:
            raise InputError(f"the model has no layer {name!r}; {candidates}")
        if reason := _unfollowable(modules[name]):
            raise InputError(f"layer {name!r} {reason}; {candidates}")
        if name in found:
            raise InputError(f"layer {name!r} is named twice")
        found[name] = modules[name]
    return found
