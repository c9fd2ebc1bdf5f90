"""One K-FAC layer as the optimizer holds it: its columns, its two factors' processes, and their inverses.

**Convolutions, and layers with positions T besides the batch.** The hooks give `G G^T = |T| Gamma`, with Gamma of
Grosse & Martens (2016); here the columns of G are divided by sqrt(|T|) before any process sees them, so that the
Fisher block is theirs, Omega (x) Gamma. As damping is a share of the largest eigenvalue, this is a scalar |T| on
the step, which clipping and learning rate see.

**Micro-batches.** With b_j samples in micro-batch j and b in all, and the gradients of the micro-batches summed,
the columns of the full batch are `sqrt(b_j/b) A_j` and `sqrt(b/b_j) G_j`, side by side: (20) holds for the sum.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..inverse import DampedInverse, damped_inverse
from ..process import EAFactor, Estimate, Process
from ..stream import Columns
from .hooks import ColumnHooks
from .policy import Choice, FactorInfo, HyperParameters, LayerPolicy, choice_of_side, falls_back, make, tune

__all__ = ["FALLBACK", "Factor", "Layer", "MicroBatch"]

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


def gradient_columns(parts: Sequence[MicroBatch]) -> Columns:
    """A (d_A, n), G (d_G, n) with `G A^T` the gradient of all micro-batches together."""
    if len(parts) == 1:
        return parts[0].columns
    shares = _shares(parts)
    return Columns(
        torch.cat([part.columns.A * s for part, s in zip(parts, shares, strict=True)], dim=1),
        torch.cat([part.columns.G / s for part, s in zip(parts, shares, strict=True)], dim=1),
    )


def factor_columns(parts: Sequence[MicroBatch], *, sampled: bool) -> Columns:
    """A (d_A, n), G (d_G, n) with `A A^T` = Omega and `G G^T` = Gamma of the full batch: what processes see.

    With sampled labels each micro-batch has a mean loss of its own, not a part of the whole one.
    """
    weights = [1 / math.sqrt(part.positions or 1) for part in parts]
    if len(parts) == 1:
        A, G = parts[0].columns
        return Columns(A, G if weights[0] == 1 else G * weights[0])
    shares = _shares(parts)
    return Columns(
        torch.cat([part.columns.A * s for part, s in zip(parts, shares, strict=True)], dim=1),
        torch.cat(
            [
                part.columns.G * (w * (s if sampled else 1 / s))
                for part, s, w in zip(parts, shares, weights, strict=True)
            ],
            dim=1,
        ),
    )


def _shares(parts: Sequence[MicroBatch]) -> list[float]:
    """sqrt(b_j/b)."""
    total = sum(part.batch for part in parts)
    return [math.sqrt(max(part.batch, 1) / max(total, 1)) for part in parts]


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
        self._inverse: DampedInverse | None = None
        self._made_from: tuple[Estimate, float] | None = None
        self._lambda_max = 0.0

    def update(self, k: int, X: Tensor, hyper: HyperParameters) -> None:
        """Step k of (8) and of the process with columns X (d, n), finite; see `kfacerr.processes`.

        A failed decomposition is tried again in float64. If that fails too the process stays as it was, with a
        warning, and its next update tries anew.
        """
        tune(self.process, self.choice, hyper)
        self._guarded(k, X, lambda x, ea: self.process.begin(k, ea))
        if self.ea is not None:
            self.ea.rho = hyper.rho
            self.ea.update(X)
        self._guarded(k, X, lambda x, ea: self.process.update(k, x, ea))

    def _guarded(self, k: int, X: Tensor, call: Callable[[Tensor, EAFactor | None], None]) -> None:
        before = self.process.estimate
        saved = self.process.state_dict()
        try:
            call(X, self.ea)
            self._refuse_nonfinite(before)
            return
        except _FAILURES as error:
            first = error
        try:
            self.process.load_state_dict(map_tensors(saved, lambda t: t.double()))
            call(X.double(), self._ea_in_float64())
            self._refuse_nonfinite(before)
            self.process.load_state_dict(map_tensors(self.process.state_dict(), lambda t: t.to(X.dtype)))
        except _FAILURES:
            self.process.load_state_dict(saved)
            warnings.warn(
                f"layer {self.info.layer!r}, factor {self.info.side}, step {k}: the decomposition failed, also in "
                f"float64; the previous inverse is kept ({_one_line(first)})",
                RuntimeWarning,
                stacklevel=2,
            )

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

    def inverse(self, phi: float, continuation: str) -> DampedInverse | None:
        """The damped inverse, or None where there is none: no estimate yet, or a factor that is zero.

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
            self._inverse = damped_inverse(
                estimate.lowrank, phi=phi, continuation=continuation, trace=estimate.trace
            )
            self._made_from = estimate, phi
        return self._inverse

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
    """

    def __init__(self, model: nn.Module, name: str, module: nn.Module, policy: LayerPolicy, bias: bool) -> None:
        self.name = name
        self.module = module
        self.policy = policy
        self.bias = bias
        self.hooks = ColumnHooks(model, [name])
        self.parts: list[MicroBatch] = []
        self.factors: dict[str, Factor] = {}
        self.linear: bool | None = False

    @property
    def weight(self) -> nn.Parameter:
        return self.module._parameters["weight"]  # type: ignore[return-value]

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
        """Drops the columns of all complete backwards."""
        self.parts.clear()
        if self.hooks.pending():
            self.hooks.forget()

    # ------------------------------------------------------------------------------------------ K-factors

    def update(
        self, k: int, columns: Columns, hyper: HyperParameters, *, accumulate: bool, seed: int
    ) -> list[Factor]:
        """Step k of both factors; returns the factors it made, on the first one."""
        made: list[Factor] = []
        if not self.factors:
            for side, X in zip("AG", columns, strict=True):
                self._make(FactorInfo(self.name, side, *X.shape), hyper, accumulate=accumulate, seed=seed)
            made = list(self.factors.values())
        for side, X in zip("AG", columns, strict=True):
            self.factors[side].update(k, X, hyper)
        return made

    def _make(self, info: FactorInfo, hyper: HyperParameters, *, accumulate: bool, seed: int) -> Factor:
        choice = choice_of_side(self.policy, info.side)
        factor = self.factors[info.side] = Factor(info, choice, hyper, accumulate=accumulate, seed=seed)
        return factor

    def inverses(self, phi: float, continuation: str) -> tuple[DampedInverse, DampedInverse] | None:
        """Of G and of A, or None where either is missing."""
        if not self.factors:
            return None
        G = self.factors["G"].inverse(phi, continuation)
        A = self.factors["A"].inverse(phi, continuation)
        return None if G is None or A is None else (G, A)

    # ------------------------------------------------------------------------------------------- gradient

    def gradient(self) -> Tensor:
        """Mat(g) (d_G, d_A) in at least float32: [weight.grad.flatten(1), bias.grad]."""
        assert self.weight.grad is not None
        J = self.weight.grad.flatten(1)
        J = J.to(torch.promote_types(J.dtype, torch.float32))
        if len(self.parameters) == 1:
            return J
        bias = self.parameters[1].grad
        column = J.new_zeros(J.shape[0], 1) if bias is None else bias.to(J.dtype)[:, None]
        return torch.cat([J, column], dim=1)

    def split(self, S: Tensor) -> dict[nn.Parameter, Tensor]:
        """A step S (d_G, d_A) by parameter."""
        weight = self.weight
        width = weight[0].numel()
        pieces = {weight: S[:, :width].reshape(weight.shape)}
        if len(self.parameters) == 2 and self.parameters[1].grad is not None:
            pieces[self.parameters[1]] = S[:, width]
        return pieces

    def differs_from_columns(self, columns: Columns, dtype: torch.dtype) -> Tensor:
        """Whether .grad is not `G A^T`, a 0-d boolean: one product of each with a fixed vector of signs.

        Rounding is allowed for; a change of less than 1e-3 (5e-2 after a backward in half precision) is not seen.
        """
        A, G = columns
        signs = torch.randint(2, (A.shape[0],), generator=torch.Generator().manual_seed(0))
        v = (2 * signs - 1).to(A)
        assert self.weight.grad is not None
        J = self.weight.grad.flatten(1).to(A.dtype)
        have = J @ v[: J.shape[1]]
        if len(self.parameters) == 2 and self.parameters[1].grad is not None:
            have = have + self.parameters[1].grad.to(A.dtype) * v[-1]
        w = A.T @ v
        want = G @ w
        relative, units = (1e-3, 16) if dtype in (torch.float32, torch.float64) else (5e-2, 2)
        norm = torch.linalg.vector_norm
        noise = units * torch.finfo(dtype).eps * norm(G) * norm(w)
        return norm(have - want) > relative * norm(want) + noise

    # ---------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        return {
            "linear": self.linear,
            "factors": {side: factor.state_dict() for side, factor in self.factors.items()},
        }

    def load_state_dict(
        self, state: Mapping[str, Any], hyper: HyperParameters, *, accumulate: bool, seed: int
    ) -> None:
        """Restores the factors.

        Raises:
            InputError: the state is of another process or another size.
        """
        self.linear = state["linear"] if self.linear is not False else False
        self.factors.clear()
        for side, saved in state["factors"].items():
            info = FactorInfo(self.name, side, saved["d"], saved["n"])
            factor = self._make(info, hyper, accumulate=accumulate, seed=seed)
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
            d = self.weight.shape[0] if side == "G" else self.weight[0].numel() + len(self.parameters) - 1
            if d != saved["d"]:
                raise InputError(f"layer {self.name!r}, factor {side}: the state is of d = {saved['d']}, not {d}")
            factor.load_state_dict(saved, self.weight)


def map_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts with every floating tensor changed."""
    if isinstance(state, dict):
        return {key: map_tensors(value, change) for key, value in state.items()}
    return change(state) if isinstance(state, Tensor) and state.is_floating_point() else state


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
