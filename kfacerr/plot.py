"""Figures 1 and 2 in the paper's layout from a tidy error table: rows are windows, columns are metrics.

No global matplotlib state is touched. The same table gives the same file, byte for byte.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .algorithms import Algorithm
from .damping import RELATIVE
from .exceptions import InputError
from .files import write_atomically
from .metrics import ROUNDING
from .study import by_window

__all__ = [
    "METRIC_LABELS",
    "check_format",
    "damping_figure",
    "error_curves",
    "error_figure",
    "frontier_figure",
    "plain",
    "save",
    "spectrum_figure",
    "style",
]

METRIC_LABELS = {
    "inverse_A": r"(1) error in $\mathcal{A}^{-1}$",
    "inverse_G": r"(2) error in $\Gamma^{-1}$",
    "step_norm": "(3) norm error of the step",
    "step_angle": "(4) angle error of the step",
}

_STYLES = {  # Okabe-Ito colours; the line style tells them apart without colour
    "K-FAC T_inv=50": (None, "-"),  # the text's
    "R-KFAC T_inv=50": ("#0072B2", "-"),
    "R-KFAC T_inv=10": ("#56B4E9", "--"),
    "R-KFAC T_inv=300": ("#CC79A7", "-."),
    "B-KFAC": ("#D55E00", "-"),
    "B-R-KFAC": ("#009E73", "-"),
    "B-KFAC-C": ("#E69F00", "--"),
}
_SPARE = [(c, s) for s in ((0, (3, 1, 1, 1)), (0, (5, 3)), ":") for c, _ in _STYLES.values()]


def style(algorithms: Sequence[str], *, dark: bool = False) -> dict[str, tuple[str, Any]]:
    """Colour and line style of each algorithm: fixed for the paper's seven, the same in every figure.

    Others take the colour of the one that they vary ("R-KFAC T_inv=50 rank=476"), while there are line styles.
    """
    free = list(_SPARE)
    styles: dict[str, tuple[Any, Any]] = {}
    for name in algorithms:
        if name in _STYLES:
            styles[name] = _STYLES[name]
            continue
        free = free or list(_SPARE)
        varied = next((look for base, look in _STYLES.items() if _varies(name, base)), None)
        styles[name] = next((look for look in free if varied and look[0] == varied[0]), free[0])
        free.remove(styles[name])
    text = "#ffffff" if dark else "#000000"
    return {name: (colour or text, line) for name, (colour, line) in styles.items()}


def _varies(name: str, base: str) -> bool:
    """Whether a name has all settings of the base, and more; a name that is no algorithm's varies none."""
    try:
        one, other = Algorithm.parse(name), Algorithm.parse(base)
    except InputError:
        return False
    return one.base == other.base and set(other.own) < set(one.own)


def error_curves(frame: pd.DataFrame, metric: str, block: int) -> pd.DataFrame:
    """The curves of one panel: the error averaged over blocks of `block` iterations (T_updt, as in Figure 2).

    Args:
        frame: the tidy table of one window; `seed` is optional.
        metric: one of the four.
        block: iterations averaged.

    Returns:
        Columns algorithm, iteration (the block's first, counted from the window's start), mean over seeds,
        low and high (smallest and largest over seeds).
    """
    part = frame[frame.metric == metric]
    part = part.assign(iteration=(part.k - part.k.min()) // block * block)
    if "seed" not in part:
        part = part.assign(seed=0)
    blocks = part.groupby(["algorithm", "seed", "iteration"], sort=False).value.mean()
    over_seeds = blocks.groupby(["algorithm", "iteration"], sort=False)
    curves = over_seeds.agg(["mean", "min", "max"]).reset_index()
    return curves.rename(columns={"min": "low", "max": "high"})


def _limits(curves: pd.DataFrame) -> tuple[float, float] | None:
    """The log axis: all errors that are not mere rounding, with a margin; None if there are none.

    K-FAC is exact right after its EVD; an axis down to 1e-15 would leave no room for anything else.
    """
    values = curves[["low", "high"]].to_numpy()
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return None
    high = float(values.max())
    low = float(values[values > min(ROUNDING, high / 2)].min())
    margin = max(1.3, (high / low) ** 0.06)
    return low / margin, high * margin


_DARK: Any = {
    "figure.facecolor": "#111111",
    "axes.facecolor": "#111111",
    "savefig.facecolor": "#111111",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "#eeeeee"),
    "grid.color": "#555555",
}

