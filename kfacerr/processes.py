"""The K-factor processes: EA factor (8), R-KFAC (9), B-KFAC (10), and Algorithms 1, 4, 5 and 7 on one factor.

Protocol. At every iteration k that brings columns X_k a driver calls, for each process,

    process.begin(k, factor)        # factor holds M_{k-1}
    factor.update(X_k)              # (8), once for all processes; only if one of them needs the factor
    process.update(k, X_k, factor)  # factor holds M_k

and reads `process.estimate`. The error study and the optimizers drive the same objects. A process of your own
is a subclass of `Process`; `estimate` must be an `Estimate` after the first `update`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .backend import check_columns, namespace, rank_k_update
from .brand import orthonormalised, symmetric_brand
from .certificate import Certificate
from .correction import correct
from .errors import InputError
from .lowrank import LowRank
from .rsvd import evd, nystrom, rsvd, srevd
from .stream import Array

__all__ = ["Brand", "BrandCorrected", "BrandRsvd", "EAFactor", "Estimate", "Evd", "Process", "Rsvd", "Sketch"]


def check_rho(rho: float) -> None:
    if not 0 < rho < 1:
        raise InputError(f"decay rho must lie in (0, 1), got {rho}")


def _mean_square(X: Array) -> Array:
    """||X||_F^2 = tr(X X^T), a 0-d array."""
    return namespace(X).sum(X * X)


class EAFactor:
    """The exponentially averaged K-factor (8): M_0 = X_0 X_0^T, M_k = rho M_{k-1} + (1 - rho) X_k X_k^T.

    Attributes:
        M: (d, d), or None before the first columns. Updated in place: copy it to keep it.
        trace: tr M by its scalar recursion, a 0-d array.
    """

    def __init__(self, rho: float) -> None:
        check_rho(rho)
        self.rho = rho
        self.M: Array = None
        self.trace: Array = None

    def update(self, X: Array) -> None:
        """Absorbs columns X (d, n)."""
        check_columns(X, None if self.M is None else self.M.shape[0])
        if self.M is None:
            self.M = X @ X.T
            self.trace = _mean_square(X)
        else:
            namespace(self.M, X)
            self.M = rank_k_update(self.M, X, alpha=1 - self.rho, beta=self.rho)
            self.trace = self.rho * self.trace + (1 - self.rho) * _mean_square(X)

    def state_dict(self) -> dict[str, Any]:
        """The live arrays: write them out, or copy them, before the next update."""
        return {"M": self.M, "trace": self.trace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        M = state["M"]
        self.M = M if M is None else namespace(M).asarray(M, copy=True)  # `update` writes into it
        self.trace = state["trace"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a process holds.

    Attributes:
        lowrank: a representation of M.
        trace: the trace of the EA factor when it was formed.
        level: a mass with M <= lowrank + level I, where the process keeps one (Frequent Directions).
    """

    lowrank: LowRank
    trace: Array
    level: Array | None = None


class Clock:
    """Says when an event of period T iterations is due: at the first call of every [origin + jT, origin + (j+1)T).

    Counting intervals rather than testing k % T keeps the event where updates come at other steps than its own.
    """

    def __init__(self, period: int) -> None:
        if period < 1:
            raise InputError(f"a period of at least 1 iteration is needed, got {period}")
        self.period = period
        self.origin = 0
        self.last: int | None = None

    def coming(self, k: int) -> bool:
        """Whether `due` would say yes."""
        return (k - self.origin) // self.period != self.last

    def due(self, k: int) -> bool:
        coming = self.coming(k)
        self.last = (k - self.origin) // self.period
        return coming

    def reschedule(self, period: int) -> None:
        """Another period from now on; the start of the last event's interval counts as its time."""
        if period == self.period:
            return
        if period < 1:
            raise InputError(f"a period of at least 1 iteration is needed, got {period}")
        if self.last is not None:
            self.last = self.last * self.period // period
        self.period = period

    def restart(self, k: int) -> None:
        """Counts from iteration k on, where the event is due again."""
        self.origin, self.last = k, None

    def state_dict(self) -> dict[str, Any]:
        return {"origin": self.origin, "last": self.last, "period": self.period}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.origin, self.last = state["origin"], state["last"]
        self.period = state.get("period", self.period)


