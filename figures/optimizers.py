"""The performance study's CSVs to Table 2, the accuracy curves and the breakdown of a step; reads nothing else
but config.json, for the targets, so that results can be rendered anywhere."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.files import read_table, save_both
from figures.render import PAPER_TABLE_1
from kfacerr.exceptions import InputError
from kfacerr.files import write_text

__all__ = [
    "NAMES",
    "PAPER_TABLE_2",
    "accuracy_figure",
    "breakdown_figure",
    "breakdown_table",
    "epoch_times",
    "epochs_to",
    "render",
    "runs_to_targets",
    "table_1_times",
    "table_2",
    "targets_by_rule",
]

NAMES = {  # drivers, in Table 2's order; the last two are not in it
    "seng": "SENG",
    "k-fac": "K-FAC",
    "r-kfac": "R-KFAC",
    "r-kfac-short": "R-KFAC short T_inv",
    "b-kfac": "B-KFAC",
    "b-kfac-c": "B-KFAC-C",
    "b-r-kfac": "B-R-KFAC",
    "sgd": "SGD",
    "adamw": "AdamW",
}
REFERENCE = "r-kfac"  # whose times the others' are ratios to

_NAN = float("nan")
PAPER_TABLE_2 = {  # seconds to 91%, 93%, 93.5%; t_epoch; hits of 93.5% in 10; epochs to 93%. On a V100
    "seng": (999.0, 1098.0, 1144.0, 25.4, 10, 43.1),
    "k-fac": (2610.0, 4021.0, _NAN, 97.8, 0, 41.1),
    "r-kfac": (920.3, 1357.0, _NAN, 47.7, 0, 28.9),
    "r-kfac-short": (1019.0, 1526.0, 2108.0, 53.3, 6, 28.5),
    "b-kfac": (894.0, 1325.0, 1913.0, 46.3, 10, 28.6),
    "b-kfac-c": (911.2, 1352.3, 2031.0, 47.4, 6, 28.5),
    "b-r-kfac": (945.9, 1324.8, 1975.0, 48.4, 8, 28.3),
}

# Okabe-Ito colours, as in `kfacerr.plot`; the line style tells them apart without colour.
_STYLES: dict[str, tuple[str, Any]] = {
    "seng": ("#CC79A7", "-"),
    "k-fac": ("#000000", "-"),
    "r-kfac": ("#0072B2", "-"),
    "r-kfac-short": ("#56B4E9", "--"),
    "b-kfac": ("#D55E00", "-"),
    "b-kfac-c": ("#E69F00", "--"),
    "b-r-kfac": ("#009E73", "-"),
    "sgd": ("#777777", ":"),
    "adamw": ("#777777", "-."),
}
_PARTS = {
    "forward/backward": "#BBBBBB",
    "EA update": "#56B4E9",
    "decomposition": "#D55E00",
    "application": "#009E73",
    "other": "#F0E442",
}


def render(run: Path) -> None:
    """Writes Table 2, Table 1's times and the breakdown (Markdown, CSV), and the figures (PDF, PNG) into `run`.

    Raises:
        InputError: `run` lacks a file, or it is not what a performance study writes.
    """
    config = _config(run / "config.json")
    epochs = read_table(run / "epochs.csv", ("optimizer", "seed", "epoch", "seconds", "test_accuracy"), rows=False)
    timing = read_table(run / "timing.csv", ("driver", "round", "t_epoch"), rows=False)
    breakdown = read_table(run / "breakdown.csv", ("driver", "round", "part", "seconds"), rows=False)
    targets = config["targets"]
    table = table_2(epochs, timing, targets)
    write_text(run / "table2.csv", table.to_csv(index=False, float_format="%.5g"))
    write_text(run / "table2.md", _table_2_markdown(table, targets, config.get("data", "")))
    save_both(accuracy_figure(epochs, epoch_times(epochs, timing), targets), run / "accuracy")
    if len(breakdown):
        _write(breakdown_table(breakdown), run / "breakdown_table", ".3g")
        save_both(breakdown_figure(breakdown), run / "breakdown")
    if len(times := table_1_times(timing)):
        _write(times, run / "table1_times", ".3g")


# ------------------------------------------------------------------------------------------------- tables


def epochs_to(epochs: pd.DataFrame, target: float) -> float:
    """Epochs of one run until the test accuracy is above the target for the first time; NaN if it never is."""
    reached = epochs.epoch[epochs.test_accuracy > target]
    return float(reached.min()) if len(reached) else _NAN


def targets_by_rule(epochs: pd.DataFrame) -> tuple[float, float, float]:
    """The targets that the rule of `studies.presets.OptimizerPreset` gives for the runs in epochs.csv."""
    best = 100 * epochs.groupby(["optimizer", "seed"]).test_accuracy.max()
    first = math.floor(best.min() - 1 + 1e-9)
    third = math.floor(best.median() + 1e-9)
    return first / 100, (first + third) / 200, third / 100


def runs_to_targets(epochs: pd.DataFrame, targets: Sequence[float]) -> pd.DataFrame:
    """A row a run: columns optimizer, seed, and for each target, named by its value, the epochs it took."""
    rows = [
        {"optimizer": name, "seed": seed} | {target: epochs_to(run, target) for target in targets}
        for (name, seed), run in epochs.groupby(["optimizer", "seed"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["optimizer", "seed", *targets])


def epoch_times(epochs: pd.DataFrame, timing: pd.DataFrame) -> pd.DataFrame:
    """t_epoch of each optimizer: index optimizer; mean, std, and clock, which says where it is from.

    "alone": from `studies.timing`. Where that has not been taken, "in jobs": from the runs' own clocks, which jobs
    side by side disturb.
    """
    jobs = epochs.groupby("optimizer", sort=False).seconds.agg(["mean", "std"]).assign(clock="in jobs")
    alone = timing.groupby("driver", sort=False).t_epoch.agg(["mean", "std"]).assign(clock="alone")
    alone = alone.loc[[name for name in jobs.index if name in alone.index]]
    return pd.concat([alone, jobs.loc[[name for name in jobs.index if name not in alone.index]]])


def table_2(epochs: pd.DataFrame, timing: pd.DataFrame, targets: Sequence[float]) -> pd.DataFrame:
    """Table 2: times to the three targets, t_epoch, hits of the third, epochs to the second; the paper's beside.

    Times are epochs times t_epoch. Means and empirical standard deviations (n - 1) are over the runs that reach
    the target, as in the paper. For a quantity Q the columns are "Q", "Q SD", "Q /R-KFAC" and "Q paper/R-KFAC":
    ratios to R-KFAC's mean, since the absolute times are of other machines and networks.
    """
    runs, times = runs_to_targets(epochs, targets), epoch_times(epochs, timing)
    rows = []
    for name in [name for name in NAMES if name in times.index]:
        own, paper = runs[runs.optimizer == name], PAPER_TABLE_2.get(name, (_NAN,) * 6)
        row: dict[str, Any] = {"driver": name, "optimizer": NAMES[name], "runs": len(own)}
        t_epoch: Any = times.loc[name]
        for target, theirs in zip(targets, paper[:3], strict=True):
            seconds: Any = own[target].dropna() * t_epoch["mean"]
            row |= _quantity(f"t_acc>{target:.4g}", seconds.mean(), seconds.std(), theirs)
        row |= _quantity("t_epoch", t_epoch["mean"], t_epoch["std"], paper[3]) | {"clock": t_epoch["clock"]}
        for target in targets:
            row[f"hits {target:.4g}"] = int(own[target].notna().sum())
        row["paper hits, of 10"] = paper[4]
        middle: Any = own[targets[1]].dropna()
        row |= _quantity(f"N_acc>{targets[1]:.4g}", middle.mean(), middle.std(), paper[5])
        row["best accuracy"] = epochs[epochs.optimizer == name].groupby("seed").test_accuracy.max().mean()
        rows.append(row)
    table = pd.DataFrame(rows).set_index("driver")
    for column in [name for name in table if str(name).endswith("/R-KFAC")]:
        reference = table[column].get(REFERENCE, _NAN)
        table[column] = table[column] / reference
    return table.reset_index(drop=True)


def _quantity(name: str, mean: float, deviation: float, paper: float) -> dict[str, float]:
    """The four columns of a quantity; the ratios are still to be divided by R-KFAC's."""
    return {name: mean, f"{name} SD": deviation, f"{name} /R-KFAC": mean, f"{name} paper/R-KFAC": paper}