_WIDTHS = (2.0, 0.9)
"""Of the first curve and the last: a curve that lies on another leaves its edges to be seen."""

_MARKERS = "osD^vPX"
"""Each curve has its own, on blocks of its own: where curves are equal, their markers take turns."""


def error_figure(
    frame: pd.DataFrame, metrics: Sequence[str], *, block: int = 10, title: str = "", dark: bool = False
) -> Figure:
    """Figure 1 (metrics (1), (2)) or Figure 2 (metrics (3), (4)): log scale, mean over seeds, band min to max.

    Args:
        frame: tidy table with columns algorithm, k, metric, value, epoch and optionally window and seed.
        metrics: the columns of the figure.
        block: iterations averaged, T_updt.
        title: one line above the figure.
        dark: for a dark background.

    Returns:
        Windows by metrics; `save` writes it.
    """
    windows = by_window(frame)
    styles = style(list(dict.fromkeys(frame.algorithm)), dark=dark)
    with mpl.rc_context(_DARK if dark else {}):
        figure = Figure(figsize=(2.6 * len(metrics), 1.7 * len(windows) + 0.8), layout="constrained")
        axes = figure.subplots(len(windows), len(metrics), squeeze=False, sharex=True)
        for row, (label, window) in enumerate(windows):
            for column, metric in enumerate(metrics):
                _panel(axes[row, column], error_curves(window, metric, block), styles, block)
                if row == 0:
                    axes[row, column].set_title(METRIC_LABELS.get(metric, metric), fontsize=8)
                if row == len(windows) - 1:
                    axes[row, column].set_xlabel("iteration in the window", fontsize=8)
            axes[row, 0].set_ylabel(f"{label}\nerror", fontsize=8)
        handles = [
            Line2D([], [], color=colour, linestyle=line, linewidth=1.2, label=plain(name), **_marker(i))
            for i, (name, (colour, line)) in enumerate(styles.items())
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False, handlelength=3.4
        )
        if title:
            figure.suptitle(plain(title), fontsize=8)
    return figure


def _marker(i: int) -> dict[str, Any]:
    """Of the i-th curve."""
    marker = _MARKERS[i % len(_MARKERS)]
    return {"marker": marker, "markersize": 3.6, "markeredgecolor": "white", "markeredgewidth": 0.4}


def _panel(ax: Any, curves: pd.DataFrame, styles: dict[str, tuple[str, Any]], block: int) -> None:
    """One window and metric: bands, and over them each curve a step function, thinner than those below it."""
    for i, (name, width) in enumerate(zip(styles, np.linspace(*_WIDTHS, len(styles)), strict=True)):
        curve = curves[curves.algorithm == name]
        if curve.empty:
            continue
        colour, line = styles[name]
        # The error is constant over a block, so each is drawn as a step of the block's length.
        x = np.append(curve.iteration, curve.iteration.max() + block)
        y, low, high = (np.append(curve[c], curve[c].iloc[-1]) for c in ("mean", "low", "high"))
        ax.fill_between(x, low, high, step="post", color=colour, alpha=0.12, linewidth=0, zorder=1)
        ax.step(x, y, where="post", color=colour, linestyle=line, linewidth=width, zorder=2)
        turns = min(len(styles), len(curve))
        middle, own = curve.iteration + block / 2, slice(i % turns, None, turns)
        ax.plot(middle[own], curve["mean"][own], color=colour, linestyle="none", zorder=3, **_marker(i))
    if (limits := _limits(curves)) is not None:
        ax.set_yscale("log", nonpositive="clip")
        ax.set_ylim(limits)
    ax.grid(True, which="major", linewidth=0.3, alpha=0.6)
    ax.tick_params(which="both", labelsize=7)
    ax.margins(x=0)


