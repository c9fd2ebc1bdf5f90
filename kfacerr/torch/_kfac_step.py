"""One step of `KFAC`: what its layers have, whether it may be taken, and where it goes."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..exceptions import InputError
from ..stream import Columns
from ._direction import Direction, Product, norm, reach, scaled, zeroed
from ._kfac_layer import KFACLayer
from ._micro_batches import LayerTotals
from ._precision import rounding
from .distributed import Job, Team, update_together
from .linear import finite_gradients

if TYPE_CHECKING:
    from .kfac import KFAC

__all__ = ["KFACStep"]

logger = logging.getLogger(__name__)


class KFACStep:
    """A step that is being taken, all processes together.

    Args:
        optimizer: whose step it is.
        team: the processes.

    Attributes:
        active: the layers that have a gradient.
        totals: what all processes have of each layer, by name; empty where no columns are needed.
        columns: this process's share of what the factors take, by layer; empty in steps that update none.
        by_columns: all processes' columns of the gradients that Algorithm 8 is to precondition, by layer.

    Raises:
        InputError: columns that cannot be there are missing, or the processes' gradients differ.
    """

    def __init__(self, optimizer: "KFAC", team: Team) -> None:
        self.optimizer = optimizer
        self.team = team
        self.k = optimizer.k
        self.hyper = optimizer.hyper
        self.updating = self.k % self.hyper.T_updt == 0
        layers = [layer for layer in optimizer.layers.values() if layer.is_optimized]
        self.active = [layer for layer in layers if layer.has_gradient]
        self.totals: dict[str, LayerTotals] = {}
        if layers and (self.updating or any(layer.linear is not False for layer in layers)):
            self.totals = layer_totals(layers, team, self.k)
            if team.size > 1 and not optimizer._agreed:
                optimizer._agreed = agree(self.active, team, self.k)
        self.columns = self._factor_columns() if self.updating else {}
        self.by_columns = self._gradient_columns()

    def _factor_columns(self) -> dict[str, Columns]:
        sampled = self.optimizer.fisher == "sampled"
        columns = {}
        for layer in self.active:
            totals = self.totals[layer.name]
            where = f"layer {layer.name!r}, step {self.k}"
            if totals.n:
                columns[layer.name] = layer.factor_columns(totals, sampled=sampled)
            elif sampled:
                raise InputError(
                    f"{where}: no sampled labels; call sample_fisher(output) between zero_grad() and step()"
                )
            else:
                self.optimizer._say(
                    f"columns {layer.name}",
                    f"{where}: a gradient but no columns (was the layer used other than through its own "
                    "forward?); its factors are not updated",
                )
        return columns

    def _gradient_columns(self) -> dict[str, Columns]:
        by_columns = {}
        for layer in self.active:
            if layer.linear is False or not (totals := self.totals[layer.name]).n:
                continue
            if totals.n < min(layer.dimensions):
                A, G = (self.team.gather(X, totals.widths) for X in layer.gradient_columns(totals))
                by_columns[layer.name] = Columns(A, G)
        return by_columns

    # ---------------------------------------------------------------------------------- may it be taken?

    def is_fit(self) -> bool:
        """Whether all is finite; takes out of `by_columns` the layers where Algorithm 8 cannot apply.

        One wait for the device in all, and all processes come to the same answer. None where nobody looks for NaN:
        then Algorithm 8 is left to the layers whose gradient is held as factors.
        """
        optimizer = self.optimizer
        formed = [name for name in self.by_columns if not optimizer.layers[name].is_held]
        if not (self.updating or optimizer.skip_nonfinite):
            for name in formed:
                del self.by_columns[name]
            return True
        finite = finite_gradients(optimizer._parameters())
        for pair in self.columns.values():  # a norm overflows where its factor would
            finite += [(torch.linalg.vector_norm(X) ** 2).isfinite() for X in pair]
        lost, optimizer._unfit = optimizer._unfit, {}
        multiples = [self._multiple(optimizer.layers[name], self.by_columns[name]) for name in formed]
        differs = [c.isnan() for c in multiples]
        questions = [~optimizer._all(finite), *(last >= 0 for last in lost.values()), *differs]
        skip, *answers = self.team.any(torch.stack([question.to(optimizer._home) for question in questions]))
        _report([item for item, was in zip(lost.items(), answers[: len(lost)], strict=True) if was])
        if skip:
            return False
        for name, c, differ in zip(formed, multiples, answers[len(lost) :], strict=True):
            A, G = self.by_columns[name]
            self.by_columns[name] = Columns(A, c.to(G) * G)
            if differ:
                del self.by_columns[name]
                optimizer._say(
                    f"differs {name}",
                    f"layer {name!r}, step {self.k}: .grad is no multiple of G A^T of the columns (it was "
                    "changed, or has parts from elsewhere); such steps are taken by Algorithm 1, not 8",
                    logging.INFO,
                )
        return True

    def _multiple(self, layer: KFACLayer, columns: Columns) -> Tensor:
        dtype = layer.parts[0].dtype if layer.parts else torch.float32
        unit = rounding(layer.module, dtype, layer.weight.device.type, self.optimizer._rounding)
        return layer.multiple_of_columns(columns, unit)

    # --------------------------------------------------------------------------------------- taking it

    def update(self) -> None:
        """Lines 5, 9 and 12-13 of Algorithm 1, or what Algorithms 4, 5 and 7 put in their place."""
        jobs = []
        for name in list(self.columns):
            layer, pair = self.optimizer.layers[name], self.columns.pop(name)
            totals = self.totals[name]
            for fallback in layer.make_factors(pair, totals.n, self.hyper.settings):
                self.optimizer._say(fallback, fallback)
            layer.configure(self.hyper)
            layer.parts.clear()  # those of convolutions are large
            for side, X in zip("AG", pair, strict=True):
                if self.team.size == 1:
                    layer.push(side, self.k, X)
                else:
                    jobs.append(Job(layer.factors[side], X, totals.widths, partial(layer.push, side)))
        if jobs:
            update_together(self.team, self.k, jobs)
        for layer in self.active:
            if layer.linear is None and (n := self.totals[layer.name].n):
                layer.linear = layer.is_cheaper_by_columns(n)
                if not layer.linear:
                    self.by_columns.pop(layer.name, None)

    def directions(self) -> Iterator[tuple[nn.Parameter, Direction]]:
        """Algorithm 1 l.15-18, with the clip, by parameter."""
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        steps = ((layer, self._fitting(layer, self._preconditioned(layer))) for layer in self.active)
        clip = self.optimizer.param_groups[0]["clip"]
        if self.optimizer.clip_by == "kl" and clip is not None and self.active:
            every = list(steps)
            factor = self._kl_factor([(layer, S, groups[layer.weight]["lr"]) for layer, S in every], clip)
            for layer, S in every:
                yield from layer.split(scaled(S, factor)).items()
            return
        for layer, S in steps:
            clip = groups[layer.weight]["clip"]
            if self.optimizer.clip_by == "layer" and clip is not None:
                S = scaled(S, torch.clamp(clip * max(S.numel(), 1) ** 0.5 / norm(S), max=1.0))  # clip / rms(S)
            yield from layer.split(S).items()

    def _preconditioned(self, layer: KFACLayer) -> Direction:
        inverses = layer.inverses(
            self.k, self.hyper.phi_lambda, self.hyper.settings.continuation, self.optimizer.damping
        )
        if inverses is not None:
            return layer.preconditioned(inverses, self.by_columns.get(layer.name))
        why = "no estimate yet" if not layer.factors else "no estimate yet, or one that is zero"
        self.optimizer._say(f"zero {layer.name}", f"layer {layer.name!r}, step {self.k}: {why}; plain gradient")
        return layer.gradient().clone()

    def _fitting(self, layer: KFACLayer, S: Direction) -> Direction:
        """S, or 0 if S is not finite or may not be; the next `is_fit` reports it, so that nothing waits here."""
        longest = reach(S)
        unfit = ~(longest <= torch.finfo(S.P.dtype if isinstance(S, Product) else S.dtype).max)
        before = self.optimizer._unfit.get(layer.name, torch.full((), -1, device=longest.device))
        self.optimizer._unfit[layer.name] = before.masked_fill(unfit, self.k)
        return zeroed(S, unfit)

    def _kl_factor(self, steps: Sequence[tuple[KFACLayer, Direction, float]], clip: float) -> Tensor:
        """min(1, sqrt(clip / sum_l lr_l^2 <S_l, g_l>)), a 0-d tensor: the sum is about twice the KL divergence."""
        terms = []
        for layer, S, lr in steps:
            if isinstance(S, Product):
                A, G = self.by_columns[layer.name]
                inner = S.inner(Product(G, A))
            else:
                inner = torch.sum(S * layer.gradient(), dtype=torch.float64)
            terms.append(lr**2 * inner)
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum().abs()
        return torch.clamp(torch.sqrt(clip / total), max=1.0)


def _report(lost: Sequence[tuple[str, Tensor]]) -> None:
    for name, last in lost:
        logger.warning(
            "layer %r, step %d: the preconditioned step left the range of its precision, and was left out",
            name,
            int(last),
        )


def layer_totals(layers: Sequence[KFACLayer], team: Team, k: int) -> dict[str, LayerTotals]:
    """Counts what all processes together have.

    Args:
        layers: the same for all processes.
        team: the processes.
        k: the step.

    Returns:
        By the layer's name.

    Raises:
        InputError: some processes have a gradient and others have none.
    """
    counts = [
        (
            layer.has_gradient,
            sum(part.batch for part in layer.parts),
            sum(part.columns.A.shape[1] for part in layer.parts),
            any(torch.float64 in (X.dtype for X in part.columns) for part in layer.parts),
        )
        for layer in layers
    ]
    everyone: list[Any] = [counts]
    if team.size > 1:
        everyone = team.each(torch.tensor(counts, dtype=torch.int64, device=layers[0].weight.device)).tolist()
    found = {}
    for layer, rows in zip(layers, zip(*everyone, strict=True), strict=True):
        has, batches, widths, double = zip(*rows, strict=True)
        if len(set(map(bool, has))) > 1:
            raise InputError(
                f"layer {layer.name!r}, step {k}: a gradient on some of the processes only; wrap the model in "
                "DistributedDataParallel, or pass data_parallel=False"
            )
        found[layer.name] = LayerTotals(sum(batches), tuple(widths), any(double))
    return found


def agree(layers: Sequence[KFACLayer], team: Team, k: int) -> bool:
    """Whether the processes' gradients are seen to be the same.

    Args:
        layers: those with a gradient.
        team: the processes.
        k: the step.

    Returns:
        False if there is nothing to see.

    Raises:
        InputError: they are not: nobody averages them.
    """
    norms = [torch.linalg.vector_norm(layer.gradient().double()) for layer in layers]
    totals = team.each(torch.stack(norms).sum()) if norms else torch.full((1,), torch.nan)
    if not totals.isfinite().all():
        return False
    if (totals.max() - totals.min()).item() > 1e-4 * totals.max().item():
        raise InputError(
            f"step {k}: the processes' gradients differ; wrap the model in DistributedDataParallel, or pass "
            "data_parallel=False if each process trains its own"
        )
    return True
