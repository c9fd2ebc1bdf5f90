"""SENG, the baseline of Table 2: sketchy empirical natural gradients (Yang et al. 2021, arXiv:2006.05924).

**Step.** Per layer, the rows of W (n, p) are the n per-sample gradients divided by sqrt(n), so that `W^T W` is the
layer's block of the empirical Fisher matrix, a batch mean. With g the layer's gradient, by Woodbury,

    (W^T W + lam I)^-1 g = (g - W^T (lam I + K)^-1 W g) / lam,    K = W W^T  (n, n).

What W is, and how it is sampled in large layers, is in `kfacerr.torch._curvature`.

Written from the paper and from the hyper-parameters of Puiu's supplement D; the authors' code (GPL) was read for
its conventions only: weight decay, reuse of the curvature, which layers are sketched.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..array import map_arrays
from ..checks import is_number, names, whole
from ..exceptions import InputError
from ._curvature import (
    Curvature,
    DenseGradients,
    FactoredGradients,
    batch_norm_gradients,
    compressed,
    dense_gradients,
)
from ._direction import Direction
from ._layer import Layer
from ._scaling import ScaleProbe
from .distributed import Team
from .follower import Capture, shared_parameters
from .layer_optimizer import LayerOptimizer, unwrapped
from .linear import finite_gradients

__all__ = ["PAPER_SENG", "SENG", "seng_learning_rate"]

logger = logging.getLogger(__name__)

PAPER_SENG: dict[str, Any] = {
    "lr": 0.05,
    "damping": 2.0,
    "momentum": 0.9,
    "weight_decay": 1e-2,
    "update_every": 200,
}
"""The settings of supplement D: `SENG(model, **PAPER_SENG)`, with `seng_learning_rate` as its schedule."""

_BATCH_NORM = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def seng_learning_rate(epoch: float, lr: float = 0.05, decay_epoch: float = 75, decay_rate: float = 6) -> float:
    """`lr (1 - epoch/decay_epoch)^decay_rate` (supplement D: lr_scheme "exp"), 0 from decay_epoch on.

    Epochs may be fractions: the authors evaluate it every iteration. With a scheduler:
    `LambdaLR(optimizer, lambda epoch: seng_learning_rate(epoch, lr=1.0))`.
    """
    return float(lr * max(0.0, 1 - epoch / decay_epoch) ** decay_rate)


class SENGLayer(Layer):
    """A layer that SENG preconditions.

    Attributes:
        curvature: of the last refresh; None before the first that reached the layer.
    """

    curvature: Curvature | None = None

    @property
    def with_bias(self) -> bool:
        """Whether the bias is a column of Mat(g): it is if it was trained when the curvature was taken."""
        if self.curvature is not None:
            return self.curvature.gradients.weights > self.weight.numel()
        return super().with_bias

    def norm_gradients(self, captures: Sequence[Capture]) -> DenseGradients:
        """W of a batch norm; releases the captures."""
        shares = []
        for c in captures:
            assert c.grad is not None
            shares.append(batch_norm_gradients(self.module, c.x, c.grad, c.statistics, bias=self.with_bias))
            c.release()
        W = torch.cat(shares).flatten(1)
        return DenseGradients(W.mul_(math.sqrt(len(W)) / self.loss_scale))

    def state_dict(self) -> dict[str, Any] | None:
        """Live tensors and plain values; None before the first curvature."""
        return None if self.curvature is None else self.curvature.state_dict()

    def restored(self, state: Mapping[str, Any] | None) -> Curvature | None:
        """The curvature that `state_dict` gave, on the weight's device."""
        device = self.weight.device
        return None if state is None else Curvature.from_state(map_arrays(dict(state), lambda t: t.to(device)))


