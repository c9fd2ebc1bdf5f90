"""SENG, the baseline of Table 2: sketchy empirical natural gradients (Yang et al. 2021, arXiv:2006.05924).

**Step.** Per layer, the rows of W (n, p) are the n per-sample gradients divided by sqrt(n), so that `W^T W` is the
layer's block of the empirical Fisher matrix, a batch mean. With g the layer's gradient, by Woodbury,

    (W^T W + lam I)^-1 g = (g - W^T (lam I + K)^-1 W g) / lam,    K = W W^T  (n, n).

What W is, and how it is sampled in large layers, is in `kfacerr.torch.curvature`.

Written from the paper and from the hyper-parameters of Puiu's supplement D; the authors' code (GPL) was read for
its conventions only: weight decay, reuse of the curvature, which layers are sketched.
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..exceptions import InputError
from .curvature import (
    Curvature,
    DenseGradients,
    FactoredGradients,
    batch_norm_gradients,
    compressed,
    dense_gradients,
    trains_bias,
)
from .hooks import _Hook, gradient_node, layer_columns, version, wanted
from .lifetime import weakly, without_hooks
from .scaling import lost_scale, probe
from .wrappers import unwrapped

__all__ = ["SENG", "seng_learning_rate"]

log = logging.getLogger(__name__)

_BATCH_NORM = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def seng_learning_rate(epoch: float, lr: float = 0.05, decay_epoch: float = 75, decay_rate: float = 6) -> float:
    """`lr (1 - epoch/decay_epoch)^decay_rate` (supplement D: lr_scheme "exp"), 0 from decay_epoch on.

    Epochs may be fractions: the authors evaluate it every iteration. With a scheduler:
    `LambdaLR(optimizer, lambda epoch: seng_learning_rate(epoch, lr=1.0))`.
    """
    return float(lr * max(0.0, 1 - epoch / decay_epoch) ** decay_rate)


class SENG(torch.optim.Optimizer):
    """Sketchy empirical natural gradient descent; defaults of supplement D, formulas in the module docstring.

        optimizer = SENG(model, lr=0.05, damping=2.0)
        optimizer.zero_grad()
        loss_function(model(x), y).backward()     # the loss averaged over the batch
        optimizer.step()

    Linear, Conv2d and BatchNorm layers are preconditioned, a layer's weight and bias together; the gradient of any
    other parameter (grouped convolutions, layer norms, weights shared by two modules, ...) is divided by
    `1 + damping`, and those are logged once, at construction. The direction d then goes through SGD with momentum
    and a weight decay that is coupled as in SGD but not preconditioned: `buf = momentum buf + d + weight_decay p`,
    `p -= lr buf`. This is what the authors' code does and what weight_decay = 1e-2 is tuned for: inside the
    preconditioner the decay would be halved (damping 2), outside the momentum it would be a tenth. `.grad` is left
    as it is.

    The per-sample gradients are captured at the first step and then at every `update_every`-th one, and are reused
    in between; a skipped step does not count. Captured is whatever `backward()` reached since the last `step()` or
    `zero_grad()` of the optimizer, so micro-batches (each loss divided by their number) give the curvature of the
    whole batch. A step whose gradients are not all finite is skipped, with a warning. With a GradScaler pass the
    scale on: `scaler.step(optimizer, loss_scale=scaler.get_scale())`.

    One process: there is no support for DistributedDataParallel. Checkpoints hold the curvature, about the size of
    the captured columns.

    Args:
        model: the model, whose layers are followed.
        lr: learning rate; see `seng_learning_rate`.
        damping: lam. Like lr, momentum and weight_decay an option of the parameter group, and may change at any
            time; a layer takes its weight's.
        momentum: of SGD.
        weight_decay: of SGD.
        update_every: iterations between two refreshes of the curvature (the authors' curvature_update_freq).
        fim_col_sample_size: c_A and c_G, rows of A and G sampled in large layers; None samples nothing.
        im_size_threshold: a layer is large if it has more weights. Others are exact: those with several positions
            a sample (convolutions) keep W itself, n x p numbers.
        svd_rank: positions a sample that large layers keep (see `compressed`); None keeps all, which is exact but
            costs as much as another backward pass of the layer.
        official_scaling: take K and W g rho times too large, rho = p / (sampled weights), as the authors' code
            does (it scales the sampled entries of W by rho where sqrt(rho) is unbiased). It acts as a damping
            lam/rho inside the inverse: for a layer of 16384 x 2048 weights, rho = 2048. Their code samples c^2
            entries of W in layers below the threshold, too; here these stay exact and only take that rho.
        layers: the names, as in `model.named_modules()`, of the layers to precondition; all that can be, by
            default.
        skip_nonfinite: look at every step for NaN and Inf, which makes the host wait for the device. Without it,
            only steps that refresh the curvature are looked at.
        params: parameters or parameter groups, as for any optimizer; `model.parameters()` by default.
        seed: of the sampling, which disturbs no other random numbers.

    Raises:
        InputError: for settings out of range, unknown or unsupported names, a model in DistributedDataParallel; in
            training, for a layer used twice in one forward or an input overwritten in place before `step()`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.05,
        *,
        damping: float = 2.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        update_every: int = 200,
        fim_col_sample_size: int | None = 128,
        im_size_threshold: int = 700_000,
        svd_rank: int | None = 16,
        official_scaling: bool = False,
        layers: Sequence[str] | None = None,
        skip_nonfinite: bool = True,
        params: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> None:
        _check("update_every", update_every, update_every >= 1, "at least 1")
        _check("im_size_threshold", im_size_threshold, im_size_threshold >= 0, "at least 0")
        for name, value in (("fim_col_sample_size", fim_col_sample_size), ("svd_rank", svd_rank)):
            _check(name, value, value is None or value >= 1, "at least 1, or None")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise InputError("SENG runs in one process: the curvature is not shared by DistributedDataParallel")
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model.parameters() if params is None else params, defaults)
        self.update_every = update_every
        self.fim_col_sample_size = fim_col_sample_size
        self.im_size_threshold = im_size_threshold
        self.svd_rank = svd_rank
        self.official_scaling = official_scaling
        self.skip_nonfinite = skip_nonfinite
        self.model = model = unwrapped(model)
        self._modules = _followed_modules(model, layers)
        self._generator = torch.Generator().manual_seed(seed)
        self._curvature: dict[str, Curvature] = {}
        self._age: int | None = None  # steps since the last refresh; None before the first
        self._steps = 0
        self._forward = 0
        self._captures: dict[str, list[_Capture]] = {}
        self._unreached: set[str] = set()  # layers already logged
        self._hook_up()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as any optimizer does, and checks its options."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, lowest in (("lr", 0), ("momentum", 0), ("weight_decay", 0)):
            _check(name, group[name], group[name] >= lowest, f"at least {lowest}")
        _check("damping", group["damping"], group["damping"] > 0, "above 0")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and what the hooks captured of the backward passes that made them."""
        super().zero_grad(set_to_none)
        self._captures.clear()

    def close(self) -> None:
        """Removes the hooks; the curvature stays as it is. Also done when the optimizer is garbage-collected."""
        self._close()
        self._captures.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss_scale: float | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the loss, with gradients, and returns it.
            loss_scale: what the loss was multiplied with before `backward()`, if `.grad` has been unscaled since.
                1 if it is left out; the first step then refuses a scale that nobody declared, as `KFAC` does.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        captures, self._captures = self._captures, {}
        if (self.skip_nonfinite or self._due) and not self._finite_gradients():
            log.warning("SENG: step %d is skipped, its gradients are not finite", self._steps)
            return loss
        if self._due:
            self._refresh(captures, loss_scale)
        self._descend(self._directions())
        self._steps += 1
        self._age = None if self._age is None else self._age + 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of any optimizer and, under "seng", the curvature by layer name."""
        state = super().state_dict()
        state["seng"] = {
            "age": self._age,
            "steps": self._steps,
            "generator": self._generator.get_state(),
            "curvature": {name: curvature.to_dict() for name, curvature in self._curvature.items()},
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from `state_dict()`."""
        if "seng" not in state_dict:
            raise InputError("the state_dict is not SENG's: it has no entry 'seng'")
        own = state_dict["seng"]
        if unknown := set(own["curvature"]) - set(self._modules):
            raise InputError(f"the state_dict has curvature of layers that are not followed: {sorted(unknown)}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "seng"})
        self._age, self._steps = own["age"], own["steps"]
        self._generator.set_state(own["generator"].cpu())
        self._curvature = {
            name: Curvature.from_dict(state, _weight(self._modules[name]).device)
            for name, state in own["curvature"].items()
        }
        self._captures.clear()

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, together with the model: everything but the hooks and what they captured."""
        own = without_hooks(self, ("_close", "_captures", "_generator"))
        return {**own, "_drawn": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        drawn = state.pop("_drawn", None)
        super().__setstate__(state)
        if drawn is None:  # from torch's load_state_dict
            return
        self._generator = torch.Generator()
        self._generator.set_state(drawn)
        self._captures = {}
        self._hook_up()

    # ---- the step ----

    @property
    def _due(self) -> bool:
        return self._age is None or self._age >= self.update_every

    def _finite_gradients(self) -> bool:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise InputError("SENG takes no sparse gradients (an Embedding with sparse=True)")
        largest = [torch.linalg.vector_norm(grad, math.inf) for grad in grads if grad.numel()]
        return not largest or bool(torch.stack([x.to(largest[0]) for x in largest]).isfinite().all())

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        """The preconditioned gradients of the layers' parameters."""
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        directions: dict[nn.Parameter, Tensor] = {}
        for name, curvature in self._curvature.items():
            weight, bias = _weight(self._modules[name]), cast(nn.Parameter | None, self._modules[name].bias)
            if weight.grad is None or weight not in group_of:
                continue
            dtype = curvature.eigenvalues.dtype
            parts = [weight.grad.reshape(len(weight), -1).to(dtype)]
            if bias is not None and curvature.gradients.weights > weight.numel():
                last = torch.zeros_like(bias) if bias.grad is None else bias.grad
                parts.append(last.to(dtype)[:, None])
            direction = curvature.direction(torch.cat(parts, dim=1), group_of[weight]["damping"])
            if bias is not None and len(parts) == 2:
                directions[bias] = direction[:, -1].to(bias.dtype)
                direction = direction[:, :-1]
            directions[weight] = direction.reshape(weight.shape).to(weight.dtype)
        return directions

    def _descend(self, directions: dict[nn.Parameter, Tensor]) -> None:
        """SGD with momentum; the directions of the other parameters are g / (1 + lam)."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                direction = directions.get(p)
                if direction is None:
                    direction = p.grad / (1 + group["damping"])
                direction = direction.add(p, alpha=group["weight_decay"])
                if group["momentum"]:
                    state = self.state[p]
                    if "momentum_buffer" in state:
                        state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
                    else:
                        state["momentum_buffer"] = direction.clone()
                    direction = state["momentum_buffer"]
                p.add_(direction, alpha=-float(group["lr"]))

    # ---- the curvature ----

    def _refresh(self, captures: "dict[str, list[_Capture]]", loss_scale: float | None) -> None:
        first = self._age is None
        probes: list[tuple[Tensor, Tensor]] = []
        for name, module in self._modules.items():
            if name in captures:
                try:
                    self._curvature[name] = self._curvature_of(
                        name, module, captures.pop(name), loss_scale or 1.0, probes
                    )
                    self._age = 0
                except torch.linalg.LinAlgError as error:
                    log.warning("SENG: layer %r keeps its curvature at step %d: %s", name, self._steps, error)
            elif name not in self._unreached and _weight(module).requires_grad:
                self._unreached.add(name)
                log.warning("SENG: no backward reached layer %r at step %d: no new curvature", name, self._steps)

        if first and loss_scale is None and probes:
            self._check_scale(probes)

    def _check_scale(self, probes: list[tuple[Tensor, Tensor]]) -> None:
        have, want = (torch.cat([v.to(probes[0][0]) for v in part]) for part in zip(*probes, strict=True))
        if (scale := lost_scale(have, want)) is not None:
            raise InputError(
                f"SENG, step {self._steps}: .grad is {scale:g} times smaller than what the backward left: with a "
                "GradScaler call scaler.step(optimizer, loss_scale=scaler.get_scale())"
            )

    def _curvature_of(
        self,
        name: str,
        module: nn.Module,
        captures: "list[_Capture]",
        loss_scale: float,
        probes: list[tuple[Tensor, Tensor]],
    ) -> Curvature:
        """Of all samples captured; n is their total number, so that the rows of W keep their scale."""
        for capture in captures:
            if capture.version not in (None, capture.x._version):
                raise InputError(f"layer {name!r}: its input was overwritten in place between forward and step()")
        if isinstance(module, _BATCH_NORM):
            shares = [batch_norm_gradients(module, c.x, c.gradient, c.statistics) for c in captures]
            _release(captures)
            W = torch.cat(shares).flatten(1)
            return Curvature.of(DenseGradients(W.mul_(math.sqrt(len(W)) / loss_scale)))
        columns = [layer_columns(module, c.x, c.gradient) for c in captures]
        batches = [capture.batch(module) for capture in captures]
        _release(captures)
        n = sum(batches)
        A = _joined([c.A for c in columns], batches)
        G = _joined([c.G for c in columns], batches).div_(loss_scale)
        if module.bias is not None and not trains_bias(module):
            A = A[:-1]
        del columns
        weight = _weight(module)
        if weight.grad is not None:
            v = probe(weight[0].numel(), A)
            probes.append((weight.grad.flatten(1).to(v.dtype) @ v, G @ (A[: len(v)].T @ v)))
        return self._sketch(A, G, n)

    def _sketch(self, A: Tensor, G: Tensor, n: int) -> Curvature:
        d_A, d_G, c = len(A), len(G), self.fim_col_sample_size
        gradients: DenseGradients | FactoredGradients
        if d_A * d_G > self.im_size_threshold:
            if self.svd_rank is not None:
                A, G = compressed(A, G, n, self.svd_rank)
            gradients = FactoredGradients(A, G, n, self._sample(d_A, A.device), self._sample(d_G, A.device))
            overscale = gradients.ratio
        else:
            gradients = dense_gradients(A, G, n) if A.shape[1] > n else FactoredGradients(A, G, n)
            overscale = 1.0 if c is None else max(1.0, d_A * d_G / c**2)
        return Curvature.of(gradients, overscale if self.official_scaling else 1.0)

    def _sample(self, d: int, device: torch.device) -> Tensor | None:
        """Rows, uniformly without replacement; None for all of them."""
        c = self.fim_col_sample_size
        if c is None or c >= d:
            return None
        return torch.randperm(d, generator=self._generator)[:c].sort().values.to(device)

    # ---- hooks ----

    def _hook_up(self) -> None:
        self._close = weakref.finalize(self, _remove, self._attach(self.model))
        self._close.atexit = False

    def _attach(self, model: nn.Module) -> list[Any]:
        """Forward hooks that put a tensor hook on the output (see `ColumnHooks`); they do not keep self alive."""
        handles: list[Any] = [model.register_forward_pre_hook(_Hook(weakly(self._on_model_forward)))]
        for name, module in self._modules.items():
            hook = _Hook(weakly(self._on_layer_forward), name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _on_model_forward(self, model: nn.Module, args: Any) -> None:
        self._forward += 1

    def _on_layer_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not (self._due and torch.is_grad_enabled() and output.requires_grad and _weight(module).requires_grad):
            return
        statistics = None
        if isinstance(module, _BATCH_NORM) and not module.training and module.running_mean is not None:
            statistics = (module.running_mean.clone(), cast(Tensor, module.running_var).clone())
        x = (args[0] if args else kwargs["input"]).detach()
        # Only the graph holds the capture until a gradient comes, so a forward without a backward leaves nothing.
        capture = _Capture(x, statistics, self._forward, gradient_node(module))
        output.register_hook(lambda grad: self._on_gradient(name, capture, grad))

    def _on_gradient(self, name: str, capture: "_Capture", grad: Tensor) -> None:
        if capture.released or not wanted(capture.node):
            return
        captures = self._captures.setdefault(name, [])
        if capture in captures:  # a second backward through a retained graph
            capture.gradient = capture.gradient + grad.detach()
            return
        if any(other.forward == capture.forward for other in captures):
            raise InputError(
                f"layer {name!r} is used twice in one forward: leave it out of SENG's `layers`; its gradient is "
                "then divided by 1 + damping"
            )
        capture.gradient = grad.detach()
        captures.append(capture)


class _Capture:
    """One pass of one layer: its input and, after the backward, the gradient of its output."""

    __slots__ = ("forward", "gradient", "node", "released", "statistics", "version", "x")

    gradient: Tensor

    def __init__(self, x: Tensor, statistics: tuple[Tensor, Tensor] | None, forward: int, node: Any) -> None:
        self.x = x
        self.version = version(x)
        self.node = node
        self.statistics = statistics
        self.forward = forward
        self.released = False

    def release(self) -> None:
        """Frees the tensors, which the graph would hold as long as it lives."""
        self.released = True
        self.x = self.gradient = torch.empty(0)

    def batch(self, module: nn.Module) -> int:
        """The number of samples; an input without a batch dimension is one."""
        unbatched = 3 if isinstance(module, nn.Conv2d) else 1
        return 1 if self.x.ndim == unbatched else len(self.x)


def _release(captures: list[_Capture]) -> None:
    for capture in captures:
        capture.release()


def _joined(columns: list[Tensor], batches: list[int]) -> Tensor:
    """The columns (d, b_j T_j) of several passes side by side; zero columns fill up to the largest T_j."""
    if len(columns) == 1:
        return columns[0]
    longest = max(X.shape[1] // b for X, b in zip(columns, batches, strict=True))
    filled = []
    for X, b in zip(columns, batches, strict=True):
        positions = X.reshape(len(X), b, -1)
        filled.append(F.pad(positions, (0, longest - positions.shape[2])).flatten(1))
    return torch.cat(filled, dim=1)


def _weight(module: nn.Module) -> nn.Parameter:
    return cast(nn.Parameter, module.weight)


def _followed_modules(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers to precondition by name; logs the modules whose parameters are divided by 1 + damping."""
    uses: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[parameter] = uses.get(parameter, 0) + 1
    reasons = {
        name: _unfollowable(module, uses)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    modules = dict(model.named_modules())
    if layers is None:
        layers = [name for name, reason in reasons.items() if reason is None]
        others = [f"{name or 'the model itself'} ({reason})" for name, reason in reasons.items() if reason]
        if others:
            log.warning("SENG: gradients are only divided by 1 + damping in: %s", ", ".join(others))
    for name in layers:
        if name not in modules:
            known = ", ".join(name for name, reason in reasons.items() if reason is None)
            raise InputError(f"the model has no layer {name!r}; SENG can precondition: {known or 'none'}")
        if reason := reasons.get(name, "it has no parameters"):
            raise InputError(f"SENG cannot precondition layer {name!r}: {reason}")
    return {name: modules[name] for name in layers}


def _unfollowable(module: nn.Module, uses: dict[nn.Parameter, int]) -> str | None:
    """Why a module cannot be preconditioned, or None if it can."""
    if not isinstance(module, nn.Linear | nn.Conv2d | _BATCH_NORM):
        return type(module).__name__
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"grouped convolution, groups={module.groups}"
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own:
        return "parametrized weight"
    if any(uses[parameter] > 1 for parameter in own.values()):
        return "weights shared with another module"
    return None


def _check(name: str, value: object, valid: bool, what: str) -> None:
    if not valid:
        raise InputError(f"SENG: {name} must be {what}, got {value!r}")


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
