"""From the errors.csv of `studies.sketches` to its tables and its figure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from figures.render import save_both
from figures.tables import read_table
from kfacerr.files import write_text
from kfacerr.metrics import METRICS
from kfacerr.plot import METRIC_LABELS

__all__ = ["equal", "figure", "means", "render", "report"]

SPENT = ("rank", "columns", "memory", "flops")
EQUAL = {"rank": "applied rank", "columns": "carried columns", "memory": "memory", "flops": "flops"}
KEYS = ["recording", "dtype", "algorithm", "role", *SPENT, "continuation"]
LOOKS = {  # by an algorithm's base: colour, marker
    "B-KFAC": ("#D55E00", "o"),
    "N-KFAC": ("#0072B2", "s"),
    "B-R-KFAC": ("#009E73", "o"),
    "R-KFAC": ("#CC79A7", "^"),
    "W-KFAC": ("#56B4E9", "D"),
    "K-FAC": ("#000000", "*"),
    "FD": ("#E69F00", "v"),
}


def render(run: Path) -> None:
    """Writes sketches.md, sketches.pdf and sketches.png into `run`.

    Raises:
        InputError: `run` has no errors.csv, or it is no such table.
    """
    errors = means(read_table(run / "errors.csv", (*KEYS, "draw", "epoch", *METRICS)))
    write_text(run / "sketches.md", report(errors))
    save_both(figure(errors[errors.dtype == errors.dtype.iloc[0]]), run / "sketches")


def means(errors: pd.DataFrame) -> pd.DataFrame:
    """Over the windows and draws; `spread` is the most that a draw is off the mean, relative, in any metric."""
    by_draw = errors.groupby([*KEYS, "draw"], sort=False)[list(METRICS)].mean()
    over_draws = by_draw.groupby(KEYS, sort=False)
    off = (by_draw / over_draws.transform("mean") - 1).abs().max(axis=1)
    return over_draws.mean().assign(spread=off.groupby(KEYS, sort=False).max()).reset_index()


def equal(errors: pd.DataFrame) -> Iterator[tuple[str, pd.Series, pd.Series]]:
    """What is equal, a B-KFAC and the N-KFAC of the most columns within it, of one recording and continuation."""
    sketches = errors[errors.role == "N-KFAC"].sort_values("columns")
    for _, brand in errors[errors.role == "B-KFAC"].iterrows():
        for kind in EQUAL:
            fitting = sketches[sketches[kind] <= brand[kind]]
            if len(fitting) and fitting[kind].iloc[-1] > 0.8 * brand[kind]:
                yield kind, brand, fitting.iloc[-1]


def report(errors: pd.DataFrame) -> str:
    """sketches.md."""
    parts = ["# N-KFAC and W-KFAC beside the others"]
    for (recording, dtype), part in errors.groupby(["recording", "dtype"], sort=False):
        parts.append(f"## {recording}, {dtype}")
        for kind in part.continuation.unique():
            one = part[part.continuation == kind]
            parts.append(f"Continuation `{kind}`. B-KFAC's error over N-KFAC's, at equal ...:\n\n{_ratios(one)}")
        parts.append(_listed(part))
    parts.append(
        "Means over windows and draws. applied: modes of the inverse of A. columns: carried between updates. "
        "MiB: of both factors in float32. Mflop: of an update of both, with its estimate. spread: the most that "
        "a draw is off the mean, in any metric."
    )
    return "\n\n".join(parts) + "\n"


def _ratios(errors: pd.DataFrame) -> str:
    rows = [
        (EQUAL[kind], brand.algorithm, sketch.algorithm, *(brand[m] / sketch[m] for m in METRICS))
        for kind, brand, sketch in equal(errors)
    ]
    names = ["equal", "B-KFAC", "N-KFAC", "(1)", "(2)", "(3)", "(4)"]
    return pd.DataFrame(rows, columns=names).to_markdown(index=False, floatfmt=".3g")


def _listed(errors: pd.DataFrame) -> str:
    shown = errors.assign(memory=errors.memory * 4 / 2**20, flops=errors.flops / 1e6, spread=100 * errors.spread)
    names = {"rank": "applied", "memory": "MiB", "flops": "Mflop", "spread": "spread (%)"}
    names |= {metric: f"({i})" for i, metric in enumerate(METRICS, 1)}
    columns = ["continuation", "algorithm", *SPENT, *METRICS, "spread"]
    return shown[columns].rename(columns=names).to_markdown(index=False, floatfmt=".3g")


def figure(errors: pd.DataFrame) -> Figure:
    """The four metrics against flops and against memory, a row a recording: `trace` filled, `min` hollow."""
    rows = [(name, part, x) for name, part in errors.groupby("recording", sort=False) for x in ("flops", "memory")]
    drawing = Figure(figsize=(9.5, 0.9 + 2.1 * len(rows)), layout="constrained")
    axes = drawing.subplots(len(rows), len(METRICS), squeeze=False)
    for line, (name, part, x) in zip(axes, rows, strict=True):
        shown = part[part.role.isin(("B-KFAC", "N-KFAC", "others"))]
        for ax, metric in zip(line, METRICS, strict=True):
            _panel(ax, shown, x, metric)
        line[0].set_ylabel(f"{name}\nrelative error", fontsize=7)
    for ax, metric in zip(axes[0], METRICS, strict=True):
        ax.set_title(METRIC_LABELS[metric], fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    drawing.suptitle("filled: trace continuation, hollow: min; lines join one algorithm's sizes", fontsize=8)
    return drawing


def _panel(ax: Any, shown: pd.DataFrame, x: str, metric: str) -> None:
    for base, (colour, marker) in LOOKS.items():
        own = shown[shown.algorithm.str.split().str[0] == base]
        for kind, filled in (("trace", True), ("min", False)):
            points = own[own.continuation == kind].sort_values(x)
            joined = ("-" if filled else ":") if base in ("B-KFAC", "N-KFAC") else "none"
            ax.loglog(
                points[x] / 1e6 if x == "flops" else points[x] * 4 / 2**20,
                points[metric],
                color=colour,
                linestyle=joined,
                marker=marker,
                markersize=4,
                markerfacecolor=colour if filled else "none",
                linewidth=0.9,
                label=base if filled else None,
            )
    ax.set_xlabel("Mflop an update" if x == "flops" else "MiB (float32)", fontsize=7)
    for axis, subs in ((ax.xaxis, (1, 3)), (ax.yaxis, (1, 2, 5))):
        axis.set_major_locator(LogLocator(subs=subs, numticks=9))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.tick_params(labelsize=6.5)
    ax.grid(True, linewidth=0.3, alpha=0.5)
