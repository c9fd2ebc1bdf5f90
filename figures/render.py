"""From an error study's CSVs to its figures and Table 1; reads nothing else, so they can be rendered anywhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from figures.tables import (
    not_used_in,
    note,
    read_errors,
    read_table,
    study_config,
    table_1,
    table_1_markdown,
    window_settings,
)
from kfacerr.algorithms import Algorithm
from kfacerr.files import write_text
from kfacerr.metrics import METRICS
from kfacerr.plot import METRIC_LABELS, error_figure, plain, save
from kfacerr.study import by_window

__all__ = ["errors_figure", "is_there", "render", "save_both", "spectrum_figure", "variants_figure"]

Settings = Mapping[int, Mapping[str, Any]]
"""By a window's epoch, see `figures.tables.window_settings`."""


def render(run: Path) -> None:
    """Writes Figures 1 and 2, the variants and the spectra (PDF, PNG) and Table 1 (Markdown, CSV) into `run`.

    Table 1 has a t_epoch column if `studies.timing` has left its timing.csv there.

    Raises:
        InputError: `run` has no errors.csv, or it is not a table of errors.
    """
    errors = read_errors(run / "errors.csv")
    settings, seeds = window_settings(run), errors.seed.nunique()
    spectra = variants = timing = None  # all that is there is read, and refused, before the first figure is drawn
    if is_there(run, "spectra.csv"):
        spectra = read_table(run / "spectra.csv", ("seed", "epoch", "factor", "index", "eigenvalue"))
    if is_there(run, "variants.csv"):
        variants = read_errors(run / "variants.csv", rows=False)
    if is_there(run, "timing.csv"):
        timing = read_table(run / "timing.csv", ("driver", "t_epoch"))
    for name, metrics in (("figure1", METRICS[:2]), ("figure2", METRICS[2:])):
        save_both(errors_figure(errors, metrics, settings, note(run, seeds)), run / name)
    if spectra is not None:
        save_both(spectrum_figure(spectra, settings), run / "spectra")
    if variants is not None:
        everything = pd.concat([errors, variants], ignore_index=True)
        save_both(variants_figure(everything, settings, note(run, seeds, band=False)), run / "variants")
    table = table_1(errors, timing)
    label, _ = by_window(errors)[-1]
    write_text(run / "table1.csv", table.to_csv(index=False, float_format="%.4g"))
    notes = not_used_in(run, errors, spectra)
    data = study_config(run).get("data", "")
    write_text(run / "table1.md", table_1_markdown(table, label, data, seeds, notes))


def is_there(run: Path, name: str) -> bool:
    """Whether a study has a table, or what `gzip` made of it."""
    return (run / name).exists() or (run / f"{name}.gz").exists()


def save_both(figure: Figure, stem: Path) -> None:
    """As PDF and PNG."""
    for suffix in (".pdf", ".png"):
        save(figure, stem.with_suffix(suffix))


def _said(settings: Settings, epoch: int, *, rank: bool = True) -> str:
    """ "r = 29, φ = 0.1" of the window at that epoch, where it is known; two φ if its end has another."""
    window = settings.get(epoch)
    if window is None:
        return ""
    phi = f"φ = {' to '.join(f'{phi:g}' for phi in dict.fromkeys(window['phi']))}"
    return f"r = {window['rank']}, {phi}" if rank else phi


def errors_figure(errors: pd.DataFrame, metrics: Sequence[str], settings: Settings, title: str) -> Figure:
    """Figure 1 or 2 of the paper, with what r and phi were in each window."""
    figure = error_figure(errors, metrics, title=title)
    for row, (label, window) in enumerate(by_window(errors)):
        about = ", ".join(filter(None, (label, _said(settings, window.epoch.iloc[0]))))
        figure.axes[row * len(metrics)].set_ylabel(f"{about}\nrelative error", fontsize=7)
    return figure


