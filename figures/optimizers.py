"""The performance study's CSVs to Table 2, the accuracy curves and the breakdown of a step; reads nothing else
but config.json, for the targets and T_updt, so that results can be rendered anywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.render import save_both
from figures.tables import (
    PARTS,
    breakdown_table,
    epoch_times,
    paper_name,
    read_table,
    study_config,
    table_1_times,
    table_2,
    table_2_markdown,
    write_table,
)
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from kfacerr.plot import plain

__all__ = ["OTHER", "STYLES", "accuracy_figure", "breakdown_figure", "render"]

# Okabe-Ito colours, as in `kfacerr.plot`, by the paper's names; the line style tells them apart without colour.
STYLES: dict[str, tuple[str, Any]] = {
    "SENG": ("#CC79A7", "-"),
    "K-FAC": ("#000000", "-"),
    "R-KFAC": ("#0072B2", "-"),
    "R-KFAC T_inv=25": ("#56B4E9", "--"),
    "B-KFAC": ("#D55E00", "-"),
    "B-KFAC-C": ("#E69F00", "--"),
    "B-R-KFAC": ("#009E73", "-"),
    "SGD": ("#777777", ":"),
    "AdamW": ("#777777", "-."),
}
OTHER = ("#777777", "--")
_COLOURS = dict(zip(PARTS, ("#BBBBBB", "#56B4E9", "#D55E00", "#009E73", "#009E73", "#F0E442"), strict=True))


def render(run: Path) -> None:
    """Writes Table 2, Table 1's times and the breakdown (Markdown, CSV), and the figures (PDF, PNG) into `run`.

    Raises:
        InputError: `run` lacks a file, or it is not what a performance study writes.
    """
    config = study_config(run)
    targets, T_updt = config.get("targets", ()), config.get("T_updt")
    if len(targets) != 3 or not T_updt:
        raise InputError(f"{run / 'config.json'}: has no three targets and T_updt, as a performance study's would")
    epochs = read_table(run / "epochs.csv", ("optimizer", "seed", "epoch", "seconds", "test_accuracy"), rows=False)
    timing = read_table(run / "timing.csv", ("table", "driver", "round", "t_epoch"), rows=False)
    breakdown = read_table(run / "breakdown.csv", ("table", "driver", "part", "seconds"), rows=False)
    for name, part in (("timing", timing), ("breakdown", breakdown)):
        if not part.table.isin((1, 2)).all():
            raise InputError(f"{run / name}.csv: column 'table' is not all 1 or 2")
    first, second = (timing[timing.table == number] for number in (1, 2))
    table = table_2(epochs, second, targets, T_updt)
    write_text(run / "table2.csv", table.to_csv(index=False, float_format="%.5g"))
    write_text(run / "table2.md", table_2_markdown(table, targets, config.get("data", "")))
    save_both(accuracy_figure(epochs, epoch_times(epochs, second), targets, T_updt), run / "accuracy")
    if len(breakdown):
        write_table(breakdown_table(breakdown), run / "breakdown_table", ".3g")
        save_both(breakdown_figure(breakdown), run / "breakdown")
    if len(times := table_1_times(first)):
        write_table(times, run / "table1_times", ".3g")


def accuracy_figure(epochs: pd.DataFrame, times: pd.DataFrame, targets: Sequence[float], T_updt: int) -> Figure:
    """Test accuracy against epochs and against time, epochs times t_epoch: mean over seeds, band min to max."""
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = {name: STYLES.get(paper_name(name, T_updt), OTHER) for name in times.index}
    for name, (colour, line) in styles.items():
        curve = epochs[epochs.optimizer == name].groupby("epoch").test_accuracy.agg(["mean", "min", "max"])
        for ax, x in ((left, curve.index), (right, curve.index * times["mean"][name])):
            ax.plot(x, 100 * curve["mean"], color=colour, linestyle=line, linewidth=1.0)
            ax.fill_between(x, 100 * curve["min"], 100 * curve["max"], color=colour, alpha=0.12, linewidth=0)
    for ax, label in ((left, "epochs"), (right, "time (s)")):
        for target in targets:
            ax.axhline(100 * target, color="#999999", linewidth=0.5)
        ax.set_xlabel(label, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(True, linewidth=0.3, alpha=0.6)
    left.set_ylabel("test accuracy (%)", fontsize=8)
    handles = [Line2D([], [], color=c, linestyle=s, linewidth=1.0, label=plain(n)) for n, (c, s) in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return figure


def breakdown_figure(breakdown: pd.DataFrame) -> Figure:
    """Where an epoch's time goes: a stacked bar a driver."""
    table = breakdown_table(breakdown).iloc[::-1]
    figure = Figure(figsize=(6.8, 0.9 + 0.24 * len(table)), layout="constrained")
    ax = figure.subplots()
    left = np.zeros(len(table))
    for part, colour in _COLOURS.items():
        if part in table:
            widths = table[part].to_numpy()
            ax.barh(
                table.driver.map(plain),
                widths,
                left=left,
                color=colour,
                label=plain(part),
                edgecolor="white",
                linewidth=0.4,
            )
            left = left + widths
    ax.set_xlabel("seconds of an epoch", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(True, axis="x", linewidth=0.3, alpha=0.6)
    ax.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return figure
