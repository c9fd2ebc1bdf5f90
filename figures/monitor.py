"""The figure of a monitored run: the four errors and the certified bounds against the epoch, and the spectra."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from figures.render import save_both
from figures.tables import note, read_errors, read_table
from kfacerr.algorithms import Algorithm
from kfacerr.metrics import METRICS, ROUNDING
from kfacerr.plot import METRIC_LABELS, plain, style
from kfacerr.study import CERTIFIED

__all__ = ["monitor_figure", "render_monitor"]

BOUNDS = {f"inverse_{side}": metric for side, metric in CERTIFIED.items()}
CYCLE = 50  # iterations: one period of the heavier updates, over which every curve is averaged


def render_monitor(run: Path) -> None:
    """Writes monitor.pdf and monitor.png into `run`.

    Raises:
        InputError: `run` has no monitor.csv and spectrum.csv, or they are not such tables.
    """
    errors = read_errors(run / "monitor.csv")
    spectra = read_table(run / "spectrum.csv", ("epoch", "factor", "above_damping", "at_r", "at_r_plus_n", "tail"))
    names = [name for name in errors.algorithm.unique() if Algorithm.parse(name).get("continuation") is None]
    shown = errors[errors.algorithm.isin(names)]
    save_both(monitor_figure(shown, spectra, note(run, errors.seed.nunique(), band=False)), run / "monitor")


def monitor_figure(errors: pd.DataFrame, spectra: pd.DataFrame, title: str) -> Figure:
    """Metrics (1)-(4) against the epoch, averaged over periods and seeds, bounds dotted; below, the spectra."""
    steps = errors.k.max() / max(1, errors.epoch.max())
    cycle = errors.assign(at=(errors.k // CYCLE + 0.5) * CYCLE / steps)
    updates = cycle.groupby("at").k.transform("nunique")
    cycle = cycle[updates == updates.max()]  # the run may end within a period
    curves = cycle.groupby(["algorithm", "metric", "at"]).value.mean()
    names = list(dict.fromkeys(errors.algorithm))
    drawn = set(errors[["algorithm", "metric"]].itertuples(index=False, name=None))
    styles = style(names)
    figure = Figure(figsize=(6.8, 7.2), layout="constrained")
    axes = figure.subplots(3, 2)
    for ax, metric in zip(axes[:2].flat, METRICS, strict=True):
        for name in names:
            colour, line = styles[name]
            curve = curves.loc[name, metric]
            ax.semilogy(curve.index, curve, color=colour, linestyle=line, linewidth=1.0, label=plain(name))
            bound = BOUNDS.get(metric, "")
            if (name, bound) in drawn:
                certified = curves.loc[name, bound]
                certified = certified[(certified > ROUNDING) & (certified < 10)]  # above it says nothing
                ax.semilogy(certified.index, certified, color=colour, linestyle=":", linewidth=0.8)
        ax.set_title(METRIC_LABELS[metric] + (", dotted: certified" if metric in BOUNDS else ""), fontsize=8)
    for ax, factor, symbol in zip(axes[2], "AG", (r"$\bar\mathcal{A}$", r"$\bar\Gamma$"), strict=True):
        part = spectra[spectra.factor == factor].groupby("epoch").mean(numeric_only=True)
        for column, label, line in (
            ("at_r", r"$\lambda_{r+1}/\lambda_1$", "-"),
            ("at_r_plus_n", r"$\lambda_{r+n+1}/\lambda_1$", "--"),
            ("tail", "share of the trace beyond r", ":"),
        ):
            ax.semilogy(part.index, part[column], color="#000000", linestyle=line, linewidth=1.0, label=label)
        ax.set_ylim(bottom=1e-4)
        ax.set_title(f"spectrum of {symbol}", fontsize=8)
        ax.set_xlabel("epoch", fontsize=8)
    for ax, label in zip(axes[:, 0], ("relative error", "relative error", "share"), strict=True):
        ax.set_ylabel(label, fontsize=8)
    axes[2, 0].legend(fontsize=7, frameon=False)
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
        ax.grid(True, linewidth=0.3, alpha=0.6)
        ax.margins(x=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.suptitle(plain(", ".join(filter(None, (title, "one damping for all")))), fontsize=8)
    return figure
