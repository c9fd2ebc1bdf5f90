"""One K-FAC layer as the optimizer holds it: its columns, its two factors' processes, and their inverses.

**Convolutions, and layers with positions T besides the batch.** The hooks give `G G^T = |T| Gamma`, with Gamma of
Grosse & Martens (2016); here the columns of G are divided by sqrt(|T|) before any process sees them, so that the
Fisher block is theirs, Omega (x) Gamma. As damping is a share of the largest eigenvalue, this is a scalar |T| on
the step, which clipping and learning rate see.

**Micro-batches.** With b_j samples in micro-batch j and b in all, and the gradients of the micro-batches summed,
the columns of the full batch are `sqrt(b_j/b) A_j` and `sqrt(b/b_j) G_j`, side by side: (20) holds for the sum.
Several processes: see `kfacerr.torch.distributed`.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..exceptions import InputError
from ..inverse import DenseInverse, Inverse, damped_inverse
from ..process import EAFactor, Estimate, Process
from ..processes import Evd, Rsvd
from ..stream import Columns
from .hooks import ColumnHooks
from .linear import FactoredLinear, FactoredParameter, forget, formed, has_gradient, held
from .policy import Choice, FactorInfo, HyperParameters, LayerPolicy, choice_of_side, falls_back, make, tune
from .product import Product
from .scaling import probe

__all__ = ["FALLBACK", "Factor", "Layer", "MicroBatch", "Tally"]

FALLBACK = "R-KFAC"
"""What a factor with r + n >= d gets in place of a Brand process."""

_FAILURES = (InputError, torch.linalg.LinAlgError, np.linalg.LinAlgError)


class MicroBatch(NamedTuple):
    """What one backward left for one layer.

    Attributes:
        columns: as `ColumnHooks.pop` gives them.
        batch: b_j.
        dtype: precision the backward ran in.
    """

    columns: Columns
    batch: int
    dtype: torch.dtype

    @property
    def positions(self) -> float:
        """|T|, columns per sample."""
        return self.columns.A.shape[1] / max(self.batch, 1)


class Tally(NamedTuple):
    """What all processes together have of a layer for the coming step.

    Attributes:
        batch: b, samples of all micro-batches of all processes.
        widths: columns of each process.
        double: whether any has columns in float64.
    """

    batch: int
    widths: tuple[int, ...]
    double: bool

    @property
    def n(self) -> int:
        return sum(self.widths)


def gradient_columns(parts: Sequence[MicroBatch], tally: Tally) -> Columns:
    """A (d_A, n), G (d_G, n), this process's columns of the step's gradient `G A^T`."""
    W = len(tally.widths)
    shares = _shares(parts, tally)
    return _side_by_side(parts, shares, [1 / (share * W) for share in shares])


def factor_columns(parts: Sequence[MicroBatch], tally: Tally, *, sampled: bool) -> Columns:
    """A (d_A, n), G (d_G, n), this process's columns of `A A^T` = Omega and `G G^T` = Gamma: what processes see.

    With sampled labels each micro-batch has a mean loss of its own, not a part of the whole one.
    """
    W = len(tally.widths)
    shares = _shares(parts, tally)
    scales = [share if sampled else 1 / (share * W) for share in shares]
    weights = [1 / math.sqrt(part.positions or 1) for part in parts]
    return _side_by_side(parts, shares, [w * s for w, s in zip(weights, scales, strict=True)])


def _side_by_side(parts: Sequence[MicroBatch], for_A: Sequence[float], for_G: Sequence[float]) -> Columns:
    A = [part.columns.A if s == 1 else part.columns.A * s for part, s in zip(parts, for_A, strict=True)]
    G = [part.columns.G if s == 1 else part.columns.G * s for part, s in zip(parts, for_G, strict=True)]
    return Columns(A[0], G[0]) if len(parts) == 1 else Columns(torch.cat(A, dim=1), torch.cat(G, dim=1))


def _shares(parts: Sequence[MicroBatch], tally: Tally) -> list[float]:
    """sqrt(b_j/b)."""
    return [math.sqrt(max(part.batch, 1) / max(tally.batch, 1)) for part in parts]


class Factor:
    """One K-factor of a layer: the EA factor if its process reads it, the process, and the damped inverse.

    The inverse is kept until the process has a new estimate or phi changes.
    """

    def __init__(
        self, info: FactorInfo, choice: Choice, hyper: HyperParameters, *, accumulate: bool, seed: int
    ) -> None:
        self.info = info
        self.fell_back = falls_back(choice, info, hyper)
        self.choice: Choice = FALLBACK if self.fell_back else choice
        self.process: Process = make(self.choice, info, hyper, accumulate=accumulate, seed=seed)
        self.ea = EAFactor(hyper.rho) if self.process.needs_factor else None
        self._inverse: Inverse | None = None
        self._made_from: tuple[Estimate, float] | None = None
        self._lambda_max = 0.0
        self._absorbed = False

    def update(self, k: int, X: Tensor, hyper: HyperParameters) -> None:
        """Step k of (8) and of the process with columns X (d, n), finite; see `kfacerr.processes`.

        A failed decomposition is tried again in float64. If that fails too the process stays as it was, with a
        warning, and its next update tries anew.
        """
        self.tune(hyper)
        self.advance(k, X)

    # What `update` is made of, for several processes.

    def tune(self, hyper: HyperParameters) -> None:
        """This step's hyper-parameters."""
        tune(self.process, self.choice, hyper)
        if self.ea is not None:
            self.ea.rho = hyper.rho

    def advance(self, k: int, X: Tensor) -> None:
        """`update` after `tune` and, if it was called, `absorb_dense`."""
        absorbed, self._absorbed = self._absorbed, False
        saved = self.process.state_dict()
        failure = self._attempt(X, lambda x, ea: self.process.begin(k, ea))
        if not absorbed:
            self.absorb(X)
        failure = failure or self._attempt(X, lambda x, ea: self.process.update(k, x, ea))
        if failure is not None:
            # Also what `begin` did, as an overwriting is no estimate without the Brand update that follows.
            self.process.load_state_dict(saved)
            warnings.warn(
                f"layer {self.info.layer!r}, factor {self.info.side}, step {k}: the decomposition failed, also in "
                f"float64; the previous inverse is kept ({_one_line(failure)})",
                RuntimeWarning,
                stacklevel=2,
            )

    def absorb(self, X: Tensor) -> None:
        """(8) with columns X."""
        if self.ea is not None:
            self.ea.update(X)

    def absorb_dense(self, M: Tensor) -> None:
        """(8) with M = X X^T."""
        assert self.ea is not None
        trace = M.diagonal().sum()
        if self.ea.M is None:
            self.ea.M, self.ea.trace = M, trace
        else:
            self.ea.M.mul_(self.ea.rho).add_(M, alpha=1 - self.ea.rho)
            self.ea.trace = self.ea.rho * self.ea.trace + (1 - self.ea.rho) * trace
        self._absorbed = True

    @property
    def reads_columns(self) -> bool:
        """Whether the process reads columns, or `begin` reads M_{k-1}; if not, M_k is all it needs."""
        return type(self.process) not in (Evd, Rsvd) or self._adaptive

    @property
    def _adaptive(self) -> bool:
        return bool(getattr(self.process, "adaptive", 0))

    def due(self, k: int) -> bool:
        """Whether the update of step k may decompose anything."""
        clocks = self.process.clocks().values()
        keeps_own_time = self._adaptive or not clocks or self.process.estimate is None
        return keeps_own_time or any(clock.coming(k) for clock in clocks)

    @property
    def cost(self) -> float:
        """Of a decomposition, about, in multiply-adds."""
        d, rank = self.info.d, getattr(self.process, "rank", None)
        if rank is None:
            return float(d) ** 3
        sketch = getattr(self.process, "sketch", None)
        cost = 0.0 if isinstance(self.process, Rsvd) else float(d) * (rank + self.info.n) ** 2
        if sketch is not None:
            cost += float(d) ** 2 * (rank + sketch.oversampling) * (sketch.n_pwr_it + 2)
        return min(cost, float(d) ** 3)

    def _attempt(self, X: Tensor, call: Callable[[Tensor, EAFactor | None], None]) -> Exception | None:
        """A part of the process's step, in float64 if need be; why it failed, if it did."""
        before = self.process.estimate
        saved = self.process.state_dict()
        try:
            call(X, self.ea)
            self._refuse_nonfinite(before)
            return None
        except _FAILURES as error:
            first = error
        try:
            self.process.load_state_dict(map_tensors(saved, lambda t: t.double()))
            call(X.double(), self._ea_in_float64())
            self._refuse_nonfinite(before)
            self.process.load_state_dict(map_tensors(self.process.state_dict(), lambda t: t.to(X.dtype)))
        except _FAILURES:
            return first
        return None

    def _refuse_nonfinite(self, before: Estimate | None) -> None:
        """Waits for the device, after a decomposition only."""
        estimate = self.process.estimate
        if estimate is None or estimate is before:
            return
        X = estimate.lowrank
        if not all(bool(part.isfinite().all()) for part in (X.basis, X.D, X.mix) if part is not None):
            raise InputError("NaN or Inf in the decomposition")

    def _ea_in_float64(self) -> EAFactor | None:
        if self.ea is None:
            return None
        ea = EAFactor(self.ea.rho)
        ea.load_state_dict(map_tensors(self.ea.state_dict(), lambda t: t.double()))
        return ea

    def inverse(self, phi: float, continuation: str) -> Inverse | None:
        """The damped inverse, or None where there is none: no estimate yet, or a factor that is zero.

        Where all d modes are there it is dense: one product a step in place of two, for one when it is made.
        Waits for the device only after a decomposition.
        """
        estimate = self.process.estimate
        if estimate is None or estimate.lowrank.m == 0:
            return None
        made_from = self._made_from
        if made_from is None or made_from[0] is not estimate:
            self._lambda_max = float(estimate.lowrank.lambda_max)
        if phi * self._lambda_max < torch.finfo(estimate.lowrank.D.dtype).tiny:
            return None  # 1/lam would overflow
        if made_from is None or made_from[0] is not estimate or made_from[1] != phi:
            low = estimate.lowrank
            inverse = damped_inverse(low, phi=phi, continuation=continuation, trace=estimate.trace)
            self._inverse = inverse if low.m < low.d else DenseInverse(inverse.dense())
            self._made_from = estimate, phi
        return self._inverse

    @property
    def dtype(self) -> torch.dtype:
        """Of the inverse; there must be one."""
        assert self.process.estimate is not None
        dtype: torch.dtype = self.process.estimate.lowrank.D.dtype
        return dtype

    @property
    def kind(self) -> tuple[torch.dtype, torch.device] | None:
        """Dtype and device; None if nothing came in yet."""
        held = None if self.process.estimate is None else self.process.estimate.lowrank.D
        held = held if self.ea is None else self.ea.M
        return None if held is None else (held.dtype, held.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "choice": self.choice if isinstance(self.choice, str) else type(self.process).__name__,
            "fell_back": self.fell_back,
            "d": self.info.d,
            "n": self.info.n,
            "process": self.process.state_dict(),
            "factor": None if self.ea is None else self.ea.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], like: Tensor) -> None:
        """Restores what a factor made alike saved, on the device of `like`."""
        # Copies: M is updated in place.
        move = lambda t: t.to(like.device, copy=True)  # noqa: E731
        self.process.load_state_dict(map_tensors(state["process"], move))
        if self.ea is not None:
            self.ea.load_state_dict(map_tensors(state["factor"], move))


