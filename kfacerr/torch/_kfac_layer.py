"""One layer of `KFAC`: its two K-factors, and its step by Algorithm 1 l.15-18 or by Algorithm 8."""

import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..algorithms import Algorithm
from ..array import map_arrays, scaled
from ..damping import Damping
from ..exceptions import InputError
from ..factor import KFactor
from ..inverse import Inverse, application_flops, precondition, precondition_linear
from ..process import Process, Settings
from ..stream import Columns
from ._direction import Product
from ._layer import Layer
from ._micro_batches import LayerTotals, factor_columns, gradient_columns
from ._scaling import probe
from .linear import formed, held, is_spent
from .policy import FactorInfo, Hyper, LayerPolicy, choice_of_side, named_process

__all__ = ["KFACLayer", "process_of"]


def process_of(factor: KFactor) -> Process:
    """The one process of an optimizer's factor."""
    (process,) = factor.processes.values()
    return process


class KFACLayer(Layer):
    """A layer that K-FAC preconditions.

    Args:
        name: see `Layer`.
        module: see `Layer`.
        mine: see `Layer`.
        shared: see `Layer`.
        policy: of the layer.
        asked: whether Algorithm 8 may be taken.

    Attributes:
        factors: of sides "A" and "G"; empty until the first columns.
        linear: whether Algorithm 8 is taken where it can be; None until the first columns, which tell n.
        dense: keep the EA factors although no process reads them, to measure errors by; to be set before them.
    """

    dense = False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        mine: Container[Tensor],
        shared: Container[Tensor],
        policy: LayerPolicy,
        *,
        asked: bool,
    ) -> None:
        super().__init__(name, module, mine, shared)
        self.policy = policy
        self.asked = asked
        self.factors: dict[str, KFactor] = {}
        self.linear: bool | None = None if asked else False
        self._infos: dict[str, FactorInfo] = {}
        self._kind: tuple[torch.dtype, torch.device] | None = None
        self._configured: Hyper | None = None

    @property
    def with_bias(self) -> bool:
        """Whether the bias is a column of Mat(g): it is if it is trained when the factors are made."""
        return self._infos["A"].d > self.width if self._infos else super().with_bias

    @property
    def is_held(self) -> bool:
        """Whether this step's gradient is there as factors, and nothing of it formed or of an earlier step."""
        return all(held(p) and formed(p) is None and not is_spent(p) for p in self.parameters)

    # ------------------------------------------------------------------------------------------- columns

    def gradient_columns(self, totals: LayerTotals) -> Columns:
        """This process's columns of `G A^T = Mat(g)`: of a gradient that is held its own factors."""
        if self.is_held:
            return self._held_columns()
        return gradient_columns(self.parts, totals) if self.parts else self._no_columns(totals)

    def _held_columns(self) -> Columns:
        shares = held(self.weight)
        x, grad = (torch.cat(parts) for parts in zip(*((s.inputs, s.grad) for s in shares), strict=True))
        dtype = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
        A, G = x.T.to(dtype), grad.T.to(dtype)
        if self.with_bias:
            A = torch.cat([A, A.new_ones(1, A.shape[1])])
        return Columns(A, G if self.loss_scale == 1.0 else G / self.loss_scale)

    def factor_columns(self, totals: LayerTotals, *, sampled: bool) -> Columns:
        """This process's columns of the factors."""
        return factor_columns(self.parts, totals, sampled=sampled) if self.parts else self._no_columns(totals)

    def _no_columns(self, totals: LayerTotals) -> Columns:
        dtype = torch.float64 if totals.double else torch.float32
        A, G = (torch.zeros(d, 0, dtype=dtype, device=self.weight.device) for d in self.dimensions)
        return Columns(A, G)

    def check_kind(self, k: int, columns: Columns) -> None:
        """Refuses columns that the factors cannot take: the model was changed after its first step."""
        for side, X in zip("AG", columns, strict=True):
            if not self.factors or self._kind is None:
                return
            here, there = (X.shape[0], X.dtype, X.device), (self._infos[side].d, *self._kind)
            if here != there:
                raise InputError(
                    f"layer {self.name!r}, step {k}: columns {side} of {_kind(*here)}, but a factor of "
                    f"{_kind(*there)}; convert, move or change the model before its first step"
                )

    def is_cheaper_by_columns(self, n: int) -> bool:
        """Whether Algorithm 8 takes fewer flops than Algorithm 1 with n columns."""
        d_A, d_G = self.dimensions
        if n >= min(d_A, d_G):
            return False
        m_A, m_G = (min(info.d, self._rank(side, n)) for side, info in self._infos.items())
        by_gradient, by_columns = application_flops(d_A, d_G, n, m_A, m_G)
        if not self.is_held:  # the gradient is formed all the same, and compared with the columns
            by_columns += 2.0 * d_A * d_G * (n + 1)
        return by_columns < by_gradient

    def _rank(self, side: str, n: int) -> int:
        """Modes of a side's estimate; r + n as long as there is none."""
        process = process_of(self.factors[side])
        return process.settings.rank + n if process.estimate is None else process.estimate.lowrank.m

    def multiple_of_columns(self, columns: Columns, unit: float) -> Tensor:
        """The c with .grad = c G A^T, by one product of each with a fixed vector v of signs.

        Clipping by a norm leaves a multiple. Where a part of .grad is held as factors and another is formed, the
        second came from elsewhere: no product is needed, but whether it is zero. (Or the factors outgrew the
        gradient, and Algorithm 8 would save nothing.) So it is with gradients of an earlier step that were not
        cleared.

        Else rounding is allowed for. With unit round-off u, entry (q, r) of .grad is off by some u |G_q| |A_r|, in
        the norms of the rows, with signs that v's are independent of: in all, .grad v by u ||G||_F ||A||_F, and
        G (A^T v) by as much.

        Args:
            columns: A and G of all micro-batches.
            unit: u of the backward's products.

        Returns:
            A 0-d float64 tensor: 1 where c is 1 but for rounding, NaN where .grad is no multiple.
        """
        A, G = columns
        one = torch.ones((), dtype=torch.float64, device=G.device)
        none = one * torch.nan
        if any(is_spent(p) for p in self.parameters):
            return none
        if others := [there for p in self.parameters if held(p) and (there := formed(p)) is not None]:
            return torch.where(torch.stack([there.any() for there in others]).any(), none, one)
        v, norm = probe(A.shape[0], A), torch.linalg.vector_norm
        have, want = self.times(v).double(), (G @ (A.T @ v)).double()
        tolerance = 8 * unit * norm(G).double() * norm(A)
        c = torch.where(norm(have - want) <= tolerance, one, have @ want / (want @ want))
        return torch.where(norm(have - c * want) <= c.abs() * tolerance, c, none)

    # ------------------------------------------------------------------------------------------ K-factors

    def make_factors(self, columns: Columns, n: int, settings: Settings) -> list[str]:
        """Makes the factors, if they are not there.

        Args:
            columns: this process's first ones.
            n: their number in all processes.
            settings: of the processes.

        Returns:
            What the log should say: which factors have no room for their process (§3.5).
        """
        if self.factors:
            return []
        sides = zip("AG", columns, strict=True)
        self._infos = {side: FactorInfo(self.name, side, X.shape[0], n) for side, X in sides}
        self.factors = {side: self._made(info, settings) for side, info in self._infos.items()}
        self._kind = columns.A.dtype, columns.A.device
        said = []
        for side, factor in self.factors.items():
            choice, (running,) = choice_of_side(self.policy, side), factor.processes
            if isinstance(choice, str) and (
                why := Algorithm.parse(choice).no_room(settings, self._infos[side].d, n)
            ):
                said.append(f"layer {self.name!r}, factor {side}: {why}, {running} in place of {choice}")
        return said

    def _made(self, info: FactorInfo, settings: Settings) -> KFactor:
        name, process = named_process(choice_of_side(self.policy, info.side), info, settings)
        return KFactor(info.side, {name: process}, settings.rho, dense=self.dense)

    def configure(self, hyper: Hyper) -> None:
        """This step's hyper-parameters; a process of the user's own keeps its."""
        if hyper is self._configured:
            return
        self._configured = hyper
        for side, factor in self.factors.items():
            if isinstance(choice_of_side(self.policy, side), str):
                factor.configure(**hyper.configuration())
            else:
                factor.average.rho = hyper.settings.rho

    def push(self, side: str, k: int, X: Tensor, **sums: Any) -> None:
        """Step k of (8) and of a side's process, `sums` for `KFactor.push`; warns where a decomposition fails."""
        try:
            self.factors[side].push(k, X, finite=True, **sums)
        except InputError as error:
            self._warn(side, k, error)

    def _warn(self, side: str, k: int, error: InputError) -> None:
        warnings.warn(
            f"layer {self.name!r}, factor {side}, step {k}: the decomposition failed, also in float64; the "
            f"previous inverse is kept ({error})",
            RuntimeWarning,
            stacklevel=3,
        )

    # --------------------------------------------------------------------------------------------- step

    def inverses(
        self, k: int, phi: float, continuation: str, damping: Damping | None = None
    ) -> tuple[Inverse, Inverse] | None:
        """Of G and of A in their factors' units, or None where either is missing; warns as `push` does.

        Args:
            k: the step.
            phi: damping ratio.
            continuation: of the spectra.
            damping: a lam for each factor in place of phi lambda_max.

        Returns:
            Both inverses.
        """
        if not self.factors:
            return None
        phis = {"A": phi, "G": phi}
        if damping is not None:
            A, G = (self.factors[side].scale(next(iter(self.factors[side].processes))) for side in "AG")
            if A is None or G is None:
                return None
            phis = dict(zip("AG", damping.ratios(A, G), strict=True))
        inverse_G, inverse_A = (self._inverse(side, k, phis[side], continuation) for side in "GA")
        return None if inverse_G is None or inverse_A is None else (inverse_G, inverse_A)

    def _inverse(self, side: str, k: int, phi: float, continuation: str) -> Inverse | None:
        factor = self.factors[side]
        ((name, process),) = factor.processes.items()
        if "continuation" in process.fixed:
            continuation = process.settings.continuation
        try:
            return factor.inverse(name, phi=phi, continuation=continuation)
        except InputError as error:
            self._warn(side, k, error)
            return factor.inverse(name, phi=phi, continuation=continuation)  # the previous one

    def preconditioned(self, inverses: tuple[Inverse, Inverse], columns: Columns | None) -> Tensor | Product:
        """S (d_G, d_A), by Algorithm 8 where there are columns, else by Algorithm 1 l.15-18.

        The inverses are of u^2 M, u a factor's unit, and `(u^2 M)^-1 = M^-1 / u^2`.
        """
        G, A = inverses
        unit_G, unit_A = (self.factors[side].unit or 1.0 for side in "GA")
        if columns is not None:
            P, Q = precondition_linear(scaled(columns.G, unit_G), scaled(columns.A, unit_A), G, A)
            return Product(scaled(P, unit_G), scaled(Q, unit_A))
        # The dtypes differ where only the layer's input or gradient is float64.
        assert self._kind is not None
        J = self.gradient().to(self._kind[0])
        S = precondition(scaled(scaled(J, unit_G), unit_A), G, A)
        return cast(Tensor, scaled(scaled(S, unit_G), unit_A))

    # ---------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Live arrays and plain values."""
        return {
            "linear": self.linear if self.asked else None,
            "factors": {side: {"n": self._infos[side].n, **f.state_dict()} for side, f in self.factors.items()},
        }

    def restored(self, state: Mapping[str, Any], settings: Settings) -> Callable[[], None]:
        """Makes ready to take a state.

        Args:
            state: of `state_dict`.
            settings: of the processes.

        Returns:
            What makes the layer take it, which is left as it is until then.

        Raises:
            InputError: the state is of another process or another size.
        """
        saved = state["factors"]
        infos = {s: FactorInfo(self.name, s, saved[s]["like"].shape[0], saved[s]["n"]) for s in saved}
        factors = {side: self._restored(infos[side], saved[side], settings) for side in saved}

        def take() -> None:
            if self.asked and state["linear"] is not None:
                self.linear = state["linear"]
            self.factors, self._infos, self._configured = factors, infos, None
            self._kind = (saved["A"]["like"].dtype, self.weight.device) if saved else None

        return take

    def _restored(self, info: FactorInfo, saved: Mapping[str, Any], settings: Settings) -> KFactor:
        where = f"layer {self.name!r}, factor {info.side}: the state is of"
        (name,) = saved["processes"]
        factor = self._made(info, settings)
        for rank in (1, info.d):  # the rank's schedule may have moved on since, and with it what has room
            if name not in factor.processes:
                factor = self._made(info, replace(settings, rank=rank))
        (now,) = factor.processes
        if name != now:
            raise InputError(f"{where} {name!r}, not of {now!r}")
        *_, wanted = sizes = _sizes(self, info.side)
        if info.d not in sizes:
            raise InputError(f"{where} d = {info.d}, not {wanted}")
        device = self.weight.device
        factor.load_state_dict(map_arrays(dict(saved), lambda t: _copied(t, device)))  # M is updated in place
        return factor


def _sizes(layer: KFACLayer, side: str) -> tuple[int, ...]:
    """What d may be: a bias counts if it was trained when the factors were made."""
    if side == "G":
        return (layer.dimensions[1],)
    return (layer.width, layer.width + 1) if layer.bias is not None else (layer.width,)


def _copied(t: Tensor, device: torch.device) -> Tensor:
    """With its strides: in another memory layout products are rounded otherwise, and no run resumes to the bit."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)


def _kind(d: int | None, dtype: torch.dtype, device: torch.device) -> str:
    return f"{d} rows in {dtype} on {device}"
