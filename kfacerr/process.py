"""The process protocol: what follows one K-factor, when its updates are due, and what they are configured with.

Protocol. At every iteration k that brings columns X_k, `kfacerr.factor.KFactor` calls

    process.begin(k, factor)        # factor holds M_{k-1}
    factor.update(X_k)              # (8), once for all processes; only if one of them needs the factor
    process.update(k, X_k, factor)  # factor holds M_k

and reads `process.estimate`. A process of your own is a subclass of `Process`; `estimate` must be an `Estimate`
after the first `update`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .certificate import Certificate
from .checks import instance, is_number, names, switch, whole
from .ea import EAFactor, check_rho
from .exceptions import InputError
from .inverse import check_continuation, representation
from .lowrank import LowRank
from .rsvd import check_sketch
from .stream import Array

__all__ = ["Clock", "Cost", "Estimate", "Process", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What processes are configured with, by the paper's names; the defaults are those of §4.2 and §6.

    Attributes:
        rank: target rank of an RSVD and truncation rank of Brand's update, r.
        rho: EA decay.
        oversampling: r_o of the RSVD.
        n_pwr_it: power iterations of the RSVD.
        sketch: "rs" (RS-KFAC), "sre" (SRE-KFAC) or "nystrom".
        phi_corct: share of the modes that a correction takes.
        T_inv: iterations between decompositions.
        T_brand: iterations between Brand updates.
        T_rsvd: iterations between overwritings by an RSVD.
        T_corct: iterations between corrections.
        s: columns of N-KFAC's sketch; 0 for twice the rank.
        T_base: iterations between re-basings of that sketch; 0 for never, None for one in 5 updates.
        accumulate: Brand updates take the batches that T_brand skips, too, instead of dropping them.
        continuation: of the spectrum, see `kfacerr.inverse`.
        seed: of the random draws; every algorithm has a stream of its own, so that adding one changes no other.

    Raises:
        InputError: a value is out of range; names it.
    """

    rank: int = 220
    rho: float = 0.95
    oversampling: int = 10
    n_pwr_it: int = 4
    sketch: str = "rs"
    phi_corct: float = 0.5
    T_inv: int = 50
    T_brand: int = 1
    T_rsvd: int = 50
    T_corct: int = 50
    s: int = 0
    T_base: int | None = None
    accumulate: bool = False
    continuation: str = "min"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None or name != "T_base":
                object.__setattr__(self, name, whole(value, name, least))
        check_rho(self.rho)
        if not is_number(self.phi_corct) or not 0 < self.phi_corct <= 1:
            raise InputError(f"phi_corct must lie in (0, 1], got {self.phi_corct!r}")
        switch(self.accumulate, "accumulate")
        check_sketch(self.sketch)
        check_continuation(self.continuation)


_LEAST = dict.fromkeys(("oversampling", "n_pwr_it", "s", "T_base", "seed"), 0) | dict.fromkeys(
    ("rank", "T_inv", "T_brand", "T_rsvd", "T_corct"), 1
)


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


class Cost(NamedTuple):
    """What a process does to follow one factor (d, d) with n columns an update.

    Attributes:
        update: flops of every update, (8) included where the dense factor is needed.
        heavy: flops that its heaviest update (EVD, RSVD, correction) adds.
        period: iterations between two of those.
        numbers: array elements held, the dense factor included where it is needed.
        rank: modes that its inverse is applied with.
    """

    update: float
    heavy: float
    period: int
    numbers: float
    rank: int


class Clock:
    """Says when an event of period T iterations is due: at the first call of every [origin + jT, origin + (j+1)T).

    Counting intervals rather than testing k % T keeps the event where updates come at other steps than its own.
    With a period of 0 it is never due.
    """

    def __init__(self, period: int) -> None:
        if period < 0:
            raise InputError(f"a period of at least 1 iteration is needed, or 0 for never, got {period}")
        self.period = period
        self.origin = 0
        self.last: int | None = None

    def coming(self, k: int) -> bool:
        """Whether `due` would say yes."""
        return self.period > 0 and (k - self.origin) // self.period != self.last

    def due(self, k: int) -> bool:
        """Whether the event is due at iteration k; if so, it counts as done."""
        coming = self.coming(k)
        if coming:
            self.last = (k - self.origin) // self.period
        return coming

    def reschedule(self, period: int) -> None:
        """Another period from now on; the start of the last event's interval counts as its time."""
        if self.last is not None:
            self.last = self.last * self.period // period if period else None
        self.period = period

    def restart(self, k: int) -> None:
        """Counts from iteration k on, where the event is due again."""
        self.origin, self.last = k, None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"origin": self.origin, "last": self.last, "period": self.period}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.origin, self.last, self.period = state["origin"], state["last"], state["period"]


