"""The K-factor processes: R-KFAC (9), B-KFAC (10), and Algorithms 1, 4, 5 and 7 on one factor.

`kfacerr.process` says how a process is driven, and holds the EA factor (8).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .array import eps, namespace, sum_of_squares
from .brand import carried, symmetric_brand
from .certificate import EVD_LOSS, FLOAT64, LOSS, Certificate
from .correction import correct
from .exceptions import InputError
from .inverse import Exact
from .lowrank import LowRank
from .process import Clock, EAFactor, Estimate, Process, check_rho, mean_square
from .rsvd import nystrom, rsvd, srevd
from .stream import Array

__all__ = ["Brand", "BrandCorrected", "BrandRsvd", "Evd", "Periodic", "Rsvd", "Sketch"]


class Periodic(Process):
    """A decomposition of M_k alone, once in T_inv iterations."""

    forgets = True

    def __init__(self, *, T_inv: int) -> None:
        super().__init__()
        self.T_inv = Clock(T_inv)

    def clocks(self) -> dict[str, Clock]:
        return {"T_inv": self.T_inv}

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        assert factor is not None
        if self.T_inv.due(k) or self.outdated(X, factor):
            self._take(factor)
        else:
            self._certificate = STALE

    def refresh(self, k: int, factor: EAFactor) -> None:
        self.T_inv.due(k)
        self._take(factor)

    def _take(self, factor: EAFactor) -> None:
        self.estimate = Estimate(self.decompose(factor.M), factor.trace)
        self._certificate = self.certified(factor)
        self.taken += 1

    def decompose(self, M: Array) -> LowRank:
        """The representation of M (d, d)."""
        raise NotImplementedError(f"{type(self).__name__} is a periodic process without `decompose`")

    def certified(self, factor: EAFactor) -> Certificate | str:
        """The certificate of the decomposition just taken."""
        return "this process derives none"

    def outdated(self, X: Array, factor: EAFactor) -> bool:
        """Whether a new decomposition is needed before T_inv is over."""
        return False


STALE = "stale: M moved on since the decomposition, and M_k >= rho^j M_{k-j} is all that is left of the order"
NOT_PSD = "the sketch has a projection error and is none of RS and Nyström: M - M~ need not be p.s.d."
CORRECTED = "corrected (Algorithm 6): M - M~ need not be p.s.d. any more"
DROPPED = "columns between Brand updates were dropped: M holds what the estimate never saw"
WAITING = "stale: columns wait for the next Brand update"


def _certified_decomposition(low: LowRank, factor: EAFactor) -> Certificate:
    """Of 0 <= low <= M."""
    square = namespace(factor.M).astype(sum_of_squares(factor.M), factor.M.dtype)
    return Certificate.of_decomposition(low, factor.trace, square, memory=1 / (1 - factor.rho))


def _certified_copy(factor: EAFactor) -> Certificate:
    """Of M~ = M: no error, but the rounding of M by (8) and of the EVD by which M~ may be applied."""
    M, trace = factor.M, factor.trace
    d, unit, size = M.shape[0], eps(M), namespace(M).astype(sum_of_squares(M) ** 0.5, M.dtype)
    products = (LOSS[0] + LOSS[1] * d**0.5) * unit * trace / (1 - factor.rho)
    rounding = products + EVD_LOSS * d * unit * size
    return Certificate(0 * trace, rounding, rounding, rounding, d)


class Evd(Periodic):
    """K-FAC: M_k itself, of which the inverse, or the EVD, is taken when it is asked for."""

    def decompose(self, M: Array) -> LowRank:
        return Exact(namespace(M).asarray(M, copy=True))

    def certified(self, factor: EAFactor) -> Certificate | str:
        return _certified_copy(factor)

    def state_dict(self) -> dict[str, Any]:
        held = self.estimate
        if held is None or not isinstance(held.lowrank, Exact):
            return super().state_dict()
        self.estimate = None  # its modes are not what is saved
        state = super().state_dict() | {"exact": {"M": held.lowrank.M, "trace": held.trace}}
        self.estimate = held
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "exact" in state:
            self.estimate = Estimate(Exact(state["exact"]["M"]), state["exact"]["trace"])


@dataclass
class Sketch:
    """How an RSVD is taken: random source, oversampling r_o, power iterations, and RS, SRE or Nyström."""

    rng: np.random.Generator
    oversampling: int = 10
    n_pwr_it: int = 4
    method: Callable[..., LowRank] = rsvd

    def __call__(self, M: Array, rank: int) -> LowRank:
        return self.method(M, rank, oversampling=self.oversampling, n_pwr_it=self.n_pwr_it, rng=self.rng)

    def certified(self, low: LowRank, factor: EAFactor, rank: int) -> Certificate | str:
        """The certificate of `low`, which is what this sketch gave."""
        exact = self.method is srevd and rank + self.oversampling >= low.d
        if exact or self.method in (rsvd, nystrom):
            return _certified_decomposition(low, factor)
        return NOT_PSD

    def check_adaptive(self, growth: float) -> None:
        """Refuses adaptive updates where nothing is certified to drive them."""
        if growth == 0:
            return
        if not growth > 1:
            raise InputError(f"the error's growth that an adaptive update waits for must exceed 1, got {growth}")
        if self.method not in (rsvd, nystrom):
            raise InputError("adaptive updates need a sketch that certifies its error: RS or Nyström")


class Rsvd(Periodic):
    """R-KFAC (9), Algorithm 1 l.13: the rank-r RSVD of M_k. With a T_inv beyond the run: "no update".

    Adaptive. At a decomposition the relative nuclear error is q = (t - sum D)/t, exactly. Afterwards, with
    c_i = u_i^T M_k u_i, which (8) updates from U^T X_k alone, and P = I - U U^T, pinching E = M_k - M~ to the
    diagonal of the basis gives ||E||_* >= sum |c_i - D_i| + tr(P M_k P) = sum |c_i - D_i| + t_k - sum c_i. A new
    decomposition is taken when that exceeds `adaptive` q t_k: then the relative nuclear error has surely grown by
    that factor. The part of E that couples U with the rest is not seen by it.

    Args:
        rank: r.
        sketch: how the RSVD is taken.
        T_inv: its period.
        adaptive: growth of the relative nuclear error at which it is taken before T_inv is over; 0 for never.
    """

    def __init__(self, rank: int, sketch: Sketch, *, T_inv: int, adaptive: float = 0.0) -> None:
        super().__init__(T_inv=T_inv)
        sketch.check_adaptive(adaptive)
        self.rank = rank
        self.sketch = sketch
        self.rng = sketch.rng
        self.adaptive = adaptive
        self._fresh = 0.0  # q at the last decomposition, not below rounding
        self._energy: Array | None = None  # (m,) c

    def decompose(self, M: Array) -> LowRank:
        return self.sketch(M, self.rank)

    def certified(self, factor: EAFactor) -> Certificate | str:
        assert self.estimate is not None
        low = self.estimate.lowrank
        known = self.sketch.certified(low, factor, self.rank)
        if self.adaptive and isinstance(known, Certificate):
            self._fresh = _relative(known.nuclear, known.rounding, factor.trace)
            self._energy = namespace(low.D).sum(low.U * (factor.M @ low.U), axis=0)
        return known

    def outdated(self, X: Array, factor: EAFactor) -> bool:
        if self._energy is None or self.estimate is None:
            return False
        low = self.estimate.lowrank
        xp = namespace(low.D)
        self._energy = factor.rho * self._energy + (1 - factor.rho) * xp.sum(low.project(X) ** 2, axis=1)
        least = xp.sum(xp.abs(self._energy - low.D)) + factor.trace - xp.sum(self._energy)
        return float(least) > self.adaptive * self._fresh * float(factor.trace)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "adaptive": {"fresh": self._fresh, "energy": self._energy}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        held = state.get("adaptive", {"fresh": 0.0, "energy": None})
        self._fresh, self._energy = held["fresh"], held["energy"]


def _relative(error: Array, rounding: Array, trace: Array) -> float:
    """max(error, rounding)/trace on the host, 0 for a zero factor."""
    t = float(trace)
    return max(float(error), float(rounding)) / t if t > 0 else 0.0


class Brand(Process):
    """B-KFAC (10), Algorithm 4: truncate to rank r, then the symmetric Brand update with the new columns.

    Never forms a (d, d) array. The estimate has rank r + n: truncation happens just before the next update.

    Args:
        rank: r.
        rho: EA decay.
        T_brand: an update once in T_brand iterations. The columns in between are dropped, as in the paper.
        accumulate: they are kept instead, and the next update takes all of them with the weights of (8). The
            estimate then has rank r + n times the number of batches.
    """

    needs_factor = False

    def __init__(self, rank: int, *, rho: float, T_brand: int = 1, accumulate: bool = False) -> None:
        super().__init__()
        check_rho(rho)
        if rank < 1:
            raise InputError(f"a truncation rank of at least 1 is needed, got {rank}")
        self.rank = rank
        self.rho = rho
        self.T_brand = Clock(T_brand)
        self.accumulate = accumulate
        self._waiting: tuple[float, Array] | None = None  # (c, W): M is to become c M_B + W W^T

    def clocks(self) -> dict[str, Clock]:
        return {"T_brand": self.T_brand}

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        self._absorb(k, X)

    def _absorb(self, k: int, X: Array) -> bool:
        """Takes X_k; whether there was a Brand update, and not only columns kept or dropped."""
        due = self.T_brand.due(k)
        if self.estimate is None:
            # M_B,0 = X_0 X_0^T: exact thin factorisation of the first columns.
            self.estimate = Estimate(symmetric_brand(None, X), mean_square(X))
            low, trace = self.estimate.lowrank, self.estimate.trace
            self._certificate = Certificate.of_decomposition(low, trace, unit=FLOAT64)
            return True
        decay, W = self.rho, (1 - self.rho) ** 0.5 * X
        if self._waiting is not None:
            earlier, columns = self._waiting
            decay, W = decay * earlier, namespace(W).concat([self.rho**0.5 * columns, W], axis=1)
        if not due:
            self._waiting = (decay, W) if self.accumulate else None
            if not self.accumulate:
                self._certificate = DROPPED
            return False
        self._waiting = None
        whole = self.estimate.lowrank
        B, beside = carried(whole, self.rank, W)  # l.3-4
        D, removed = self._reduced(B.D, whole.D, decay)
        trace = decay * self.estimate.trace + mean_square(W)
        low = symmetric_brand(LowRank(B.U, decay * D), W, beside)  # l.6-7
        self.estimate = Estimate(low, trace)
        if isinstance(self._certificate, Certificate):
            self._certificate = self._certificate.after_brand(removed, decay, low, trace)
        return True

    def _reduced(self, kept: Array, D: Array, decay: float) -> tuple[Array, Array]:
        """The eigenvalues that the Brand update starts from, and those of what is taken away from M~, M~ - B >= 0.

        Args:
            kept: the leading ones, of the modes that are carried on.
            D: all of M~.
            decay: what the next update weighs M~ by.
        """
        return kept, D[kept.shape[0] :]

    def _certified(self) -> Certificate | str:
        return self._certificate if self._waiting is None else WAITING

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._waiting is not None:
            state["waiting"] = {"decay": self._waiting[0], "columns": self._waiting[1]}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        held = state.get("waiting")
        self._waiting = held and (held["decay"], held["columns"])


class BrandRsvd(Brand):
    """B-R-KFAC, Algorithm 5: B_{k-1} is overwritten by the RSVD of M_{k-1} once in T_RSVD iterations.

    As l.7 takes a Brand update after it, it waits for one where T_brand is longer.

    Adaptive: also when (t_{k-1} - sum_{i<=r} D_i)/t_{k-1}, the certified relative nuclear error of the truncation
    that B_{k-1} would otherwise be, exceeds `adaptive` times what it was when B was last optimal: at the last
    overwriting, or at B_0. (A relative error that is below rounding counts as rounding.)
    """

    needs_factor = True
    forgets = True

    def __init__(
        self,
        rank: int,
        sketch: Sketch,
        *,
        rho: float,
        T_rsvd: int,
        T_brand: int = 1,
        accumulate: bool = False,
        adaptive: float = 0.0,
    ) -> None:
        super().__init__(rank, rho=rho, T_brand=T_brand, accumulate=accumulate)
        sketch.check_adaptive(adaptive)
        if adaptive and T_brand > 1:
            raise InputError("adaptive overwriting needs a Brand update at every step, T_brand=1")
        self.adaptive = adaptive
        self._fresh: float | None = None  # the relative error of the last optimal B, not below rounding
        self.sketch = sketch
        self.rng = sketch.rng
        self.T_rsvd = Clock(T_rsvd)

    def clocks(self) -> dict[str, Clock]:
        return {**super().clocks(), "T_rsvd": self.T_rsvd}

    def begin(self, k: int, factor: EAFactor | None) -> None:
        assert factor is not None
        if not self.T_brand.coming(k):
            return
        due = self.T_rsvd.due(k)
        if factor.M is not None and (due or self._grown()):
            self._overwrite(factor)

    def _grown(self) -> bool:
        """Whether the certified error of the truncation grew by the factor `adaptive`."""
        known = self._certificate
        if not self.adaptive or self.estimate is None or isinstance(known, str):
            return False
        low, trace = self.estimate.lowrank, self.estimate.trace
        error = _relative(trace - namespace(low.D).sum(low.D[: min(self.rank, low.m)]), known.rounding, trace)
        if self._fresh is None:
            self._fresh = error
        return error > self.adaptive * self._fresh

    def refresh(self, k: int, factor: EAFactor) -> None:
        self.T_rsvd.due(k)
        self._overwrite(factor)

    def _overwrite(self, factor: EAFactor) -> None:
        self._waiting = None  # M holds those columns
        low = self.sketch(factor.M, self.rank)
        self.estimate = Estimate(low, factor.trace)
        self._certificate = self.sketch.certified(low, factor, self.rank)
        self.taken += 1
        if self.adaptive and isinstance(self._certificate, Certificate):
            self._fresh = _relative(self._certificate.nuclear, self._certificate.rounding, factor.trace)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "fresh": self._fresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._fresh = state.get("fresh")


class BrandCorrected(Brand):
    """B-KFAC-C, Algorithm 7: once in T_corct iterations the estimate is corrected on random modes (Alg. 6).

    Only after a Brand update, which the correction follows in Algorithm 7.
    """

    needs_factor = True

    def __init__(
        self,
        rank: int,
        *,
        rho: float,
        T_corct: int,
        phi_corct: float,
        rng: np.random.Generator,
        T_brand: int = 1,
        accumulate: bool = False,
    ) -> None:
        super().__init__(rank, rho=rho, T_brand=T_brand, accumulate=accumulate)
        if not 0 < phi_corct <= 1:
            raise InputError(f"phi_corct must lie in (0, 1], got {phi_corct}")
        self.T_corct = Clock(T_corct)
        self.phi_corct = phi_corct
        self.rng = rng

    def clocks(self) -> dict[str, Clock]:
        return {**super().clocks(), "T_corct": self.T_corct}

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        if not (self._absorb(k, X) and self.T_corct.due(k)):
            return
        assert factor is not None and self.estimate is not None and self.rng is not None
        modes = self.estimate.lowrank.m
        count = min(round(self.phi_corct * self.rank), modes)  # n_crc
        if count == 0:  # nothing is corrected, and what was certain stays so
            return
        idx = self.rng.choice(modes, size=count, replace=False)
        self.estimate = Estimate(correct(self.estimate.lowrank, factor.M, idx), self.estimate.trace)
        self._certificate = CORRECTED
        self.taken += 1