def variants_figure(errors: pd.DataFrame, settings: Settings, title: str) -> Figure:
    """Each metric's average over the last window: a row an algorithm, a marker a spectrum continuation.

    Where continuations agree, as for exact K-FAC, each marker is seen within the one below it.
    """
    label, last = by_window(errors)[-1]
    averages = last.groupby(["algorithm", "metric"]).value.mean()
    algorithms = [Algorithm.parse(name) for name in dict.fromkeys(last.algorithm)]
    rows = list(dict.fromkeys(a.with_settings(continuation=None) for a in algorithms))[::-1]
    figure = Figure(figsize=(6.8, 1.4 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for ax, metric in zip(axes.flat, METRICS, strict=True):
        for kind, look in _CONTINUATIONS.items():
            named = [str(row.with_settings(continuation=None if kind == "min" else kind)) for row in rows]
            points = [(averages[name, metric], i) for i, name in enumerate(named) if (name, metric) in averages]
            if points:
                x, y = zip(*points, strict=True)
                said = f"{kind} (the paper's)" if kind == "min" else kind
                ax.scatter(x, y, label=said, zorder=2, **look)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(range(len(rows)), [_row_name(row) for row in rows])
        ax.tick_params(labelsize=6.5)
        ax.grid(True, linewidth=0.3, alpha=0.6)
        ax.set_title(METRIC_LABELS[metric], fontsize=8)
    for ax in axes[1]:
        ax.set_xlabel("mean relative error", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("algorithm", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="continuation of the spectrum",
        title_fontsize=7,
        loc="outside lower center",
        ncols=3,
        fontsize=7,
        frameon=False,
    )
    several = len({window["rank"] for window in settings.values()}) > 1
    about = _said(settings, last.epoch.iloc[0], rank=several or "r = " not in title)
    below = ", ".join(filter(None, (f"means over the window at {label}", about)))
    figure.suptitle(plain("\n".join(filter(None, (title, below)))), fontsize=8)
    return figure


_CONTINUATIONS: dict[str, dict[str, Any]] = {
    "min": {"marker": "o", "s": 40, "facecolors": "none", "edgecolors": "#0072B2", "linewidths": 1.3},
    "trace": {"marker": "s", "s": 13, "color": "#D55E00", "linewidths": 0},
    "none": {"marker": "x", "s": 16, "color": "#000000", "linewidths": 0.9},
}
"""How each is marked."""


def _row_name(algorithm: Algorithm) -> str:
    return str(algorithm).replace("FD", "Frequent Directions") if algorithm.base == "FD" else str(algorithm)


def spectrum_figure(spectra: pd.DataFrame, settings: Settings) -> Figure:
    """Eigenvalues of both EA factors at each window's start, relative to the largest: one panel a factor.

    Dotted lines are the damping phi; vertical ones are where r and r + n modes are cut.
    """
    epochs = sorted(spectra.epoch.unique())
    figure = Figure(figsize=(6.8, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for ax, factor, symbol in zip(axes, "AG", (r"$\bar\mathcal{A}$", r"$\bar\Gamma$"), strict=True):
        for colour, epoch in zip(colours, epochs, strict=False):
            part = spectra[(spectra.factor == factor) & (spectra.epoch == epoch)]
            about = ", ".join(filter(None, (f"epoch {epoch}", _said(settings, epoch))))
            for i, (_, one) in enumerate(part.groupby("seed")):
                relative = (one.eigenvalue / one.eigenvalue.max()).clip(lower=1e-16)
                ax.loglog(one["index"] + 1, relative, color=colour, linewidth=0.9, label=about if i == 0 else None)
            _draw_cuts(ax, settings.get(epoch), colour)
        ax.set_ylim(1e-10, 2)
        ax.set_title(f"spectrum of {symbol} at the window's start", fontsize=8)
        ax.set_xlabel("eigenvalue number", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(True, linewidth=0.3, alpha=0.6)
    axes[0].set_ylabel(r"$\lambda_i/\lambda_1$", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    if settings:
        figure.supxlabel(
            "dotted: the damping φ; vertical: the cuts at r (dashed) and r + n (dash-dotted)", fontsize=7
        )
    return figure


def _draw_cuts(ax: Any, window: Mapping[str, Any] | None, colour: str) -> None:
    """The damping and the cuts of a window, if they are known."""
    if window is None:
        return
    ax.axhline(window["phi"][0], color=colour, linestyle=":", linewidth=0.8)
    for cut, line in ((window["rank"], "--"), (window["rank"] + window["columns"], "-.")):
        ax.axvline(cut, color=colour, linestyle=line, linewidth=0.6, alpha=0.7)
