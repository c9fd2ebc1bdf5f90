"""From a stream of one layer to the tidy table of errors (§4.2): the shared trajectory.

All algorithms watch the same columns. At each window's start every algorithm's periods are counted anew, so that
its heaviest update falls on the window's first step. Where a stream lacks that one, it is the first there is,
which must then be an update: one that was due in between may be missing too, and M_k would be of an earlier time.
Before a window, processes with a memory (B-KFAC, B-KFAC-C) run on the whole stream; those whose heaviest update
depends on the EA factor alone start with the window.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .algorithms import Algorithm
from .array import failures, namespace, to_numpy
from .checks import choice, instance, names, switch, whole
from .damping import Damping, Scale
from .exceptions import InputError
from .factor import KFactor
from .inverse import DampedInverse, DenseInverse, Inverse, check_phi, precondition_linear
from .joint import JointErrors
from .metrics import METRICS, angle_error, inverse_error, norm_error, step_coordinates
from .process import Process, Settings
from .stream import Array, Step, Window, Windows, ordered

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CERTIFIED",
    "DAMPINGS",
    "ErrorStudy",
    "Row",
    "averages",
    "by_window",
    "metrics_of",
    "named_damping",
    "table",
]

DAMPINGS = ("own", "common")
"""lam = phi * lambda_max of each method's own representation, or the reference's lam for all.

Besides these a study takes the dampings of `kfacerr.damping`, such as "mean=0.1": of each method's own
representation and trace, whatever phi a step brings.
"""

CERTIFIED = {"A": "certified_A", "G": "certified_G"}
"""Names of the certified bounds on metrics (1) and (2)."""


class Row(NamedTuple):
    """One line of the error table."""

    algorithm: str
    k: int
    metric: str
    value: float
    epoch: int


def table(rows: Iterable[Row], windows: Sequence[Window] = ()) -> "pd.DataFrame":
    """The rows as a tidy data frame; with a column `window`, its first iteration, where windows are given."""
    import pandas as pd

    listed = names(rows, "rows", tuple)
    if any(len(row) != len(Row._fields) for row in listed):
        raise InputError(f"rows of ({', '.join(Row._fields)}) are needed")
    frame = pd.DataFrame(listed, columns=list(Row._fields))
    if not windows:
        return frame
    starts = np.array([window.start for window in ordered(windows)])
    return frame.assign(window=starts[np.searchsorted(starts, frame.k, side="right") - 1])


def by_window(frame: "pd.DataFrame") -> "list[tuple[str, pd.DataFrame]]":
    """The rows of each window and what to call it, in the windows' order.

    Windows are told apart by the columns epoch and `window`; a table without the latter has one an epoch. Where
    all epochs are 0, which is what stands for none, a window is called by its first iteration.
    """
    if "window" not in frame:
        return [(f"epoch {epoch}", part) for epoch, part in frame.groupby("epoch")]
    if not frame.epoch.any():
        return [(f"from iteration {start}", part) for start, part in frame.groupby("window")]
    several = frame.window.nunique() > frame.epoch.nunique()
    return [
        (f"epoch {epoch}, from {start}" if several else f"epoch {epoch}", part)
        for (epoch, start), part in frame.groupby(["epoch", "window"])
    ]


def metrics_of(frame: "pd.DataFrame") -> list[str]:
    """Those of the four metrics that a table has, in their order: the grid of products has (3) and (4) alone."""
    return [metric for metric in METRICS if (frame.metric == metric).any()]


def averages(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The mean of every metric that is there over each window, algorithms in their order (Table 1's columns).

    `window`, its first iteration, is a column if it is one of the table's.
    """
    order = list(dict.fromkeys(frame.algorithm))
    window = [name for name in ("epoch", "window") if name in frame]
    mean = frame.groupby([*window, "algorithm", "metric"]).value.mean().unstack()
    return mean.reindex(order, level="algorithm")[metrics_of(frame)].reset_index()


class _Measured(NamedTuple):
    """One algorithm of the table: the process that it shares with others, and its inverse's continuation."""

    name: str
    process: str
    continuation: str


