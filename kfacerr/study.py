"""From a stream of one layer to the tidy table of errors (§4.2): the shared trajectory.

All algorithms watch the same columns. At each window's start every algorithm's periods are counted anew, so that
its heaviest update falls on the window's first step. Where a stream lacks that one, it is the first there is,
which must then be an update: one that was due in between may be missing too, and M_k would be of an earlier time.
Before a window, processes with a memory (B-KFAC, B-KFAC-C) run on the whole stream; those whose heaviest update
depends on the EA factor alone start with the window.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .algorithms import Settings, make_process
from .array import check_columns, namespace, to_numpy
from .exceptions import InputError
from .inverse import (
    CONTINUATIONS,
    ESCAPED,
    DampedInverse,
    DenseInverse,
    Exact,
    check_phi,
    damped_inverse,
    exact_inverse,
    precondition_linear,
)
from .metrics import METRICS, angle_error, inverse_error, norm_error, step_coordinates
from .process import EAFactor, Estimate, Process
from .processes import BrandRsvd, Rsvd
from .stream import Array, Step, Window

__all__ = ["DAMPINGS", "ErrorStudy", "Row", "by_window", "table"]

DAMPINGS = ("own", "common")
"""lam = phi * lambda_max of each method's own representation, or the reference's lam for all."""


class Row(NamedTuple):
    """One line of the error table."""

    algorithm: str
    k: int
    metric: str
    value: float
    epoch: int
    continuation: str


def table(rows: Iterable[Row], windows: Sequence[Window] = ()) -> pd.DataFrame:
    """The rows as a tidy data frame; with a column `window`, its first iteration, where windows are given."""
    frame = pd.DataFrame(list(rows), columns=list(Row._fields))
    if not windows:
        return frame
    starts = np.sort([w.start for w in windows])
    return frame.assign(window=starts[np.searchsorted(starts, frame.k, side="right") - 1])


def by_window(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each window and what to call it, in the windows' order.

    Windows are told apart by the columns epoch and `window`; a table without the latter has one an epoch.
    """
    if "window" not in frame:
        return [(f"epoch {epoch}", part) for epoch, part in frame.groupby("epoch")]
    several = frame.window.nunique() > frame.epoch.nunique()
    return [
        (f"epoch {epoch}, from {start}" if several else f"epoch {epoch}", part)
        for (epoch, start), part in frame.groupby(["epoch", "window"])
    ]


class _Held(NamedTuple):
    """A damped inverse, what it was made of, and its error against the reference it was measured with."""

    estimate: Estimate
    damping: Any
    inverse: DampedInverse | DenseInverse
    reference: DenseInverse
    error: float


class _Side:
    """One K-factor ("A" or "G"): its EA factor, every algorithm's process, and what is measured of them."""

    def __init__(self, rho: float, processes: Mapping[str, Process]) -> None:
        self.factor = EAFactor(rho)
        self.processes = processes
        self.reference: DenseInverse | None = None
        self.lam: Array = None
        self.held: dict[tuple[str, str], _Held] = {}

    def run(self, k: int, X: Array, active: Sequence[str]) -> None:
        """One update step of (8) and of the active processes."""
        for name in active:
            self.processes[name].begin(k, self.factor)
        self.factor.update(X)
        for name in active:
            self.processes[name].update(k, X, self.factor)

    def start(self, k: int) -> None:
        """A window starts at a step that brings no columns: processes that forget begin from M_k."""
        if self.factor.M is None:
            raise InputError("the window starts before the first update of the EA factors")
        for process in self.processes.values():
            if process.forgets:
                process.refresh(k, self.factor)

    def refer(self, phi: float) -> DenseInverse:
        """The exact damped inverse of M_k; if K-FAC holds this very M_k, then K-FAC's."""
        same = self._held_exactly()
        self.reference, self.lam = exact_inverse(self.factor.M, phi=phi) if same is None else same.inverse(phi=phi)
        return self.reference

    def _held_exactly(self) -> Exact | None:
        """M_k as a process took it, if one did at this update."""
        for process in self.processes.values():
            held = process.estimate
            # Every update makes a trace of its own.
            if held is not None and held.trace is self.factor.trace and isinstance(held.lowrank, Exact):
                return held.lowrank
        return None

    def measure(self, name: str, continuation: str, phi: float, damping: str) -> _Held:
        """One algorithm's inverse and its error, made anew only where something it depends on changed."""
        estimate = self.processes[name].estimate
        assert estimate is not None and self.reference is not None
        held = self.held.get((name, continuation))
        by: Any = self.lam if damping == "common" else phi
        if held is None or held.estimate is not estimate or not _same(held.damping, by):
            inverse = self._inverse(estimate, continuation, **{"lam": by} if damping == "common" else {"phi": by})
        elif held.reference is self.reference:
            return held
        else:
            inverse = held.inverse
        error = inverse_error(inverse, self.reference)
        held = _Held(estimate, by, inverse, self.reference, error)
        self.held[name, continuation] = held
        return held

    def _inverse(
        self, estimate: Estimate, continuation: str, *, phi: float | None = None, lam: Array | None = None
    ) -> DampedInverse | DenseInverse:
        if isinstance(estimate.lowrank, Exact) and continuation != ESCAPED:  # all modes: nothing to continue
            return estimate.lowrank.inverse(phi=phi, lam=lam)[0]
        return damped_inverse(
            estimate.lowrank,
            phi=phi,
            lam=lam,
            continuation=continuation,
            trace=estimate.trace,
            level=estimate.level,
        )