def _table_2_markdown(table: pd.DataFrame, targets: Sequence[float], data: str) -> str:
    """The table as the paper prints it, each entry with its ratio to R-KFAC and the paper's ratio."""
    columns: dict[str, list[str]] = {"optimizer": list(table.optimizer)}
    heads = {f"t_acc>{t:.4g}": f"t to {t:.2%} (s)" for t in targets} | {"t_epoch": "t_epoch (s)"}
    for name, head in heads.items():
        columns[head] = [_entry(row, name) for _, row in table.iterrows()]
    last, middle = targets[2], targets[1]
    columns[f"hits of {last:.2%}"] = [
        f"{row[f'hits {last:.4g}']} in {row.runs}{_paper_hits(row['paper hits, of 10'])}"
        for _, row in table.iterrows()
    ]
    columns[f"epochs to {middle:.2%}"] = [_entry(row, f"N_acc>{middle:.4g}") for _, row in table.iterrows()]
    columns["best accuracy"] = [f"{value:.2%}" for value in table["best accuracy"]]
    busy = [row.optimizer for _, row in table.iterrows() if row.clock != "alone"]
    lines = [
        f"Table 2 on {data}: mean ± SD over the runs that reach the target; × is the ratio to R-KFAC's, beside "
        "that of the paper's own table (91%, 93%, 93.5% on CIFAR-10).",
        "Times are epochs times t_epoch, which was taken of each optimizer alone.",
    ]
    if busy:
        lines.append(f"Not so for {', '.join(busy)}: from the jobs' own clocks, which jobs side by side disturb.")
    return "\n".join(lines) + "\n\n" + pd.DataFrame(columns).to_markdown(index=False) + "\n"