class ErrorStudy:
    """Measures algorithms against the exact inverse on one layer's stream.

    `push` takes the steps in order and returns the rows of each. All arrays of a stream are of one backend,
    device and dtype, and all work is done there.

    Args:
        algorithms: names (`kfacerr.algorithms`); or any names mapped to pairs of processes (for A, for G), where a
            name may end in " continuation=..." and a pair may stand under several names.
        settings: of the processes, and their continuation where a name has none.
        windows: where errors are measured; they must not overlap.
        phi: damping ratio, where a step brings none.
        damping: "own", "common", or one such as "mean=0.1", see `DAMPINGS`; on the grid of products
            ("product=1e-3") there are metrics (3) and (4) alone.
        certify: also give the certified bounds on metrics (1) and (2), where there are any.

    Attributes:
        factors: the `KFactor` of each side.

    Raises:
        InputError: unknown names or values out of range.
    """

    def __init__(
        self,
        algorithms: Sequence[str | Algorithm] | Mapping[str, tuple[Process, Process]],
        settings: Settings,
        windows: Windows,
        *,
        phi: float = 0.1,
        damping: str | Damping = "own",
        certify: bool = False,
    ) -> None:
        check_phi(phi)
        instance(settings, "settings", Settings)
        self.windows = ordered(windows)
        self.measured, pairs = _followed(algorithms, settings)
        if not self.measured:
            raise InputError("no algorithm is named")
        self.factors = {
            side: KFactor(side, {name: pair[i] for name, pair in pairs.items()}, settings.rho, dense=True)
            for i, side in enumerate("AG")
        }
        self.phi = phi
        self._damping = named_damping(damping)
        self.damping = str(self._damping or damping)
        self._joint = (
            None if self._damping is None or self._damping.separable else JointErrors(self._damping, self.factors)
        )
        self.certify = switch(certify, "certify")
        self.last_k = -1
        self._errors: dict[tuple[str, str], tuple[Inverse, DenseInverse, float]] = {}

    def __repr__(self) -> str:
        return f"<kfacerr ErrorStudy of {', '.join(self.names)}, up to iteration {self.last_k}>"

    @property
    def names(self) -> tuple[str, ...]:
        """What the table's algorithms are called."""
        return tuple(measured.name for measured in self.measured)

    def configure(self, **settings: Any) -> None:
        """Settings from now on, for schedules such as the paper's r(k), r_o(k); those in a name stand."""
        for factor in self.factors.values():
            factor.configure(**settings)

    def window(self, k: int) -> Window | None:
        """The window iteration k is measured in, if any. Such iterations are pushed even without an update."""
        return next((w for w in self.windows if k in w), None)

    def push(self, step: Step) -> list[Row]:
        """Takes the next step.

        Args:
            step: A (d_A, n) and G (d_G, n).

        Returns:
            Its rows, none outside the windows.

        Raises:
            InputError: NaN or Inf, a shape that changes, a zero factor, or a k that does not increase; names k.
        """
        instance(step, "the step", Step)
        whole(step.k, "k")
        switch(step.update, f"iteration {step.k}: update")
        try:
            return self._push(step)
        except failures() as error:  # overflow inside a decomposition
            raise InputError(f"iteration {step.k}: {error}") from None

    def _push(self, step: Step) -> list[Row]:
        window = self.window(step.k)
        starts = window is not None and self.last_k < window.start  # the first step seen inside it
        self._check(step, window, starts)
        columns = {side: f.admit(X) for (side, f), X in zip(self.factors.items(), (step.A, step.G), strict=True)}
        namespace(step.A, step.G)
        if step.A.shape[1] != step.G.shape[1]:
            raise InputError(f"A has {step.A.shape[1]} columns and G has {step.G.shape[1]}")
        self.last_k = step.k
        for side, factor in self.factors.items():
            if starts:
                for process in factor.processes.values():
                    process.restart(step.k)
            if step.update:
                active = [n for n, p in factor.processes.items() if window is not None or not p.memoryless]
                factor.push(step.k, step.A if side == "A" else step.G, active=active, finite=True)
            elif starts:
                self._refresh(factor, step.k)
        return [] if window is None else self._measure(step, columns, window)

    def _check(self, step: Step, window: Window | None, starts: bool) -> None:
        """Refuses a step out of order."""
        if step.k <= self.last_k:
            raise InputError(f"it comes after iteration {self.last_k}, but k must increase")
        if window is not None and starts and step.k > window.start and not step.update:
            raise InputError(
                f"the window from {window.start} begins only here, at a step that does not update the EA factors"
            )

    def _refresh(self, factor: KFactor, k: int) -> None:
        """A window starts at a step that brings no columns: processes that forget begin from M_k."""
        if factor.average.M is None:
            raise InputError("the window starts before the first update of the EA factors")
        factor.refresh(k)

    # -------------------------------------------------------------------------------------------- metrics

    def _measure(self, step: Step, columns: Mapping[str, Array], window: Window) -> list[Row]:
        if self._joint is not None:
            return self._measure_jointly(self._joint, step, columns, window)
        phi = self.phi if step.phi is None else step.phi
        phis = self.ratios(phi)
        references = {side: factor.reference(phis[side]) for side, factor in self.factors.items()}
        exact = _applied(columns, {side: inverse for side, (inverse, _) in references.items()})
        rows: list[Row] = []
        for measured in self.measured:
            own = phis if self._damping is None else self._ratios(self._own_scales(measured))
            inverses = {side: self._inverse(measured, side, own[side], references[side][1]) for side in "AG"}
            errors = {s: self._error(measured, s, inverses[s], references[s][0]) for s in "AG"}
            S, S_ref = step_coordinates(*_applied(columns, inverses), *exact)
            values = (errors["A"], errors["G"], norm_error(S, S_ref), angle_error(S, S_ref))
            rows += _rows(measured.name, step, dict(zip(METRICS, values, strict=True)), window)
            if self.certify and step.update:
                rows += self._certified(measured, step.k, inverses, window.epoch)
        return rows

    def _measure_jointly(
        self, joint: JointErrors, step: Step, columns: Mapping[str, Array], window: Window
    ) -> list[Row]:
        joint.take(columns, self._exact_scales())
        rows: list[Row] = []
        for measured in self.measured:
            errors = joint.of(measured.process, measured.continuation, self._own_scales(measured))
            rows += _rows(measured.name, step, errors, window)
        return rows

    def _inverse(self, measured: _Measured, side: str, phi: float, lam: Array) -> Inverse:
        """The inverse of one algorithm; the reference's lam damps it where the damping is common."""
        damping = {"lam": lam} if self.damping == "common" else {"phi": phi}
        inverse = self.factors[side].inverse(measured.process, continuation=measured.continuation, **damping)
        if inverse is None:
            raise InputError(f"{side}: {measured.name} {_EMPTY}")
        return inverse

    def ratios(self, phi: float) -> dict[str, float]:
        """The damping over the largest eigenvalue of each factor as it stands; phi where it is the paper's."""
        return dict.fromkeys("AG", phi) if self._damping is None else self._ratios(self._exact_scales())

    def said(self, phi: float) -> str:
        """The damping in words: "phi = 0.1", or the name of another."""
        if self._damping is not None:
            return f"damping {self.damping}"
        return f"phi = {phi:g}" + (" in common" if self.damping == "common" else "")

    def _ratios(self, scales: Mapping[str, Scale]) -> dict[str, float]:
        assert self._damping is not None
        return dict(zip("AG", self._damping.ratios(scales["A"], scales["G"]), strict=True))

    def _exact_scales(self) -> dict[str, Scale]:
        return {side: factor.exact_scale() for side, factor in self.factors.items()}

    def _own_scales(self, measured: _Measured) -> dict[str, Scale]:
        """Of an algorithm's estimates, and of M's trace as it was then."""
        scales = {}
        for side, factor in self.factors.items():
            scale = factor.scale(measured.process)
            if scale is None:
                raise InputError(f"{side}: {measured.name} {_EMPTY}")
            scales[side] = scale
        return scales

    def _error(self, measured: _Measured, side: str, inverse: Inverse, reference: DenseInverse) -> float:
        """Metric (1) or (2), made anew only where something it depends on changed."""
        held = self._errors.get((measured.name, side))
        if held is None or held[0] is not inverse or held[1] is not reference:
            held = self._errors[measured.name, side] = (inverse, reference, inverse_error(inverse, reference))
        return held[2]

    def _certified(
        self, measured: _Measured, k: int, inverses: Mapping[str, Inverse], epoch: int
    ) -> Iterator[Row]:
        """The certified bounds on metrics (1) and (2), where the algorithm has one now.

        At one damping lam~ they are b, from the certificate. With its own, lam~ = phi D_1, the reference's lam
        differs: |lam - lam~| <= phi ||E||_2 (Weyl). With R(x) = (M + x I)^-1, R(lam~) - R(lam) =
        (lam - lam~) R(lam~) R(lam) and ||R(lam~)||_2 <= 1/lam~ give ||R(lam~) - R(lam)||_F <= e ||R(lam)||_F,
        e = ||E||_2/D_1. So the whole is at most b (1 + e) + e. Dampings by the trace, or none of M, do not differ.
        """
        for side, inverse in inverses.items():
            known = self.factors[side].processes[measured.process].certificate
            if known is None or not isinstance(inverse, DampedInverse):  # there is nothing to certify of M itself
                continue
            low = inverse.lowrank
            bound = float(known.relative_inverse_bound(low, inverse.lam, inverse.tau))
            by_top = self.damping == "own" or (self._damping is not None and self._damping.kind == "phi")
            e = float(known.spectral / low.lambda_max) if by_top else 0.0
            yield Row(measured.name, k, CERTIFIED[side], bound * (1 + e) + e, epoch)

    def spectrum(self, side: str) -> np.ndarray:
        """Eigenvalues (d,) of the EA factor as it stands, descending."""
        factor = self.factors[choice(side, "side", self.factors)]
        M = factor.average.M
        if M is None:
            raise InputError(f"{side}: no columns came in yet")
        return to_numpy(namespace(M).linalg.eigvalsh(M))[::-1] / factor.squared_unit

    # ---------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed study needs, as nested dicts of arrays and plain values."""
        factors = {side: factor.state_dict() for side, factor in self.factors.items()}
        return {"last_k": self.last_k, "factors": factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a study made with the same arguments."""
        self.last_k = state["last_k"]
        for side, factor in self.factors.items():
            factor.load_state_dict(state["factors"][side])
        self._errors.clear()


_EMPTY = "holds no estimate, or one that is zero"


def named_damping(damping: str | Damping) -> Damping | None:
    """The damping of a name, None for `DAMPINGS`.

    Args:
        damping: what `ErrorStudy` takes.

    Returns:
        The damping.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(damping, str) and damping in DAMPINGS:
        return None
    try:
        return Damping.of(damping)
    except InputError as error:
        raise InputError(f"{error}, nor {' or '.join(DAMPINGS)}") from None


def _rows(name: str, step: Step, errors: Mapping[str, float], window: Window) -> Iterator[Row]:
    for metric, value in errors.items():
        if not math.isfinite(value):
            raise InputError(f"{name}: {metric} is {value}: beyond the range of {step.A.dtype}")
        yield Row(name, step.k, metric, value, window.epoch)


def _applied(columns: Mapping[str, Array], inverses: Mapping[str, Inverse]) -> tuple[Array, Array]:
    """Algorithm 8's factors P, Q of S = P Q^T = Gamma^-1 G A^T A^-1 (d_G, d_A)."""
    return precondition_linear(columns["G"], columns["A"], inverses["G"], inverses["A"])


def _followed(
    algorithms: Sequence[str | Algorithm] | Mapping[str, tuple[Process, Process]], settings: Settings
) -> tuple[list[_Measured], dict[str, tuple[Process, Process]]]:
    """What is measured, and the pairs of processes behind it by name."""
    measured: list[_Measured] = []
    pairs: dict[str, tuple[Process, Process]] = {}
    if isinstance(algorithms, Mapping):
        for name, pair in algorithms.items():
            if len(names(pair, f"{name!r}: the processes for A and G", Process)) != 2:
                raise InputError(f"{name!r}: a process for A and one for G are needed, got {len(pair)}")
            process, _, continuation = name.partition(" continuation=")
            pairs.setdefault(process, pair)
            measured.append(_Measured(name, process, continuation or settings.continuation))
        return measured, pairs
    for algorithm in dict.fromkeys(map(Algorithm.parse, names(algorithms, "algorithms", str, Algorithm))):
        process = algorithm.process_name
        if process not in pairs:
            pairs[process] = (algorithm.process(settings, "A"), algorithm.process(settings, "G"))
        continuation = algorithm.get("continuation", settings.continuation)
        measured.append(_Measured(str(algorithm), process, continuation))
    return measured, pairs