class ErrorStudy:
    """Measures algorithms against the exact inverse on one layer's stream.

    `push` takes the steps in order and returns the rows of each. All arrays of a stream are of one backend,
    device and dtype, and all work is done there.

    Args:
        algorithms: names as in `kfacerr.algorithms`, or any names mapped to pairs of processes (for A, for G).
        settings: of the processes.
        windows: where errors are measured; they must not overlap.
        phi: damping ratio, where a step brings none.
        continuations: spectrum continuations, each measured on the same processes.
        damping: "own" or "common".

    Raises:
        InputError: unknown names or values out of range.
    """

    def __init__(
        self,
        algorithms: Sequence[str] | Mapping[str, tuple[Process, Process]],
        settings: Settings,
        windows: Sequence[Window],
        *,
        phi: float = 0.1,
        continuations: Sequence[str] = ("min",),
        damping: str = "own",
    ) -> None:
        check_phi(phi)
        _check_choice("damping", damping, DAMPINGS)
        for kind in continuations:
            _check_choice("continuation", kind, (*CONTINUATIONS, ESCAPED))
        self.windows = sorted(windows)
        for one, other in zip(self.windows, self.windows[1:], strict=False):
            if other.start in one:
                raise InputError(f"windows overlap: {tuple(one)} and {tuple(other)}")
        if isinstance(algorithms, Mapping):
            pairs = dict(algorithms)
        else:
            pairs = {n: (make_process(n, settings, "A"), make_process(n, settings, "G")) for n in algorithms}
        self.names = tuple(pairs)
        # A rank given in a name stands; every other follows `tune`.
        self._tunable = [p for n, pair in pairs.items() if "rank=" not in n for p in pair if hasattr(p, "rank")]
        self.sides = {
            "A": _Side(settings.rho, {n: pair[0] for n, pair in pairs.items()}),
            "G": _Side(settings.rho, {n: pair[1] for n, pair in pairs.items()}),
        }
        self.phi = phi
        self.continuations = tuple(continuations)
        self.damping = damping
        self.last_k = -1
        self._referred_phi: float | None = None

    @property
    def processes(self) -> Iterator[Process]:
        """All processes of both factors."""
        for side in self.sides.values():
            yield from side.processes.values()

    def tune(self, *, rank: int, oversampling: int) -> None:
        """Sets r and r_o from now on, for schedules such as the paper's r(k), r_o(k)."""
        for process in self._tunable:
            process.rank = rank
        for process in self.processes:
            if isinstance(process, Rsvd | BrandRsvd):
                process.sketch.oversampling = oversampling

    def window(self, k: int) -> Window | None:
        """The window iteration k is measured in, if any. Such iterations are pushed even without an update."""
        return next((w for w in self.windows if k in w), None)

    def push(self, step: Step) -> list[Row]:
        """Takes the next step; returns its rows, none outside the windows.

        Raises:
            InputError: NaN or Inf, a shape that changes, a zero factor, or a k that does not increase; names k.
        """
        try:
            return self._push(step)
        except InputError as error:
            raise InputError(f"iteration {step.k}: {error}") from None
        except np.linalg.LinAlgError as error:  # overflow inside a decomposition
            raise InputError(f"iteration {step.k}: {error}") from None

    def _push(self, step: Step) -> list[Row]:
        if step.k <= self.last_k:
            raise InputError(f"it comes after iteration {self.last_k}, but k must increase")
        columns = {"A": step.A, "G": step.G}
        for name, X in columns.items():
            self._check(name, X)
        namespace(step.A, step.G)
        if step.A.shape[1] != step.G.shape[1]:
            raise InputError(f"A has {step.A.shape[1]} columns and G has {step.G.shape[1]}")
        window = self.window(step.k)
        starts = window is not None and self.last_k < window.start  # the first step seen inside it
        if window is not None and starts and step.k > window.start and not step.update:
            raise InputError(
                f"the window from {window.start} begins only here, at a step that does not update the EA factors"
            )
        self.last_k = step.k
        if starts:
            for process in self.processes:
                process.restart(step.k)
        for name, side in self.sides.items():
            if step.update:
                active = [n for n, p in side.processes.items() if window is not None or not p.forgets]
                side.run(step.k, columns[name], active)
            elif starts:
                side.start(step.k)
        return [] if window is None else self._measure(step, window, starts)

    def _check(self, name: str, X: Array) -> None:
        M = self.sides[name].factor.M
        check_columns(X, None if M is None else M.shape[0], name)
        xp = namespace(X) if M is None else namespace(M, X)
        if not bool(xp.all(xp.isfinite(X))):
            raise InputError(f"{name}: NaN or Inf in the columns")

    def _measure(self, step: Step, window: Window, starts: bool) -> list[Row]:
        phi = self.phi if step.phi is None else step.phi
        A, G = self.sides["A"], self.sides["G"]
        if step.update or starts or phi != self._referred_phi or A.reference is None or G.reference is None:
            A.refer(phi)
            G.refer(phi)
            self._referred_phi = phi
        assert A.reference is not None and G.reference is not None
        exact = precondition_linear(step.G, step.A, G.reference, A.reference)
        rows = []
        for name in self.names:
            known: dict[tuple[int, int], tuple[float, float]] = {}  # an exact process has one inverse for all
            for kind in self.continuations:
                a = A.measure(name, kind, phi, self.damping)
                g = G.measure(name, kind, phi, self.damping)
                made_of = id(a.inverse), id(g.inverse)
                if made_of not in known:
                    S, S_ref = step_coordinates(*precondition_linear(step.G, step.A, g.inverse, a.inverse), *exact)
                    known[made_of] = norm_error(S, S_ref), angle_error(S, S_ref)
                for metric, value in zip(METRICS, (a.error, g.error, *known[made_of]), strict=True):
                    if not math.isfinite(value):
                        raise InputError(f"{name}: {metric} is {value}: beyond the range of {step.A.dtype}")
                    rows.append(Row(name, step.k, metric, value, window.epoch, kind))
        return rows

    def spectrum(self, side: str) -> np.ndarray:
        """Eigenvalues (d,) of the EA factor as it stands, descending."""
        M = self.sides[side].factor.M
        return to_numpy(namespace(M).linalg.eigvalsh(M))[::-1]

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed study needs, as nested dicts of arrays and plain values."""
        return {
            "last_k": self.last_k,
            "sides": {
                name: {
                    "factor": side.factor.state_dict(),
                    "processes": {n: p.state_dict() for n, p in side.processes.items()},
                }
                for name, side in self.sides.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a study made with the same arguments."""
        self.last_k = state["last_k"]
        for name, side in self.sides.items():
            side.factor.load_state_dict(state["sides"][name]["factor"])
            for n, process in side.processes.items():
                process.load_state_dict(state["sides"][name]["processes"][n])
            side.reference = None
            side.held.clear()


def _same(one: Any, other: Any) -> bool:
    """Whether two dampings are the same: numbers by value, arrays by identity (no device is asked)."""
    return one is other or (isinstance(one, float) and isinstance(other, float) and one == other)


def _check_choice(what: str, value: str, among: Iterable[str]) -> None:
    if value not in among:
        raise InputError(f"{what} {value!r} is not one of {', '.join(among)}")