def _entry(row: pd.Series, name: str) -> str:
    """ "2.4 ± 0.1 (×1.08; paper ×1.09)", without what is not known."""
    ours, deviation, paper = row[f"{name} /R-KFAC"], row[f"{name} SD"], row[f"{name} paper/R-KFAC"]
    text = "-" if np.isnan(row[name]) else f"{row[name]:.3g}"
    text += "" if np.isnan(deviation) else f" ± {deviation:.2g}"
    ratios = [f"×{ours:.2f}"] if not np.isnan(ours) else []
    ratios += [f"paper ×{paper:.2f}"] if not np.isnan(paper) else []
    return f"{text} ({'; '.join(ratios)})" if ratios else text


def _paper_hits(hits: float) -> str:
    return "" if np.isnan(hits) else f" (paper {hits:.0f} in 10)"


def table_1_times(timing: pd.DataFrame) -> pd.DataFrame:
    """The t_epoch column of Table 1: mean and SD over rounds, the ratio to R-KFAC T_inv=50, the paper's beside."""
    times = timing.groupby("driver").t_epoch.agg(["mean", "std"])
    reference = "R-KFAC T_inv=50"
    rows = [
        {
            "algorithm": name,
            "t_epoch (s)": times["mean"][name],
            "SD": times["std"][name],
            "/R-KFAC T_inv=50": times["mean"][name] / times["mean"].get(reference, _NAN),
            "paper t_epoch (s)": paper[4],
            "paper /R-KFAC T_inv=50": paper[4] / PAPER_TABLE_1[reference][4],
        }
        for name, paper in PAPER_TABLE_1.items()
        if name in times.index
    ]
    return pd.DataFrame(rows)


def breakdown_table(breakdown: pd.DataFrame) -> pd.DataFrame:
    """Seconds of an epoch by part, mean over rounds: a row a driver, Table 2's first."""
    table = breakdown.pivot_table(index="driver", columns="part", values="seconds", aggfunc="mean", sort=False)
    table = table.reindex(columns=[part for part in _PARTS if part in table])
    table["total"] = table.sum(axis=1)
    order = [name for name in NAMES if name in table.index]
    table = table.loc[[*order, *(name for name in table.index if name not in order)]].reset_index()
    table["driver"] = [NAMES.get(name, f"{name} (Table 1's periods)") for name in table.driver]
    return table.rename_axis(columns=None)


# ------------------------------------------------------------------------------------------------ figures


def accuracy_figure(epochs: pd.DataFrame, times: pd.DataFrame, targets: Sequence[float]) -> Figure:
    """Test accuracy against epochs and against time, epochs times t_epoch: mean over seeds, band min to max."""
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    present = [name for name in NAMES if name in times.index]
    for name in present:
        colour, line = _STYLES[name]
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
    handles = [
        Line2D([], [], color=_STYLES[n][0], linestyle=_STYLES[n][1], linewidth=1.0, label=NAMES[n])
        for n in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return figure


def breakdown_figure(breakdown: pd.DataFrame) -> Figure:
    """Where an epoch's time goes: a stacked bar a driver."""
    table = breakdown_table(breakdown).iloc[::-1]
    figure = Figure(figsize=(6.8, 0.9 + 0.24 * len(table)), layout="constrained")
    ax = figure.subplots()
    left = np.zeros(len(table))
    for part, colour in _PARTS.items():
        if part in table:
            widths = table[part].to_numpy()
            ax.barh(table.driver, widths, left=left, color=colour, label=part, edgecolor="white", linewidth=0.4)
            left = left + widths
    ax.set_xlabel("seconds of an epoch", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(True, axis="x", linewidth=0.3, alpha=0.6)
    ax.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------- files


def _config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if len(config["targets"]) == 3:
            return config
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: has no three targets, as a performance study's configuration would")


def _write(table: pd.DataFrame, stem: Path, form: str) -> None:
    write_text(stem.with_suffix(".csv"), table.to_csv(index=False, float_format="%.5g"))
    write_text(stem.with_suffix(".md"), table.to_markdown(index=False, floatfmt=form, missingval="-") + "\n")
