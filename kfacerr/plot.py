"""Figures 1 and 2 in the paper's layout from a tidy error table: rows are windows, columns are metrics.

No global matplotlib state is touched: every function returns a `Figure` for the caller to save.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

__all__ = ["METRIC_LABELS", "error_curves", "error_figure", "style"]

METRIC_LABELS = {
    "inverse_A": r"(1) error in $\mathcal{A}^{-1}$",
    "inverse_G": r"(2) error in $\Gamma^{-1}$",
    "step_norm": "(3) norm error of the step",
    "step_angle": "(4) angle error of the step",
}

ROUNDING = 1e-9  # errors below are rounding: float64 leaves 1e-14, float32 1e-7 squared in the angle

_STYLES = {  # Okabe-Ito colours; the line style tells them apart without colour
    "K-FAC T_inv=50": ("#000000", "-"),
    "R-KFAC T_inv=50": ("#0072B2", "-"),
    "R-KFAC T_inv=10": ("#56B4E9", "--"),
    "R-KFAC T_inv=300": ("#CC79A7", "-."),
    "B-KFAC": ("#D55E00", "-"),
    "B-R-KFAC": ("#009E73", "-"),
    "B-KFAC-C": ("#E69F00", "--"),
}
_SPARE = [(c, s) for s in (":", (0, (3, 1, 1, 1)), (0, (5, 3))) for c, _ in _STYLES.values()]


def style(algorithms: Sequence[str]) -> dict[str, tuple[str, object]]:
    """Colour and line style of each algorithm: fixed for the paper's seven, the same in every figure."""
    spare = iter(_SPARE)
    return {name: _STYLES.get(name) or next(spare) for name in algorithms}


def error_curves(frame: pd.DataFrame, metric: str, epoch: int, block: int) -> pd.DataFrame:
    """The curves of one panel: the error averaged over blocks of `block` iterations (T_updt, as in Figure 2).

    Args:
        frame: the tidy table; `seed` is optional.
        metric: one of the four.
        epoch: the window's.
        block: iterations averaged.

    Returns:
        Columns algorithm, iteration (the block's first, counted from the window's start), mean over seeds,
        low and high (smallest and largest over seeds).
    """
    part = frame[(frame.metric == metric) & (frame.epoch == epoch)]
    part = part.assign(iteration=(part.k - part.k.min()) // block * block)
    if "seed" not in part:
        part = part.assign(seed=0)
    blocks = part.groupby(["algorithm", "seed", "iteration"], sort=False).value.mean()
    over_seeds = blocks.groupby(["algorithm", "iteration"], sort=False)
    curves = over_seeds.agg(["mean", "min", "max"]).reset_index()
    return curves.rename(columns={"min": "low", "max": "high"})


def _floor(values: pd.Series) -> float | None:
    """The axis' lower end: a decade below the smallest error that is not mere rounding, else matplotlib's choice.

    K-FAC is exact right after its EVD; drawn at 1e-15 that would leave no room for anything else.
    """
    real = values[values > ROUNDING]
    return None if real.empty or real.size == values.size else float(real.min()) / 3


def error_figure(frame: pd.DataFrame, metrics: Sequence[str], *, block: int = 10, title: str = "") -> Figure:
    """Figure 1 (metrics (1), (2)) or Figure 2 (metrics (3), (4)): log scale, mean over seeds, band min to max.

    Args:
        frame: tidy table with columns algorithm, k, metric, value, epoch and optionally seed.
        metrics: the columns of the figure.
        block: iterations averaged, T_updt.
        title: one line above the figure.
    """
    epochs = sorted(frame.epoch.unique())
    algorithms = list(dict.fromkeys(frame.algorithm))
    styles = style(algorithms)
    figure = Figure(figsize=(3.4 * len(metrics), 2.1 * len(epochs) + 1.0), layout="constrained")
    axes = figure.subplots(len(epochs), len(metrics), squeeze=False, sharex=True)
    for row, epoch in enumerate(epochs):
        for column, metric in enumerate(metrics):
            ax = axes[row, column]
            curves = error_curves(frame, metric, epoch, block)
            for name in algorithms:
                curve = curves[curves.algorithm == name]
                colour, line = styles[name]
                # The error is constant over a block, so each is drawn as a step of the block's length.
                x = np.append(curve.iteration, curve.iteration.max() + block)
                y, low, high = (np.append(curve[c], curve[c].iloc[-1]) for c in ("mean", "low", "high"))
                ax.step(x, y, where="post", color=colour, linestyle=line, linewidth=1.1, label=name)
                ax.fill_between(x, low, high, step="post", color=colour, alpha=0.12, linewidth=0)
            if (curves["mean"] > 0).any():
                ax.set_yscale("log")
                ax.set_ylim(bottom=_floor(curves["low"]))
                ax.yaxis.set_major_locator(LogLocator(numticks=8))
                ax.yaxis.set_minor_formatter(NullFormatter())
            ax.grid(True, which="major", linewidth=0.3, alpha=0.6)
            ax.tick_params(labelsize=7)
            ax.margins(x=0)
            if row == 0:
                ax.set_title(METRIC_LABELS.get(metric, metric), fontsize=8)
            if row == len(epochs) - 1:
                ax.set_xlabel("iteration in the window", fontsize=8)
            if column == 0:
                ax.set_ylabel(f"epoch {epoch}", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    if title:
        figure.suptitle(title, fontsize=8)
    return figure