FLOOR = 1e-10
"""Of a spectrum's panel, over lambda_max: below is rounding."""


def spectrum_figure(
    spectra: Mapping[str, Mapping[str, np.ndarray]], phi: float | None, *, title: str = "", dark: bool = False
) -> Figure:
    """Eigenvalues over the largest one, and the damping: a panel a side, a curve a layer.

    Args:
        spectra: by layer and side, descending; empty where there is none.
        phi: damping ratio, drawn as a line; None where the factors have no one ratio.
        title: one line above the figure.
        dark: for a dark background.

    Returns:
        The figure; `save` writes it.
    """
    sides = list(dict.fromkeys(side for layer in spectra.values() for side in layer))
    colours = mpl.colormaps["viridis"](np.linspace(0.2 if dark else 0.0, 1.0 if dark else 0.8, len(spectra)))
    with mpl.rc_context(_DARK if dark else {}):
        figure = Figure(figsize=(4.5 * len(sides), 3.2), layout="constrained")
        for ax, side in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
            for colour, (layer, held) in zip(colours, spectra.items(), strict=True):
                w = held.get(side, np.empty(0))
                if w.size and w[0] > 0:
                    level = np.where(w > FLOOR * w[0], w / w[0], np.nan)
                    ax.plot(
                        np.arange(1, len(w) + 1),
                        level,
                        color=colour,
                        linewidth=1.2,
                        label=layer,
                        marker=".",
                        markersize=2,
                    )
            if phi is not None:
                ax.axhline(phi, color="#D55E00", linewidth=0.8, linestyle="--", label=f"damping, phi = {phi:g}")
            ax.set(
                xscale="log",
                yscale="log",
                xlabel="i",
                ylabel=r"$\lambda_i / \lambda_1$",
                title=f"side {side}".strip(),
            )
            ax.grid(True, which="major", linewidth=0.3, alpha=0.6)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            ax.minorticks_off()
        named = max(reversed(figure.axes), key=lambda ax: len(ax.get_legend_handles_labels()[1]))
        if len(spectra) <= 12 and named.get_legend_handles_labels()[1]:
            named.legend(fontsize=7, frameon=False)
        if title:
            figure.suptitle(title, fontsize=9)
    return figure