class SENG(LayerOptimizer):
    """Sketchy empirical natural gradient descent; formulas in the module docstring, defaults in docs/recipes.md.

        optimizer = SENG(model)  # with the settings of supplement D: SENG(model, **PAPER_SENG)
        optimizer.zero_grad()
        loss_function(model(x), y).backward()     # the loss averaged over the batch
        optimizer.step()

    Linear, convolution and BatchNorm layers are preconditioned, a layer's weight and bias together; the gradient
    of any other parameter (grouped convolutions, layer norms, weights shared by two modules, ...) is divided by
    `1 + damping`, and those are logged once, at construction. The direction d then goes through SGD with momentum
    and a weight decay that is coupled as in SGD but not preconditioned: `buf = momentum buf + d + weight_decay p`,
    `p -= lr buf`. This is what the authors' code does and what their weight_decay = 1e-2 is tuned for:
    inside the preconditioner the decay would be halved (damping 2), outside the momentum it would be a tenth.
    `.grad` is left as it is.

    The per-sample gradients are captured at the first step and then at every `update_every`-th one, and are reused
    in between; a skipped step does not count. Micro-batches (each loss divided by their number) give the curvature
    of the whole batch. A step whose gradients are not all finite is skipped, with a warning. Checkpoints hold the
    curvature, about the size of the captured columns.

    One process: the curvature is not shared by several.

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
        layers: the names, as in `model.named_modules()`, of the layers to precondition; all that can be, by
            default.
        loss_scale: see `LayerOptimizer`.
        skip_nonfinite: look at every step for NaN and Inf, which makes the host wait for the device. Without it,
            only steps that refresh the curvature are looked at.
        data_parallel: False if torch.distributed is initialised and each process trains a model of its own.
        params: parameters or parameter groups, as for any optimizer; `model.parameters()` by default.
        seed: of the sampling, which disturbs no other random numbers.

    Raises:
        InputError: for settings out of range, unknown or unsupported names, a model in DistributedDataParallel; in
            training, for a layer used twice in one backward, an input overwritten in place before `step()`, or
            several processes.
    """

    _key = "seng"
    _plain = "gradients are only divided by 1 + damping"
    _way_out = "leave it out of SENG's `layers`: its gradient is then divided by 1 + damping"

    layers: dict[str, SENGLayer]

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.03,
        *,
        damping: float = 0.5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        update_every: int = 50,
        fim_col_sample_size: int | None = 128,
        im_size_threshold: int = 700_000,
        svd_rank: int | None = 16,
        layers: Sequence[str] | None = None,
        loss_scale: float | Callable[[], float] = 1.0,
        skip_nonfinite: bool = True,
        data_parallel: bool = True,
        params: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> None:
        whole(update_every, "update_every", 1)
        whole(im_size_threshold, "im_size_threshold")
        whole(seed, "seed", 0, 2**63 - 1)
        for name, value in (("fim_col_sample_size", fim_col_sample_size), ("svd_rank", svd_rank)):
            if value is not None:
                whole(value, name, 1)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise InputError("SENG runs in one process: the curvature is not shared by DistributedDataParallel")
        self.update_every = update_every
        self.fim_col_sample_size = fim_col_sample_size
        self.im_size_threshold = im_size_threshold
        self.svd_rank = svd_rank
        self._drawn = torch.Generator().manual_seed(seed).get_state()
        self._age: int | None = None  # steps since the last refresh; None before the first
        there = {name for name, _ in unwrapped(model).named_modules()}
        chosen = there if layers is None else names(layers, "layers")
        super().__init__(
            model,
            params,
            {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay},
            loss_scale=loss_scale,
            skip_nonfinite=skip_nonfinite,
            data_parallel=data_parallel,
            left_out=there - set(chosen),
        )
        modules = dict(self.model.named_modules())
        for name in layers or ():
            if name not in modules:
                raise InputError(f"the model has no layer {name!r}")
            if why := self._why_plain(name, modules[name], shared_parameters(self.model)):
                raise InputError(f"layer {name!r} {why[0]}: SENG cannot precondition it")

    # ----------------------------------------------------------------------------------------- following

    def _unfollowable(self, module: nn.Module) -> str | None:
        if isinstance(module, _BATCH_NORM):
            return None
        return super()._unfollowable(module)

    def _made_layer(self, name: str, module: nn.Module, shared: set[nn.Parameter]) -> SENGLayer:
        return SENGLayer(name, module, self._mine, shared)

    def _wanted(self) -> set[str]:
        return set(self.layers) if self._due else set()

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        damping = group["damping"]
        if not is_number(damping) or not 0 < damping < math.inf:
            raise InputError(f"damping must be above 0, got {damping!r}")

    # ---------------------------------------------------------------------------------------------- step

    @property
    def _due(self) -> bool:
        return self._age is None or self._age >= self.update_every

    def _check(self) -> None:
        super()._check()
        if Team(self.data_parallel).size > 1:
            raise InputError(
                "SENG runs in one process, as the curvature is not shared; pass data_parallel=False if each "
                "process trains its own model"
            )

    def _advance(self, captures: Mapping[str, Sequence[Capture]], team: Team) -> bool:
        if (self.skip_nonfinite or self._due) and not bool(self._all(finite_gradients(self._parameters()))):
            return False
        if self._due:
            self._refresh(captures, team)
        self._descend(self._directions())
        self._age = None if self._age is None else self._age + 1
        return True

    def _directions(self) -> Iterator[tuple[nn.Parameter, Direction]]:
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for layer in self.layers.values():
            if layer.curvature is not None and layer.has_gradient:
                J = layer.gradient().to(layer.curvature.eigenvalues.dtype)
                yield from layer.split(layer.curvature.direction(J, groups[layer.weight]["damping"])).items()

    def _undirected(self, grad: Tensor, group: Mapping[str, Any]) -> Tensor:
        return grad / (1 + group["damping"])

    # ----------------------------------------------------------------------------------------- curvature

    def _refresh(self, captures: Mapping[str, Sequence[Capture]], team: Team) -> None:
        """New curvature of the layers that a backward has reached, one after the other: columns may be large."""
        new: dict[str, Curvature] = {}
        probes: list[ScaleProbe] = []
        for name, layer in self.layers.items():
            if name in captures and layer.is_optimized:
                try:
                    new[name] = self._curvature_of(layer, captures[name], probes)
                except torch.linalg.LinAlgError as error:
                    logger.warning("SENG: layer %r keeps its curvature at step %d: %s", name, self.k, error)
            elif layer.is_optimized and layer.weight.requires_grad:
                self._say(
                    f"unreached {name}",
                    f"no backward reached layer {name!r} at step {self.k}: no new curvature",
                )
        self._scale.look(probes, team, self.k)
        for name, curvature in new.items():
            self.layers[name].curvature = curvature
            self._age = 0

    def _curvature_of(self, layer: SENGLayer, captures: Sequence[Capture], probes: list[ScaleProbe]) -> Curvature:
        """Of all samples captured; n is their total number, so that the rows of W keep their scale."""
        kept, layer.curvature = layer.curvature, None  # whether the bias counts is seen anew
        try:
            if isinstance(layer.module, _BATCH_NORM):
                return Curvature.of(layer.norm_gradients(captures))
            layer.collect(captures)
            if self._scale.is_open(self.loss_scale) and layer.has_gradient:
                probes.append(layer.scale_probe())
            parts, layer.parts = layer.parts, []
            batches = [part.batch for part in parts]
            A, G = (_joined([part.columns[side] for part in parts], batches) for side in (0, 1))
            del parts
            return Curvature.of(self._sketched(A, G, sum(batches)))
        finally:
            layer.curvature = kept

    def _sketched(self, A: Tensor, G: Tensor, n: int) -> DenseGradients | FactoredGradients:
        d_A, d_G = len(A), len(G)
        if d_A * d_G <= self.im_size_threshold:
            return dense_gradients(A, G, n) if A.shape[1] > n else FactoredGradients(A, G, n)
        if self.svd_rank is not None:
            A, G = compressed(A, G, n, self.svd_rank)
        return FactoredGradients(A, G, n, self._sample(d_A, A.device), self._sample(d_G, A.device))

    def _sample(self, d: int, device: torch.device) -> Tensor | None:
        """Rows, uniformly without replacement; None for all of them."""
        c = self.fim_col_sample_size
        if c is None or c >= d:
            return None
        generator = torch.Generator()
        generator.set_state(self._drawn)
        rows = torch.randperm(d, generator=generator)[:c].sort().values.to(device)
        self._drawn = generator.get_state()
        return rows

    # --------------------------------------------------------------------------------------------- state

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "age": self._age, "drawn": self._drawn}

    def _prepared(self, state: Mapping[str, Any]) -> Callable[[], None]:
        if unknown := set(state["layers"]) - set(self.layers):
            raise InputError(f"the state has curvature of layers that are not followed: {sorted(unknown)}")

        drawn = state["drawn"].cpu()
        curvatures = {name: self.layers[name].restored(saved) for name, saved in state["layers"].items()}

        def take() -> None:
            self.k, self._age, self._drawn = state["k"], state["age"], drawn
            for name, curvature in curvatures.items():
                self.layers[name].curvature = curvature

        return take


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
