"""Reports: what was measured on a user's own layers, to read, to plot and to keep.

`Measurement` takes the steps of one layer, live or recorded, and `Report` gathers the layers. A certified bound
stands beside an error where theory allows one (`kfacerr.certificate`): it needs no exact inverse.
"""

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .algorithms import SEVEN, Algorithm, not_used
from .array import to_numpy
from .checks import choice, instance, names
from .damping import Damping
from .exceptions import InputError
from .factor import KFactor
from .files import write_atomically, write_text
from .metrics import METRICS, ROUNDING
from .page import page, themed
from .process import Settings
from .replay import replay
from .rsvd import rsvd
from .stream import Step, Window, Windows
from .study import CERTIFIED, ErrorStudy, Row, metrics_of, table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .recording import Recording

__all__ = ["FactorFacts", "LayerFacts", "Measurement", "Report", "report_recording"]

EXACT_UP_TO = 4096
"""Factors of up to so many rows get all their eigenvalues; of larger ones the leading r + 10 by an RSVD."""

MEANING = {
    "inverse_A": "(1) relative error of the inverse of A",
    "inverse_G": "(2) relative error of the inverse of G",
    "step_norm": "(3) relative error of the step",
    "step_angle": "(4) 1 - cos of the step's angle error",
}

CERTAIN = "certified: what an algorithm knows of (1) and (2) right after an update, without the exact inverse"

READING = "Each cell is the mean over the measured iterations, smallest to largest in brackets; 0 is rounding."


@dataclass(frozen=True)
class FactorFacts:
    """One K-factor M at the end of the last window.

    Attributes:
        d: its dimension.
        trace: tr M.
        stable_rank: tr M / lambda_max.
        above: eigenvalues above the damping; of a large factor, of those that were computed.
        beyond: the share of tr M beyond the r leading eigenvalues; of a large factor an upper bound.
    """

    d: int
    trace: float
    stable_rank: float
    above: int
    beyond: float

    @classmethod
    def of(cls, factor: KFactor, rank: int, ratio: float) -> "FactorFacts":
        """Of the factor as it stands, with a damping of `ratio` times its largest eigenvalue."""
        M, unit = factor.average.M, factor.squared_unit
        d, trace = M.shape[0], float(factor.average.trace)
        if d <= EXACT_UP_TO:
            w = np.linalg.eigvalsh(to_numpy(M).astype(np.float64))[::-1]
        else:
            w = to_numpy(rsvd(M, rank, oversampling=10, n_pwr_it=4, rng=np.random.default_rng(0)).D)
        top = float(w[0])
        kept = float(np.maximum(w[:rank], 0).sum())
        return cls(d, trace / unit, trace / top, int((w > ratio * top).sum()), max(0.0, 1 - kept / trace))


@dataclass(frozen=True)
class LayerFacts:
    """What a layer's errors were measured with, and what its factors are like.

    Attributes:
        name: of the layer.
        n: columns of an update.
        settings: of the processes.
        damping: as `ErrorStudy` takes it, in words.
        every: iterations between updates of the factors.
        windows: where errors were measured.
        factors: by side.
        seconds: that the measurement took.
        notes: what a reader should know, a sentence each.
    """

    name: str
    n: int
    settings: Settings
    damping: str
    every: int
    windows: tuple[Window, ...]
    factors: Mapping[str, FactorFacts]
    seconds: float
    notes: tuple[str, ...] = ()