class Process:
    """One K-factor estimate that follows the EA factor; see the module's docstring for the protocol.

        process = Brand(rank=8, rho=0.9)

    Args:
        settings: what it is configured with; the defaults of `Settings` if None.
        rng: the random source; one of `settings.seed` if None.
        fixed: the settings that `configure` does not touch, being part of an algorithm's name.
        **given: settings that differ.

    Attributes:
        needs_factor: whether `begin` and `update` read the dense factor; if not, they may be given None.
        needs_columns: whether they read columns or M_{k-1}; if not, M_k is all they need.
        adds: whether an update takes columns through sums over them alone, `share` and `take`.
        memoryless: whether the heaviest update depends on M_k alone, so that all before it may be left out.
        schedules: the settings that are periods of its updates.
    """

    needs_factor: ClassVar[bool] = True
    needs_columns: ClassVar[bool] = True
    adds: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False
    schedules: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        rng: np.random.Generator | None = None,
        fixed: tuple[str, ...] = (),
        **given: Any,
    ) -> None:
        settings = Settings() if settings is None else instance(settings, "settings", Settings)
        self.settings = replace(settings, **given)
        self.fixed = frozenset(names(fixed, "fixed"))
        self.clocks = {name: Clock(getattr(self.settings, name) or 0) for name in self.schedules}
        rng = np.random.default_rng(self.settings.seed) if rng is None else rng
        self.rng = instance(rng, "rng", np.random.Generator)
        self._held: Estimate | None = None
        self._certificate: Certificate | str = "this process derives none"

    def __repr__(self) -> str:
        held = "nothing yet" if self._held is None else repr(self._held.lowrank)
        return f"<kfacerr {type(self).__name__} at rank {self.settings.rank}: {held}>"

    # ------------------------------------------------------------------------------------------- settings

    def configure(self, **settings: Any) -> None:
        """Takes other settings from now on, but for those that are `fixed`."""
        free = {name: value for name, value in settings.items() if name not in self.fixed}
        self.settings = replace(self.settings, **free)
        for name, clock in self.clocks.items():
            clock.reschedule(getattr(self.settings, name) or 0)

    def cost(self, d: int, n: int) -> Cost:
        """What it costs to follow a factor (d, d) with n columns an update."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it costs")

    def due(self, k: int) -> bool:
        """Whether the update of iteration k may decompose anything."""
        return self._held is None or not self.clocks or any(clock.coming(k) for clock in self.clocks.values())

    def restart(self, k: int) -> None:
        """Counts all periods from iteration k on: its heaviest update falls on the next step."""
        for clock in self.clocks.values():
            clock.restart(k)

    # -------------------------------------------------------------------------------------------- updates

    def begin(self, k: int, factor: EAFactor | None) -> None:
        """Called with M_{k-1}, before the factor absorbs X_k."""

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        """Called with X_k (d, n) and M_k."""
        raise NotImplementedError(f"{type(self).__name__} is a process without `update`")

    def share(self, k: int, X: Array) -> dict[str, Array]:
        """What the update of iteration k takes of columns X (d, n). Only where it `adds`; `take` follows."""
        raise NotImplementedError(f"{type(self).__name__} adds, but is a process without `share`")

    def take(self, k: int, total: Mapping[str, Array]) -> None:
        """`update`, with the sum of all columns' shares in place of X_k. Only where it `adds`."""
        raise NotImplementedError(f"{type(self).__name__} adds, but is a process without `take`")

    def refresh(self, k: int, factor: EAFactor) -> None:
        """The heaviest update from M_k alone, at a step that brings no columns. Only where `memoryless`."""
        raise NotImplementedError(f"{type(self).__name__} is memoryless, but a process without `refresh`")

    # ------------------------------------------------------------------------------------------ estimates

    @property
    def estimate(self) -> Estimate | None:
        """The current estimate, None before the first update; the same object until it changes."""
        if self._held is None:
            self._held = self._made()
        return self._held

    @estimate.setter
    def estimate(self, estimate: Estimate | None) -> None:
        self._held = estimate

    def _made(self) -> Estimate | None:
        """The estimate, of a process that computes it only when it is read."""
        return None

    def computed(self) -> dict[str, Array | None]:
        """What its updates compute, where a failure shows as NaN or Inf. Computes nothing itself."""
        return {} if self._held is None else self._held.lowrank.state_dict()

    # --------------------------------------------------------------------------------------- certificates

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

    # ---------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of arrays and plain values; `load_state_dict` of a process made alike restores it."""
        held, known = self._held, self._certificate
        return {
            "clocks": {name: clock.state_dict() for name, clock in self.clocks.items()},
            "rng": self.rng.bit_generator.state,
            "estimate": held and {**vars(held), "lowrank": held.lowrank.state_dict()},
            "certificate": known if isinstance(known, str) else dict(vars(known)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for name, clock in self.clocks.items():
            clock.load_state_dict(state["clocks"][name])
        self.rng.bit_generator.state = state["rng"]
        held, known = state["estimate"], state["certificate"]
        self.estimate = held and Estimate(**{**held, "lowrank": representation(held["lowrank"])})
        self._certificate = known if isinstance(known, str) else Certificate(**known)