def damping_figure(frame: pd.DataFrame, *, title: str = "", dark: bool = False) -> Figure:
    """A damping map: a row a damping, a column a metric, a curve a rank, over the damping's share.

    Args:
        frame: columns damping, share, rank, metric, value, of `kfacerr.damping_map`.
        title: one line above the figure.
        dark: for a dark background.

    Returns:
        The figure; `save` writes it.
    """
    kinds, ranks = list(dict.fromkeys(frame.damping)), sorted(set(frame["rank"]))
    metrics = [*METRIC_LABELS, "condition"]
    colours = mpl.colormaps["viridis"](np.linspace(0.2 if dark else 0.0, 1.0 if dark else 0.85, len(ranks)))
    with mpl.rc_context(_DARK if dark else {}):
        figure = Figure(figsize=(2.6 * len(metrics), 1.9 * len(kinds) + 0.6), layout="constrained")
        axes = figure.subplots(len(kinds), len(metrics), squeeze=False)
        labelled: set[str] = set()
        for (kind, metric), ax in zip(itertools.product(kinds, metrics), axes.flat, strict=True):
            part = frame[(frame.damping == kind) & (frame.metric == metric)].dropna()
            if part.empty:
                ax.set_axis_off()
                continue
            for colour, r in zip(colours, ranks, strict=True):
                curve = part[part["rank"] == r]
                ax.plot(curve.share, curve.value.clip(lower=ROUNDING), color=colour, linewidth=1.2)
            decades = np.log10(part.value.clip(lower=ROUNDING))
            low, high = np.floor(decades.min() + 0.05), np.ceil(decades.max() - 0.05)  # ticks at both ends
            ax.set(xscale="log", yscale="log", ylim=(10.0 ** min(low, high - 1) / 1.3, 1.3 * 10.0**high))
            ax.set_xlabel(RELATIVE[kind], fontsize=7)
            ax.minorticks_off()
            ax.tick_params(labelsize=7)
            ax.grid(True, which="major", linewidth=0.3, alpha=0.6)
            if kind == kinds[0]:
                ax.set_title(METRIC_LABELS.get(metric, "condition"), fontsize=8)
            if kind not in labelled:
                ax.set_ylabel(f"damping {kind}", fontsize=8)
                labelled.add(kind)
        handles = [Line2D([], [], color=c, label=f"r = {r}") for c, r in zip(colours, ranks, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(ranks), fontsize=7, frameon=False)
        if title:
            figure.suptitle(title, fontsize=9)
    return figure


_UNDATED: dict[str, dict[str, None]] = {".pdf": {"CreationDate": None}, ".png": {}, ".svg": {"Date": None}}


def plain(text: str) -> str:
    """Text as it stands: matplotlib takes what stands between two dollars for mathematics."""
    return text.replace("$", r"\$")


def check_format(path: Path) -> None:
    """Refuses a file name whose suffix is no format of ours."""
    if path.suffix not in _UNDATED:
        raise InputError(f"{path}: a figure's name must end in {', '.join(_UNDATED)}")


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure in the format of the path's suffix, without a date."""
    path = Path(path)
    check_format(path)
    with mpl.rc_context({"svg.hashsalt": "kfacerr"}):
        write_atomically(path, lambda p: figure.savefig(p, dpi=300, metadata=_UNDATED[path.suffix]))


def frontier_figure(
    table: pd.DataFrame, budget: float, choice: str, *, title: str = "", dark: bool = False
) -> Figure:
    """Errors (3) and (4) of the step over the cost of each candidate, and the candidates on the frontier by name.

    Args:
        table: columns algorithm, cost (ms per iteration), step_norm, step_angle, on_frontier.
        budget: in ms per iteration, drawn as a line.
        choice: the algorithm that is ringed.
        title: one line above the figure.
        dark: for a dark background.

    Returns:
        The two errors side by side; `save` writes them.
    """
    with mpl.rc_context(_DARK if dark else {}):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        front = table[table.on_frontier].sort_values("cost")
        for ax, metric in zip(figure.subplots(1, 2), ("step_norm", "step_angle"), strict=True):
            real = table[metric][table[metric] > ROUNDING]
            floor = ROUNDING if real.empty else float(real.min()) / 3  # what is exact stands here, at the bottom
            error, best = table[metric].clip(lower=floor), front[metric].clip(lower=floor)
            ax.scatter(table.cost, error, s=14, color="#999999", label="candidates")
            ax.plot(front.cost, best, "o-", color="#0072B2", markersize=4, label="frontier")
            for i, where in enumerate(zip(front.cost, best, strict=True)):
                beside = (3, 3) if i % 2 else (-9, -8)  # neighbours' numbers on either side
                ax.annotate(str(i + 1), where, fontsize=7, xytext=beside, textcoords="offset points")
            ringed = table.algorithm == choice
            ax.scatter(table.cost[ringed], error[ringed], s=90, facecolors="none", edgecolors="#D55E00")
            ax.axvline(budget, color="#D55E00", linewidth=0.8, linestyle="--", label="budget")
            ax.set(xscale="log", yscale="log", xlabel="cost, ms per iteration", ylabel="mean error")
            ax.set_title(METRIC_LABELS[metric], fontsize=9)
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.tick_params(labelsize=8)
            ax.grid(True, which="major", linewidth=0.3, alpha=0.6)
        names = [plain(f"{i + 1}  {row.algorithm}") for i, row in enumerate(front.itertuples())]
        handles, labels = figure.axes[0].get_legend_handles_labels()
        blank = Line2D([], [], linestyle="none")
        figure.legend(
            [*handles, *[blank] * len(names)],
            [*labels, *names],
            loc="outside right upper",
            fontsize=7,
            frameon=False,
        )
        if title:
            figure.suptitle(plain(title), fontsize=9)
    return figure