class Measurement:
    """Measures one layer's stream and remembers what a report says of it.

    Args:
        name: of the layer.
        settings: of the processes.
        windows: where errors are measured.
        algorithms: names; the seven of §4.2 by default.
        phi: damping ratio, where a step brings none.
        damping: as `ErrorStudy` takes it.
        every: iterations between updates of the factors, for the plots' blocks.

    Attributes:
        rows: what has been measured.

    Raises:
        InputError: unknown names or values out of range.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        windows: Windows,
        *,
        algorithms: Sequence[str | Algorithm] = SEVEN,
        phi: float = 0.1,
        damping: str | Damping = "own",
        every: int = 10,
    ) -> None:
        self.name, self.settings, self.phi, self.every = name, settings, phi, every
        self.study = ErrorStudy(algorithms, settings, windows, phi=phi, damping=damping, certify=True)
        self.rows: list[Row] = []
        self.seconds = 0.0
        self._n = 0
        self._phi_used = phi

    def push(self, step: Step) -> list[Row]:
        """Takes the next step, and returns its rows; see `ErrorStudy.push`."""
        started = time.perf_counter()
        rows = self.study.push(step)
        self.rows += rows
        self._n = max(self._n, step.A.shape[1])
        self._phi_used = self.phi if step.phi is None else step.phi
        self.seconds += time.perf_counter() - started
        return rows

    def facts(self, windows: Sequence[Window] | None = None, remark: str = "") -> LayerFacts:
        """What there is to say of the layer now.

        Args:
            windows: those to speak of; all if None.
            remark: a note to add; none if empty.

        Returns:
            The facts.

        Raises:
            InputError: no columns came in yet.
        """
        factors = self.study.factors
        if any(factor.average.M is None for factor in factors.values()):
            raise InputError(f"layer {self.name!r}: no columns came in, there is nothing to report")
        rank = self.settings.rank
        ratios = self.study.ratios(self._phi_used)
        found = {side: FactorFacts.of(factor, rank, ratios[side]) for side, factor in factors.items()}
        seen = {row.k for row in self.rows}
        reached: list[Window] = []
        missed: list[Window] = []
        for window in self.study.windows if windows is None else windows:
            (reached if any(k in window for k in seen) else missed).append(window)
        notes = (*self._notes(found, missed), *([remark] if remark else []))
        settings = (self.settings, self.study.said(self._phi_used), self.every, tuple(reached))
        return LayerFacts(self.name, self._n, *settings, found, self.seconds, notes)

    def _notes(self, factors: Mapping[str, FactorFacts], missed: Sequence[Window]) -> Iterable[str]:
        """Where an algorithm saves nothing, and windows that were not reached."""
        yield from not_used(self.study.names, self.settings, {s: f.d for s, f in factors.items()}, self._n)
        if not self.rows and not missed:
            yield (
                f"nothing was measured: the first window starts at iteration {self.study.windows[0].start}; "
                "give watch(windows=[(first iteration, length)]) or a smaller every"
            )
        if missed:
            others = f", nor were {len(missed) - 1} others" if len(missed) > 1 else ""
            yield f"the window of {missed[0].length} iterations from {missed[0].start} was not reached{others}"


class Report:
    """The errors of cheap inverses on one or more layers. Prints itself, also in a notebook.

    Args:
        measurements: of the layers, finished or under way.
        title: one line.
        seconds: what is known of the time besides, such as {"training": 12.3}.
        windows: those to speak of; all of each measurement if None.
        remarks: by layer, a note to add.

    Attributes:
        table: tidy, with columns algorithm, k, metric, value, epoch, window, layer.
        layers: a `LayerFacts` each.
    """

    def __init__(
        self,
        measurements: Iterable[Measurement],
        *,
        title: str = "",
        seconds: Mapping[str, float] | None = None,
        windows: Sequence[Window] | None = None,
        remarks: Mapping[str, str] | None = None,
    ) -> None:
        import pandas as pd

        measured = list(measurements)
        self.layers = [m.facts(windows, (remarks or {}).get(m.name, "")) for m in measured]
        frames = [table(m.rows, m.study.windows).assign(layer=m.name) for m in measured]
        self.table: pd.DataFrame = pd.concat(frames, ignore_index=True) if frames else table([])
        self.title = title or "How wrong are the inverses of " + ", ".join(layer.name for layer in self.layers)
        self.seconds = dict(seconds or {})

    # --------------------------------------------------------------------------------------------- tables

    def errors(self, layer: str | None = None) -> "pd.DataFrame":
        """A row an algorithm: each metric's mean (smallest to largest), the largest certified bound on (1), (2).

        Args:
            layer: its name; the first by default.

        Returns:
            By algorithm; cells are text.

        Raises:
            InputError: the report has no such layer.
        """
        part = self.table[self.table.layer == self._find(layer).name]
        order = list(dict.fromkeys(part.algorithm))
        grouped = part.groupby(["algorithm", "metric"]).value
        mean, low, high = (getattr(grouped, what)().unstack() for what in ("mean", "min", "max"))
        columns: dict[str, Any] = {}
        for metric in metrics_of(part):
            columns[metric] = [_spread(mean, low, high, name, metric) for name in order]
        for side, metric in CERTIFIED.items():
            if metric in mean:
                columns[f"certified {side}"] = [_number(high[metric].get(name, float("nan"))) for name in order]
        import pandas as pd

        return pd.DataFrame(columns, index=pd.Index(order, name="algorithm"))

    def facts(self) -> "pd.DataFrame":
        """A row a factor: dimension, stable rank, eigenvalues above the damping, share of the trace beyond r."""
        import pandas as pd

        rows = [
            {
                "layer": layer.name,
                "factor": side,
                "d": f.d,
                "n": layer.n,
                "rank r": layer.settings.rank,
                "stable rank": f"{f.stable_rank:.1f}",
                "above damping": f.above,
                "trace beyond r": f"{f.beyond:.1%}",
            }
            for layer in self.layers
            for side, f in layer.factors.items()
        ]
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """The report as text."""
        parts = [self.title, "", self.facts().to_markdown(index=False), ""]
        for layer in self.layers:
            parts += [_about(layer), "", self.errors(layer.name).to_markdown(), ""]
            parts += [*(f"- {note}" for note in layer.notes), ""] if layer.notes else []
        parts += [*(f"{metric}: {meaning}" for metric, meaning in MEANING.items()), CERTAIN, self._cost()]
        return "\n".join(parts)

    def _cost(self) -> str:
        spent = [f"{name} {value:.1f} s" for name, value in self.seconds.items()]
        measuring = f"measuring {sum(layer.seconds for layer in self.layers):.1f} s"
        return "time: " + (f"{', '.join(spent)}, of that {measuring}" if spent else measuring)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        names = ", ".join(repr(layer.name) for layer in self.layers)
        return f"<kfacerr Report of {names}: {len(self.table)} rows; print it, or see .plot() and .to_html(path)>"

    # ------------------------------------------------------------------------------------------ to look at

    def plot(self, layer: str | None = None, *, dark: bool = False) -> "Figure":
        """The four metrics of a layer over its windows, a matplotlib Figure.

        Args:
            layer: its name; the first by default.
            dark: for a dark background.

        Returns:
            The figure.

        Raises:
            InputError: the report has no such layer, or nothing was measured on it.
        """
        from .plot import error_figure

        facts = self._find(layer)
        part = self.table[(self.table.layer == facts.name) & self.table.metric.isin(METRICS)]
        if part.empty:
            raise InputError(f"layer {facts.name!r}: nothing was measured, there is nothing to plot")
        return error_figure(part, metrics_of(part), block=facts.every, title=_about(facts), dark=dark)

    def _find(self, layer: str | None) -> LayerFacts:
        if not self.layers:
            raise InputError("the report has no layers")
        found = [facts for facts in self.layers if layer in (None, facts.name)]
        if not found:
            names = ", ".join(facts.name for facts in self.layers)
            raise InputError(f"the report has no layer {layer!r}; there are {names}")
        return found[0]

    def to_csv(self, path: str | Path) -> None:
        """Writes the table."""
        write_atomically(Path(path), lambda p: self.table.to_csv(p, index=False, float_format="%.12g"))

    def to_html(self, path: str | Path) -> None:
        """Writes the report as one file that needs no network, light and dark."""
        write_text(Path(path), self._page(whole=True))

    def _repr_html_(self) -> str:
        return self._page(whole=False)

    def _page(self, *, whole: bool) -> str:
        layers = [
            {
                "name": f"Layer {layer.name}",
                "about": _about(layer),
                "notes": layer.notes,
                "errors": self.errors(layer.name).reset_index().to_html(index=False, border=0, escape=True),
                "figure": themed(functools.partial(self.plot, layer.name)) if layer.windows else None,
                "alt": f"The four errors of layer {layer.name} over the iterations of each window",
            }
            for layer in self.layers
        ]
        return page(
            whole=whole,
            title=self.title,
            facts=self.facts().to_html(index=False, border=0),
            layers=layers,
            meaning=MEANING,
            reading=f"{READING} {CERTAIN.capitalize()}.",
            cost=self._cost(),
        )


def report_recording(
    recording: "Recording",
    layers: Sequence[str] | None = None,
    *,
    rank: int | None = None,
    algorithms: Sequence[str | Algorithm] = SEVEN,
    phi: float | None = None,
    damping: str | Damping = "own",
    dtype: str = "float64",
    **settings: Any,
) -> Report:
    """The report of a recording's layers.

    Args:
        recording: an open one.
        layers: their names; all that have windows by default.
        rank: r; by default an eighth of the smaller dimension, at least 4 and at most 220.
        algorithms: names; the seven by default.
        phi: damping ratio in place of the recording's, or of 0.1.
        damping: as `ErrorStudy` takes it.
        dtype: to compute in.
        **settings: others of `Settings`.

    Returns:
        The report.

    Raises:
        InputError: no such layer, no windows, values out of range, or bad columns; names file, layer, iteration.
    """
    from .recording import Recording

    instance(recording, "the recording", Recording)
    choice(dtype, "dtype", ("float64", "float32"))
    asked = [n for n in recording.layers if recording.layer(n).windows] if layers is None else layers
    wanted = names(asked, "layers")
    if not wanted:
        raise InputError(f"{recording.path}: no layer with windows to measure in")
    measurements = []
    for layer in [recording.layer(name) for name in dict.fromkeys(wanted)]:
        r = default_rank(layer.d_A, layer.d_G) if rank is None else rank
        measurement = Measurement(
            layer.name,
            Settings(rank=r, **settings),
            layer.windows,
            algorithms=algorithms,
            phi=0.1 if phi is None else phi,
            damping=damping,
            every=layer.update_every,
        )
        for _ in replay(layer, measurement.push, convert=lambda X: X.astype(dtype), phi=phi):
            pass
        measurements.append(measurement)
    title = f"How wrong are the inverses of {', '.join(wanted)} in {recording.path.name}"
    return Report(measurements, title=title)


def default_rank(d_A: int, d_G: int) -> int:
    """r where none is given: an eighth of the smaller dimension, at least 4 and at most the paper's 220."""
    return min(220, max(4, min(d_A, d_G) // 8))


def _about(layer: LayerFacts) -> str:
    """One line: r, n, damping, rho, T_updt, windows."""
    s = layer.settings
    shown = [f"{w.start}-{w.start + w.length - 1}" for w in layer.windows]
    windows = ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]]) or "none"
    return (
        f"layer {layer.name}: r = {s.rank}, n = {layer.n}, {layer.damping}, rho = {s.rho:g}, "
        f"new columns every {layer.every} iterations, measured in iterations {windows}"
    )


def _spread(mean: Any, low: Any, high: Any, name: str, metric: str) -> str:
    values = (_number(frame[metric][name]) for frame in (mean, low, high))
    return "{} ({} to {})".format(*values)


def _number(value: float) -> str:
    """Two digits; 0 for what is mere rounding, nothing for NaN or where a bound says nothing."""
    if not abs(value) < float("inf"):
        return ""
    return "0" if abs(value) < ROUNDING else f"{value:.2g}"
