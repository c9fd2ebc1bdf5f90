"""The process protocol, and what all processes share: the EA factor (8), estimates, and schedules.

Protocol. At every iteration k that brings columns X_k a driver calls, for each process,

    process.begin(k, factor)        # factor holds M_{k-1}
    factor.update(X_k)              # (8), once for all processes; only if one of them needs the factor
    process.update(k, X_k, factor)  # factor holds M_k

and reads `process.estimate`. The error study and the optimizers drive the same objects. A process of your own
is a subclass of `Process`; `estimate` must be an `Estimate` after the first `update`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .array import check_columns, namespace, rank_k_update
from .certificate import Certificate
from .exceptions import InputError
from .lowrank import LowRank
from .stream import Array

__all__ = ["Clock", "EAFactor", "Estimate", "Process", "check_rho", "mean_square"]


def check_rho(rho: float) -> None:
    if not 0 < rho < 1:
        raise InputError(f"decay rho must lie in (0, 1), got {rho}")


def mean_square(X: Array) -> Array:
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
            self.trace = mean_square(X)
        else:
            namespace(self.M, X)
            self.M = rank_k_update(self.M, X, alpha=1 - self.rho, beta=self.rho)
            self.trace = self.rho * self.trace + (1 - self.rho) * mean_square(X)

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
        raise NotImplementedError(f"{type(self).__name__} is a process without `update`")

    def refresh(self, k: int, factor: EAFactor) -> None:
        """The heaviest update from M_k alone, at a step that brings no columns. Only where `forgets`."""
        raise NotImplementedError(f"{type(self).__name__} forgets, but is a process without `refresh`")

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