class Process:
    """One K-factor estimate that follows the EA factor; see the module's docstring for the protocol.

    Attributes:
        needs_factor: whether `begin` and `update` read the dense factor; if not, they may be given None.
        forgets: whether the heaviest update depends on the EA factor alone, so that a driver may leave out all
            updates before it.
        estimate: the current estimate, None before the first update.
        rng: the random source, for processes that draw.
        taken: the number of heaviest updates (EVDs, RSVDs, corrections) so far.
    """

    needs_factor: ClassVar[bool] = True
    forgets: ClassVar[bool] = False

    def __init__(self) -> None:
        self.estimate: Estimate | None = None
        self.rng: np.random.Generator | None = None
        self.taken = 0
        self._certificate: Certificate | str = "this process derives none"

    @property
    def certificate(self) -> Certificate | None:
        """What is certain of M_k - M~_k now, M_k of all columns `update` was given; None if `uncertified`."""
        known = self._certified()
        return None if isinstance(known, str) else known

    @property
    def uncertified(self) -> str | None:
        """Why there is no certificate; None if there is one."""
        known = self._certified()
        return known if isinstance(known, str) else None

    def _certified(self) -> Certificate | str:
        return self._certificate

    def clocks(self) -> dict[str, Clock]:
        """The process's schedules by the paper's names."""
        return {}

    def restart(self, k: int) -> None:
        """Counts all periods from iteration k on: its heaviest update falls on the next step."""
        for clock in self.clocks().values():
            clock.restart(k)

    def begin(self, k: int, factor: EAFactor | None) -> None:
        """Called with M_{k-1}, before the factor absorbs X_k."""

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        """Called with X_k (d, n) and M_k."""
        raise NotImplementedError

    def refresh(self, k: int, factor: EAFactor) -> None:
        """The heaviest update from M_k alone, at a step that brings no columns. Only where `forgets`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of arrays and plain values; `load_state_dict` of a process made alike restores it."""
        state: dict[str, Any] = {name: clock.state_dict() for name, clock in self.clocks().items()}
        if self.rng is not None:
            state["rng"] = self.rng.bit_generator.state
        if self.estimate is not None:
            X, given = self.estimate.lowrank, self.estimate
            state["estimate"] = {
                "basis": X.basis, "D": X.D, "mix": X.mix, "trace": given.trace, "level": given.level
            }  # fmt: skip
        known = self._certificate
        state["certificate"] = known if isinstance(known, str) else dict(vars(known))
        state["taken"] = self.taken
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, clock in self.clocks().items():
            if name in state:
                clock.load_state_dict(state[name])
        if self.rng is not None:
            self.rng.bit_generator.state = state["rng"]
        held = state.get("estimate")
        self.estimate = held and Estimate(
            LowRank(held["basis"], held["D"], held["mix"]), held["trace"], held.get("level")
        )
        known = state.get("certificate", "the state was saved without one")
        self._certificate = known if isinstance(known, str) else Certificate(**known)
        self.taken = state.get("taken", 0)


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
        raise NotImplementedError

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
    square = namespace(factor.M).linalg.vector_norm(factor.M) ** 2  # without a (d, d) temporary
    return Certificate.of_decomposition(low, factor.trace, square, memory=1 / (1 - factor.rho))


class Evd(Periodic):
    """K-FAC: the exact EVD of M_k."""

    def decompose(self, M: Array) -> LowRank:
        return evd(M)

    def certified(self, factor: EAFactor) -> Certificate | str:
        assert self.estimate is not None
        return _certified_decomposition(self.estimate.lowrank, factor)


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
            self.estimate = Estimate(symmetric_brand(None, X), _mean_square(X))
            self._certificate = Certificate.of_decomposition(self.estimate.lowrank, self.estimate.trace)
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
        B, removed = self._reduced(self.estimate.lowrank, decay)  # l.3-4
        trace = decay * self.estimate.trace + _mean_square(W)
        low = symmetric_brand(LowRank(B.U, decay * B.D), W)  # l.6-7
        self.estimate = Estimate(low, trace)
        if isinstance(self._certificate, Certificate):
            self._certificate = self._certificate.after_brand(removed, decay, low, trace)
        return True

    def _reduced(self, low: LowRank, decay: float) -> tuple[LowRank, Array]:
        """The rank-r B that the Brand update starts from, and the eigenvalues of low - B >= 0."""
        return orthonormalised(low.truncate(self.rank)), low.D[min(self.rank, low.m) :]

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
        idx = self.rng.choice(modes, size=count, replace=False)
        self.estimate = Estimate(correct(self.estimate.lowrank, factor.M, idx), self.estimate.trace)
        self._certificate = CORRECTED
        self.taken += 1