class Layer:
    """A layer that the optimizer preconditions.

    Attributes:
        name, module, policy: as the names say.
        hooks: its own `ColumnHooks`, switched on only for the forwards whose columns are needed.
        parts: what the micro-batches of the coming step left.
        factors: of sides "A" and "G"; empty until the first columns.
        linear: whether Algorithm 8 applies; None until the first columns, which tell n.
        asked: whether it was asked for, so that `linear` is no plain False.
    """

    def __init__(self, model: nn.Module, name: str, module: nn.Module, policy: LayerPolicy, bias: bool) -> None:
        self.name = name
        self.module = module
        self.policy = policy
        self._optimizes_bias = bias
        self.hooks = ColumnHooks(model, [name], way_out=f"leave it to SGD with policy={{{name!r}: 'SGD'}}")
        self.parts: list[MicroBatch] = []
        self.factors: dict[str, Factor] = {}
        self.linear: bool | None = False
        self.asked = False
        self.loss_scale = 1.0  # in gradients held as factors

    def ask_linear(self) -> None:
        """Algorithm 8, if n is small enough."""
        self.linear, self.asked = None, True

    @property
    def weight(self) -> nn.Parameter:
        return self.module._parameters["weight"]  # type: ignore[return-value]

    @property
    def bias(self) -> bool:
        """Whether the bias is a column of Mat(g): it is if it is trained when the factors are made."""
        if "A" in self.factors:
            return self.factors["A"].info.d > self.weight[0].numel()
        bias = self.module._parameters.get("bias")
        return self._optimizes_bias and bias is not None and bias.requires_grad

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if it is trained."""
        bias = self.module._parameters["bias"] if self.bias else None
        return [self.weight] if bias is None else [self.weight, bias]

    # ------------------------------------------------------------------------------------------- columns

    def collect(self, loss_scale: float) -> None:
        """Takes the columns of a backward that is complete, if there is one."""
        pending = self.hooks.pending().get(self.name)
        if pending is None:
            return
        columns = self.hooks.pop(loss_scale=loss_scale)[self.name]
        if self.module._parameters.get("bias") is not None and not self.bias:
            columns = columns._replace(A=columns.A[:-1])  # a frozen bias is no row of Mat(g)
        self.parts.append(MicroBatch(columns, *pending))

    def discard(self) -> None:
        """Drops the columns of all complete backwards, and gradients that are held as factors."""
        self.parts.clear()
        forget(self.parameters)
        if self.hooks.pending():
            self.hooks.forget()

    # ------------------------------------------------------------------------------------------ K-factors

    @property
    def dimensions(self) -> tuple[int, int]:
        """d_A, d_G."""
        return self.weight[0].numel() + len(self.parameters) - 1, self.weight.shape[0]

    def gradient_columns(self, tally: Tally) -> Columns:
        return gradient_columns(self.parts, tally) if self.parts else self._no_columns(tally)

    def factor_columns(self, tally: Tally, *, sampled: bool) -> Columns:
        return factor_columns(self.parts, tally, sampled=sampled) if self.parts else self._no_columns(tally)

    def _no_columns(self, tally: Tally) -> Columns:
        dtype = torch.float64 if tally.double else torch.float32
        A, G = (torch.zeros(d, 0, dtype=dtype, device=self.weight.device) for d in self.dimensions)
        return Columns(A, G)

    def check_kind(self, k: int, columns: Columns) -> None:
        """Refuses columns that the factors cannot take: the model was moved or converted after its first step."""
        for (side, factor), X in zip(sorted(self.factors.items()), columns, strict=False):
            if (kind := factor.kind) is not None and kind != (X.dtype, X.device):
                raise InputError(
                    f"layer {self.name!r}, step {k}: columns {side} in {X.dtype} on {X.device}, but the factor in "
                    f"{kind[0]} on {kind[1]}; convert or move the model before its first step"
                )

    def make_factors(self, n: int, hyper: HyperParameters, *, accumulate: bool, seed: int) -> list[Factor]:
        """Makes the factors at their first columns, n of them; returns those it made."""
        if self.factors:
            return []
        for side, d in zip("AG", self.dimensions, strict=True):
            self._make(FactorInfo(self.name, side, d, n), hyper, accumulate=accumulate, seed=seed)
        return list(self.factors.values())

    def update(self, k: int, columns: Columns, hyper: HyperParameters) -> None:
        """Step k of both factors."""
        for side, X in zip("AG", columns, strict=True):
            self.factors[side].update(k, X, hyper)

    def _make(self, info: FactorInfo, hyper: HyperParameters, *, accumulate: bool, seed: int) -> Factor:
        choice = choice_of_side(self.policy, info.side)
        factor = self.factors[info.side] = Factor(info, choice, hyper, accumulate=accumulate, seed=seed)
        return factor

    def inverses(self, phi: float, continuation: str) -> tuple[Inverse, Inverse] | None:
        """Of G and of A, or None where either is missing."""
        if not self.factors:
            return None
        G = self.factors["G"].inverse(phi, continuation)
        A = self.factors["A"].inverse(phi, continuation)
        return None if G is None or A is None else (G, A)

    # ------------------------------------------------------------------------------------------- gradient

    @property
    def has_gradient(self) -> bool:
        return has_gradient(self.weight)

    @property
    def is_held(self) -> bool:
        """Whether the gradient is there as factors and nothing of it formed."""
        return all(held(p) and formed(p) is None for p in self.parameters)

    @property
    def keeps_factors(self) -> bool:
        """Whether the layer is a drop-in whose backward may leave the factors alone."""
        return isinstance(self.module, FactoredLinear)

    def form(self) -> None:
        """Forms what is held of the gradient, unscaled."""
        for p in self.parameters:
            if isinstance(p, FactoredParameter):
                p.form(self.loss_scale)

    def gradient(self) -> Tensor:
        """Mat(g) (d_G, d_A) in at least float32: [weight.grad.flatten(1), bias.grad]."""
        self.form()
        assert self.weight.grad is not None
        J = self.weight.grad.flatten(1)
        J = J.to(torch.promote_types(J.dtype, torch.float32))
        if len(self.parameters) == 1:
            return J
        bias = self.parameters[1].grad
        column = J.new_zeros(J.shape[0], 1) if bias is None else bias.to(J.dtype)[:, None]
        return torch.cat([J, column], dim=1)

    def split(self, S: Tensor | Product) -> dict[nn.Parameter, Tensor | Product]:
        """A step S (d_G, d_A) by parameter; the weight's part of a product stays one."""
        weight = self.weight
        width = weight[0].numel()
        with_bias = len(self.parameters) == 2 and has_gradient(self.parameters[1])
        pieces: dict[nn.Parameter, Tensor | Product]
        if isinstance(S, Product):
            pieces = {weight: Product(S.P, S.Q[:width])}
            last = S.P @ S.Q[width] if with_bias else None
        else:
            pieces = {weight: S[:, :width].reshape(weight.shape)}
            last = S[:, width] if with_bias else None
        if last is not None:
            pieces[self.parameters[1]] = last
        return pieces

    def differs_from_columns(self, columns: Columns, unit: float) -> Tensor:
        """Whether .grad is not `G A^T`, a 0-d boolean: one product of each with a fixed vector v of signs.

        Where a part of .grad is held as factors and another is formed, the second came from elsewhere: no product
        is needed, but whether it is zero. (Or the factors outgrew the gradient, and Algorithm 8 would save
        nothing.) A gradient that is held is not formed for it.

        Else rounding is allowed for. With unit round-off u, entry (q, r) of .grad is off by some u |G_q| |A_r|, in
        the norms of the rows, with signs that v's are independent of: in all, .grad v by u ||G||_F ||A||_F, and
        G (A^T v) by as much.

        Args:
            columns: A and G of all micro-batches.
            unit: u of the backward's products.
        """
        A, G = columns
        others = [there for p in self.parameters if held(p) and (there := formed(p)) is not None]
        if others:
            return torch.stack([there.any() for there in others]).any()
        v = probe(A.shape[0], A)
        norm = torch.linalg.vector_norm
        return norm(self.times(v) - G @ (A.T @ v)) > 8 * unit * norm(G) * norm(A)

    def scale_probe(self, tally: Tally) -> tuple[Tensor, Tensor]:
        """`.grad v` and this process's share of `G A^T v` (d_G,), v a fixed vector; neither forms anything."""
        precision = torch.promote_types(self.weight.dtype, torch.float32)
        v = probe(self.dimensions[0], self.weight.new_zeros((), dtype=precision))
        want = v.new_zeros(self.dimensions[1])
        for part in self.parts:
            want = want + part.columns.G.to(v.dtype) @ (part.columns.A.to(v.dtype).T @ v) / len(tally.widths)
        return self.times(v), want

    def times(self, v: Tensor) -> Tensor:
        """Mat(g) v (d_G,) for v (d_A,)."""
        total = self._times(self.weight, v[: self.weight[0].numel()])
        return total if len(self.parameters) == 1 else total + self._times(self.parameters[1], v[-1])

    def _times(self, p: nn.Parameter, v: Tensor) -> Tensor:
        """A parameter's gradient times v (d_in,), or the scalar v for a bias."""
        there = formed(p)
        total = v.new_zeros(len(p))
        if there is not None:
            total = there.to(v.dtype) * v if p.ndim == 1 else there.flatten(1).to(v.dtype) @ v
        for share in held(p):
            total = total + share.times(v) / self.loss_scale
        return total

    # ---------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        return {
            "linear": self.linear,
            "asked": self.asked,
            "factors": {side: factor.state_dict() for side, factor in self.factors.items()},
        }

    def restored(
        self, state: Mapping[str, Any], hyper: HyperParameters, *, accumulate: bool, seed: int
    ) -> "dict[str, Factor]":
        """The factors of a state; the layer is left as it is until `restore`.

        Raises:
            InputError: the state is of another process or another size.
        """
        factors = {}
        for side, saved in state["factors"].items():
            info = FactorInfo(self.name, side, saved["d"], saved["n"])
            choice = choice_of_side(self.policy, side)
            factor = factors[side] = Factor(info, choice, hyper, accumulate=accumulate, seed=seed)
            if factor.fell_back != saved["fell_back"]:  # the rank's schedule has moved on since
                choice = FALLBACK if saved["fell_back"] else choice_of_side(self.policy, side)
                factor.fell_back, factor.choice = saved["fell_back"], choice
                factor.process = make(choice, info, hyper, accumulate=accumulate, seed=seed)
                factor.ea = EAFactor(hyper.rho) if factor.process.needs_factor else None
            now = factor.choice if isinstance(factor.choice, str) else type(factor.process).__name__
            if now != saved["choice"]:
                raise InputError(
                    f"layer {self.name!r}, factor {side}: the state is of {saved['choice']!r}, not of {now!r}"
                )
            *_, d = sizes = self._sizes(side)
            if saved["d"] not in sizes:
                raise InputError(f"layer {self.name!r}, factor {side}: the state is of d = {saved['d']}, not {d}")
            factor.load_state_dict(saved, self.weight)
        return factors

    def restore(self, state: Mapping[str, Any], factors: "dict[str, Factor]") -> None:
        """Takes what `restored` gave."""
        if self.asked and state.get("asked", state["linear"] is not False):
            self.linear = state["linear"]
        self.factors = factors

    def _sizes(self, side: str) -> tuple[int, ...]:
        """What d may be: a bias counts if it was trained when the factors were made."""
        width = self.weight[0].numel()
        if side == "G":
            return (self.weight.shape[0],)
        return (width, width + 1) if self._optimizes_bias else (width,)


def map_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts with every floating tensor changed."""
    if isinstance(state, dict):
        return {key: map_tensors(value, change) for key, value in state.items()}
    return change(state) if isinstance(state, Tensor) and state.is_floating_point() else state


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
