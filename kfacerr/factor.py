"""One K-factor: (8), the processes that follow it, and the only cache of its inverses.

Whoever pushes columns, a live study, a replay, `verify` or an optimizer, what is numerically done to them is done
here: checks, range, (8), the processes' updates, and damped inverses.

**Range.** Squares and inverses of columns of extreme size leave the range of the dtype. Such columns are brought
near 1 by one power of two for the whole stream, `unit`, taken from the first that are not zero. That is exact, and
no error metric depends on it. All that is held then belongs to the factor unit^2 M.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from .array import check_columns, failures, is_finite, map_arrays, namespace, scaled, to_dtype
from .checks import choice, instance, names, whole
from .damping import Scale
from .ea import EAFactor
from .exceptions import InputError
from .inverse import DampedInverse, DenseInverse, Exact, check_continuation, damped_inverse, exact_inverse
from .lanczos import lambda_max
from .process import Estimate, Process
from .stream import Array

__all__ = ["KFactor"]

_COMFORTABLE = 24
"""Columns whose largest entry lies within 2^+-24 stay as they are."""


class _Held(NamedTuple):
    """A damped inverse and what it was made of."""

    estimate: Estimate
    damping: Any
    inverse: DampedInverse | DenseInverse | None


class KFactor:
    """The factor of one side of one layer, and the processes that follow it.

    Args:
        side: "A" or "G", for messages.
        processes: by name; one in an optimizer, those of all algorithms in a study.
        rho: EA decay.
        dense: keep M although no process reads it.

    Attributes:
        average: the EA factor (8); its M is None unless something reads it.
        unit: what columns are multiplied with, a power of two; None before the first that are not zero.
    """

    def __init__(self, side: str, processes: Mapping[str, Process], rho: float, *, dense: bool = False) -> None:
        self.side = side
        self.processes = dict(instance(processes, "processes", Mapping))
        for name, process in self.processes.items():
            instance(process, f"process {name!r}", Process)
        self.average = EAFactor(rho)
        self.unit: float | None = None
        self._dense = dense
        self._like: Array = None  # the first columns' kind: (d, 0)
        self._updates = 0
        self._inverses: dict[tuple[str, str], _Held] = {}
        self._scales: dict[str, tuple[Estimate, Scale | None]] = {}
        self._exact_scale: tuple[int, Scale] | None = None  # updates
        self._reference: tuple[int, float, DenseInverse, Array] | None = None  # updates, phi, inverse, lam

    def __repr__(self) -> str:
        return f"<kfacerr KFactor {self.side!r}: d={self.d}, {', '.join(self.processes)}>"

    @property
    def d(self) -> int | None:
        """Its dimension; None before the first columns."""
        return None if self._like is None else self._like.shape[0]

    @property
    def squared_unit(self) -> float:
        """What M is multiplied with."""
        return (self.unit or 1.0) ** 2

    @property
    def dense(self) -> bool:
        """Whether M is kept."""
        return self._dense or any(process.needs_factor for process in self.processes.values())

    @property
    def needs_columns(self) -> bool:
        """Whether a process reads columns or M_{k-1}; if not, `gram` is all that `push` needs."""
        return any(process.needs_columns for process in self.processes.values())

    def due(self, k: int) -> bool:
        """Whether the update of iteration k may decompose anything."""
        return any(process.due(k) for process in self.processes.values())

    def configure(self, **settings: Any) -> None:
        """Gives all processes, and (8), these settings; see `Process.configure`."""
        self.average.rho = settings.get("rho", self.average.rho)
        for process in self.processes.values():
            process.configure(**settings)

    # -------------------------------------------------------------------------------------------- columns

    def admit(self, X: Array, *, finite: bool = False) -> Array:
        """Columns X (d, n) as the factor takes them: checked, and in its unit.

        Args:
            X: the columns.
            finite: the caller has seen that X is finite.

        Returns:
            (d, n): X itself, or X times the unit.

        Raises:
            InputError: no real floating (d, n) matrix, of another kind than before, or with NaN or Inf.
        """
        check_columns(X, self.d, self.side)
        if self._like is None:
            self._like = X[:, :0]
        else:
            namespace(self._like, X)
        if not finite and not is_finite(X):
            raise InputError(f"{self.side}: NaN or Inf in the columns")
        if self.unit is None and X.shape[1]:
            self.set_unit(float(namespace(X).max(namespace(X).abs(X))))
        return X if self.unit is None else scaled(X, self.unit)

    def set_unit(self, largest: float) -> None:
        """Chooses the unit by the largest entry of the first columns; 0 leaves it open."""
        if self.unit is None and largest > 0:
            exponent = math.frexp(largest)[1]
            self.unit = 1.0 if abs(exponent) <= _COMFORTABLE else 2.0**-exponent

    def push(
        self,
        k: int,
        X: Array,
        *,
        active: Collection[str] | None = None,
        gram: Array | None = None,
        total: Mapping[str, Array] | None = None,
        finite: bool = False,
    ) -> None:
        """Iteration k of (8) and of the processes, with columns X (d, n).

        A decomposition that fails is tried again in float64. If that fails too the process stays as it was.

        Args:
            k: the iteration.
            X: its columns.
            active: the processes that take part; all by default.
            gram: X X^T in the factor's unit, to be absorbed in place of X's own (several processes' sum).
            total: what a process that `adds` takes in place of X's own share (several processes' sum).
            finite: the caller has seen that X is finite.

        Raises:
            InputError: X is refused by `admit`, and nothing is changed; or a decomposition failed, after all else
                has been done.
        """
        whole(k, "k")
        X = self.admit(X, finite=finite)
        wanted = self.processes if active is None else names(active, "active")
        chosen = {choice(name, "process", self.processes): self.processes[name] for name in wanted}
        before = {name: process.state_dict() for name, process in chosen.items()}
        failed: dict[str, Exception] = {}

        def attempt(call: Callable[[Process, Array, EAFactor | None], None]) -> None:
            for name, process in chosen.items():
                if name not in failed and (failure := _attempt(process, call, X, self._average())) is not None:
                    # Also what `begin` did: an overwriting is no estimate without the Brand update that follows.
                    process.load_state_dict(before[name])
                    failed[name] = failure

        attempt(lambda process, x, average: process.begin(k, average))
        self.absorb(X, gram=gram)
        if total is None:
            attempt(lambda process, x, average: process.update(k, x, average))
        else:
            attempt(lambda process, x, average: process.take(k, total))
        for name, failure in failed.items():
            reason = " ".join(str(failure).split())
            raise InputError(f"{self.side}: {name}: {reason}") from failure

    def absorb(self, X: Array, *, gram: Array | None = None) -> None:
        """(8) alone, with admitted columns X or with X X^T."""
        self._updates += 1
        if not self.dense:
            return
        if gram is None:
            self.average.update(X)
        else:
            self.average.update_by_gram(gram)

    def refresh(self, k: int) -> None:
        """The heaviest updates from M_k alone, of the processes that forget what came before."""
        if self.average.M is None:
            raise InputError("no columns came in before it")
        for process in self.processes.values():
            if process.memoryless:
                process.refresh(k, self.average)

    def _average(self) -> EAFactor | None:
        return self.average if self.dense else None

    # ------------------------------------------------------------------------------------------- inverses

    def inverse(
        self, name: str, *, phi: float | None = None, lam: Array | None = None, continuation: str = "min"
    ) -> DampedInverse | DenseInverse | None:
        """A process's damped inverse of unit^2 M, made anew only where its estimate or the damping changed.

        Args:
            name: of the process.
            phi: damping ratio, or
            lam: a damping.
            continuation: of the spectrum.

        Returns:
            The inverse; None where there is none: no estimate yet, or one that is zero.

        Raises:
            InputError: it cannot be made, in float64 neither. It is not tried again before something changes:
                until then the previous one is returned.
        """
        check_continuation(continuation)
        estimate = self.processes[choice(name, "process", self.processes)].estimate
        if estimate is None or estimate.lowrank.m == 0:
            return None
        held = self._inverses.get((name, continuation))
        damping = phi if lam is None else lam
        if held is not None and held.estimate is estimate and _same(held.damping, damping):
            return held.inverse
        new = held is None or held.estimate is not estimate
        if new and not float(estimate.lowrank.lambda_max) > 0:
            return None
        options = {"continuation": continuation, "trace": estimate.trace, "level": estimate.level}
        try:
            inverse = damped_inverse(estimate.lowrank, phi=phi, lam=lam, **options)
        except failures() as error:
            previous = None if held is None else held.inverse
            self._inverses[name, continuation] = _Held(estimate, damping, previous)
            raise InputError(f"{self.side}: {name}: {' '.join(str(error).split())}") from error
        self._inverses[name, continuation] = _Held(estimate, damping, inverse)
        return inverse

    def scale(self, name: str) -> Scale | None:
        """What dampings of a process's estimate refer to, of M itself, whatever the unit.

        Args:
            name: of the process.

        Returns:
            Its dimension, largest eigenvalue, and the trace of M as it was then; None where `inverse` gives none.
        """
        estimate = self.processes[choice(name, "process", self.processes)].estimate
        if estimate is None or estimate.lowrank.m == 0:
            return None
        held = self._scales.get(name)
        if held is None or held[0] is not estimate:
            top = float(estimate.lowrank.lambda_max) / self.squared_unit
            trace = float(estimate.trace) / self.squared_unit
            held = self._scales[name] = estimate, Scale(estimate.lowrank.d, top, trace) if top > 0 else None
        return held[1]

    def exact_scale(self) -> Scale:
        """`scale` of M_k; kept until M changes.

        Returns:
            Its dimension, largest eigenvalue and trace.

        Raises:
            InputError: no columns came in yet, or M is not kept.
        """
        M = self.average.M
        if M is None:
            raise InputError(f"{self.side}: there is no M_k yet, or none is kept")
        if self._exact_scale is None or self._exact_scale[0] != self._updates:
            top, trace = lambda_max(M), float(self.average.trace)
            self._exact_scale = (
                self._updates,
                Scale(M.shape[0], top / self.squared_unit, trace / self.squared_unit),
            )
        return self._exact_scale[1]

    def reference(self, phi: float) -> tuple[DenseInverse, Array]:
        """The exact damped inverse of unit^2 M_k, and its damping; kept until M or phi changes.

        It is K-FAC's own where K-FAC holds this very M_k: stale K-FAC is an earlier reference.
        """
        held = self._reference
        if held is None or held[:2] != (self._updates, phi):
            same = self._held_exactly()
            inverse, lam = exact_inverse(self.average.M, phi=phi) if same is None else same.inverse(phi=phi)
            held = self._reference = (self._updates, phi, inverse, lam)
        return held[2], held[3]

    def _held_exactly(self) -> Exact | None:
        """M_k as a process took it, if one did at this update: every update makes a trace of its own."""
        estimates = (process.estimate for process in self.processes.values())
        found = (e.lowrank for e in estimates if e is not None and e.trace is self.average.trace)
        return next((low for low in found if isinstance(low, Exact)), None)

    # ---------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of live arrays and plain values; the inverses are made anew from it."""
        return {
            "unit": self.unit,
            "like": self._like,
            "updates": self._updates,
            "average": self.average.state_dict(),
            "processes": {name: process.state_dict() for name, process in self.processes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a factor made with the same arguments."""
        self.unit, self._like, self._updates = state["unit"], state["like"], state["updates"]
        self.average.load_state_dict(state["average"])
        for name, process in self.processes.items():
            process.load_state_dict(state["processes"][name])
        self._inverses.clear()
        self._scales.clear()
        self._exact_scale = self._reference = None


def _attempt(
    process: Process,
    call: Callable[[Process, Array, EAFactor | None], None],
    X: Array,
    average: EAFactor | None,
) -> Exception | None:
    """A part of the process's step, in float64 if need be; why it failed, if it did."""
    before, saved = process.computed(), process.state_dict()
    try:
        call(process, X, average)
        _refuse_nonfinite(process, before)
        return None
    except failures() as error:
        first = error
    float64, own = namespace(X).float64, X.dtype
    if own == float64:
        return first
    try:
        process.load_state_dict(map_arrays(saved, lambda a: to_dtype(a, float64)))
        call(process, to_dtype(X, float64), _in_float64(average))
        _refuse_nonfinite(process, before)
        process.load_state_dict(map_arrays(process.state_dict(), lambda a: to_dtype(a, own)))
    except failures():
        return first
    return None


def _in_float64(average: EAFactor | None) -> EAFactor | None:
    if average is None or average.M is None:
        return average
    copy = EAFactor(average.rho)
    copy.load_state_dict(map_arrays(average.state_dict(), lambda a: to_dtype(a, namespace(a).float64)))
    return copy


def _refuse_nonfinite(process: Process, before: Mapping[str, Array | None]) -> None:
    """Waits for the device, after an update that computed something only."""
    for name, part in process.computed().items():
        if part is not None and part is not before.get(name) and not is_finite(part):
            raise InputError("NaN or Inf in the decomposition")


def _same(one: Any, other: Any) -> bool:
    """Whether two dampings are the same: numbers by value, arrays by identity (no device is asked)."""
    return one is other or (isinstance(one, int | float) and isinstance(other, int | float) and one == other)
