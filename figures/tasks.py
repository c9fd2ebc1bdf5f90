"""The CSVs of `studies.tasks` to its tables and figures: what each optimizer comes to on each task, at equal
epochs and at equal time, and what the error of the inverse has to do with it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from scipy.stats import permutation_test, spearmanr

from figures.optimizers import OTHER, STYLES
from figures.render import is_there, save_both
from figures.tables import read_table, write_table
from kfacerr.files import write_text
from kfacerr.metrics import METRICS
from kfacerr.plot import METRIC_LABELS, plain

__all__ = ["correlations", "curves_figure", "render", "scatter_figure", "summary"]

RIVAL = "AdamW"
"""Whose final loss and whole time the others are held to."""

RESAMPLES = 4999
_KEYS = ["task", "optimizer"]
_STYLES = {
    **STYLES,
    "Muon": ("#8C564B", "-."),
    "SOAP": ("#56B4E9", "-."),
    "Shampoo": ("#6A3D9A", ":"),
    "N-KFAC": ("#0072B2", "--"),
    "W-KFAC": ("#D55E00", ":"),
}
_MARKERS = {"N-KFAC": "^", "W-KFAC": "x"}  # of the colours of R- and B-KFAC


def render(run: Path) -> None:
    """Writes tasks and correlations (Markdown, CSV), curves and scatter (PDF, PNG) into `run`.

    Raises:
        InputError: `run` lacks trials.csv, or a table is not what such a study writes.
    """
    columns = ("task", "optimizer", "lr", "seed", "stage", "epoch", "train_loss", "test_loss")
    trials = read_table(run / "trials.csv", columns, bound=math.inf)
    timing = errors = None
    if is_there(run, "timing.csv"):
        timing = read_table(run / "timing.csv", ("task", "optimizer", "round", "steps", "ms_per_step"))
    if is_there(run, "errors.csv"):
        errors = read_table(
            run / "errors.csv",
            ("task", "optimizer", "lr", "seed", "metric", "mean", "train_loss"),
            rows=False,
            bound=math.inf,
        )
    table = summary(trials, timing)
    write_text(run / "tasks.csv", table.to_csv(index=False, float_format="%.5g"))
    write_text(run / "tasks.md", _markdown(table))
    finals = trials[trials.stage == "final"]
    if len(finals):
        save_both(curves_figure(finals, _seconds(timing)), run / "curves")
    if errors is not None and len(errors):
        write_table(correlations(errors, finals), run / "correlations", ".2g")
        save_both(scatter_figure(errors), run / "scatter")


# --------------------------------------------------------------------------------------------------- tables


def summary(trials: pd.DataFrame, timing: pd.DataFrame | None = None) -> pd.DataFrame:
    """A row an optimizer and task, the least training loss of each task first.

    Args:
        trials: of trials.csv, with `test_accuracy`.
        timing: of timing.csv, if there is one.

    Returns:
        task, optimizer, rates (tried), lr (chosen), edge (whether no rate beyond it was tried), seeds; train_loss
        (median), train_low, train_high, test_loss and test_accuracy (medians) after the last epoch; and where
        there are times, ms_per_step (median), seconds (of the whole run), loss_in_time (training loss after the
        last epoch that ends within AdamW's whole run) and seconds_to (until AdamW's final training loss).
    """
    seconds = _seconds(timing)
    rows = []
    for (task, name), group in trials.groupby(_KEYS, sort=False):
        tune, final = group[group.stage == "tune"], group[group.stage == "final"]
        if final.empty:
            continue
        last = final[final.epoch == final.groupby("seed").epoch.transform("max")]
        lr, rates = final.lr.iloc[0], sorted(tune.lr.unique())
        row: dict[str, Any] = {
            "task": task,
            "optimizer": name,
            "rates": len(rates),
            "lr": lr,
            "edge": lr in (rates[0], rates[-1]),
            "seeds": final.seed.nunique(),
            "train_loss": last.train_loss.median(),
            "train_low": last.train_loss.min(),
            "train_high": last.train_loss.max(),
            "test_loss": last.test_loss.median(),
            "test_accuracy": last.test_accuracy.median(),
        }
        rows.append(row | _in_time(trials, (str(task), str(name)), seconds))
    table = pd.DataFrame(rows)
    order = {task: i for i, task in enumerate(trials.task.unique())}
    if table.empty:
        return table
    place = table.task.map(order)
    return (
        table.assign(place=place).sort_values(["place", "train_loss"]).drop(columns="place").reset_index(drop=True)
    )


def _seconds(timing: pd.DataFrame | None) -> dict[tuple[str, str], tuple[float, int]]:
    """Milliseconds a step, median over the rounds, and steps of a run, by task and optimizer."""
    if timing is None:
        return {}
    return {key: (group.ms_per_step.median(), group.steps.iloc[0]) for key, group in timing.groupby(_KEYS)}  # type: ignore[misc]


def _curve(trials: pd.DataFrame, key: tuple[str, str]) -> pd.Series:
    """Median training loss of the final runs by epoch; a run that has diverged stays at Inf."""
    task, name = key
    own = trials[(trials.task == task) & (trials.optimizer == name) & (trials.stage == "final")]
    return own.pivot(index="epoch", columns="seed", values="train_loss").fillna(math.inf).median(axis=1)


def _in_time(
    trials: pd.DataFrame, key: tuple[str, str], seconds: dict[tuple[str, str], tuple[float, int]]
) -> dict[str, float]:
    """The columns of `summary` that times are needed for."""
    task, _ = key
    if key not in seconds:
        return {}
    (ms, steps), curve = seconds[key], _curve(trials, key)
    epochs = trials[trials.task == task].epoch.max()
    total = ms * steps / 1e3
    ends = curve.index.to_numpy() * total / epochs
    told = {"ms_per_step": ms, "seconds": total}
    rival = (task, RIVAL)
    if rival not in seconds:
        return told
    within = curve[ends <= math.prod(seconds[rival]) / 1e3 * (1 + 1e-9)]
    reached = ends[(curve <= _curve(trials, rival).iloc[-1]).to_numpy()]
    return told | {
        "loss_in_time": within.iloc[-1] if len(within) else math.nan,
        "seconds_to": reached[0] if len(reached) else math.nan,
    }


_TITLES = {
    "optimizer": "optimizer",
    "rates": "rates tried",
    "lr": "lr",
    "train_loss": "train loss",
    "train_low": "least",
    "train_high": "greatest",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "ms_per_step": "ms a step",
    "seconds": "s a run",
    "loss_in_time": f"train loss in {RIVAL}'s time",
    "seconds_to": f"s to {RIVAL}'s train loss",
}


def _markdown(table: pd.DataFrame) -> str:
    """A table a task."""
    parts = ["Medians over the seeds; `*`: the best rate is the last tried in its direction.\n"]
    for task, group in table.groupby("task", sort=False):
        shown = group.assign(
            lr=[f"{lr:g}{'*' if edge else ''}" for lr, edge in zip(group.lr, group.edge, strict=True)]
        )
        shown = shown[[name for name in _TITLES if name in shown]].dropna(axis=1, how="all")
        text = shown.rename(columns=_TITLES).to_markdown(index=False, floatfmt=".3g", missingval="-")
        count = group.seeds.max()
        parts.append(f"## {task}, {count} seed{'' if count == 1 else 's'}\n\n{text}\n")
    return "\n".join(parts)


def correlations(errors: pd.DataFrame, finals: pd.DataFrame) -> pd.DataFrame:
    """How the error of the inverse goes with the final training loss, within each task.

    Runs that are the same to the bit, where algorithms without room gave way to the same one, count once.

    Args:
        errors: of errors.csv: the mean of each metric along a run, and the run's final training loss.
        finals: rows of trials.csv of the stage "final", which say the best rates.

    Returns:
        task, metric, runs ("all", at whatever rate, or "best rate" alone), n, spearman, and p: two-sided, by
        permutation of the losses. Runs of one optimizer are alike, so p is smaller than it would be of as many
        optimizers.
    """
    chosen = set(finals[[*_KEYS, "lr"]].drop_duplicates().itertuples(index=False, name=None))
    at_best = pd.Series([key in chosen for key in zip(errors.task, errors.optimizer, errors.lr, strict=True)])
    alike = ["task", "lr", "seed", "metric", "mean", "train_loss"]
    rows = []
    for runs, part in (("all", errors), ("best rate", errors[at_best.to_numpy()])):
        for (task, metric), group in part.drop_duplicates(alike).groupby(["task", "metric"], sort=False):
            finite = group[np.isfinite(group["mean"]) & np.isfinite(group.train_loss)]
            rows.append((task, metric, runs, len(finite), *_spearman(finite["mean"], finite.train_loss)))
    return pd.DataFrame(rows, columns=["task", "metric", "runs", "n", "spearman", "p"])


def _spearman(x: pd.Series, y: pd.Series) -> tuple[float, float]:
    """The rank correlation, and its p-value by permutation; NaN of fewer than four pairs, or of a constant."""
    if len(x) < 4 or x.nunique() == 1 or y.nunique() == 1:
        return math.nan, math.nan
    a, b = x.rank().to_numpy(), y.rank().to_numpy()  # permuting y permutes its ranks
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    test = permutation_test(
        (b,),
        lambda b, axis: np.mean(a * b, axis=axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(spearmanr(x, y).statistic), float(test.pvalue)


# -------------------------------------------------------------------------------------------------- figures


def curves_figure(finals: pd.DataFrame, seconds: dict[tuple[str, str], tuple[float, int]]) -> Figure:
    """Training loss against epochs, and against time where it was taken; a column a task, medians over seeds."""
    tasks = list(finals.task.unique())
    rows = 2 if seconds else 1
    figure = Figure(figsize=(2.2 * len(tasks) + 0.6, 2.1 * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, len(tasks), squeeze=False)
    names = list(finals.optimizer.unique())
    for column, task in enumerate(tasks):
        epochs = finals[finals.task == task].epoch.max()
        for name in names:
            colour, line = _STYLES.get(name, OTHER)
            if not len(curve := _curve(finals, (task, name)).replace(math.inf, np.nan)):
                continue
            xs = [curve.index.to_numpy()]
            if (task, name) in seconds:
                xs.append(xs[0] * math.prod(seconds[task, name]) / 1e3 / epochs)
            for ax, x in zip(axes[:, column], xs, strict=False):
                ax.plot(x, curve, color=colour, linestyle=line, linewidth=1.0)
        axes[0, column].set_title(task, fontsize=8)
        for ax, label in zip(axes[:, column], ("epochs", "time (s)"), strict=False):
            _dress(ax, label)
    for ax in axes[:, 0]:
        ax.set_ylabel("train loss", fontsize=8)
    _legend(figure, names)
    return figure


def scatter_figure(errors: pd.DataFrame) -> Figure:
    """Final training loss against the mean of each metric: a row a task, a point a run."""
    tasks = list(errors.task.unique())
    figure = Figure(figsize=(8.6, 2.0 * len(tasks) + 0.8), layout="constrained")
    axes = figure.subplots(len(tasks), len(METRICS), squeeze=False, sharey="row")
    for row, task in enumerate(tasks):
        for ax, metric in zip(axes[row], METRICS, strict=True):
            part = errors[(errors.task == task) & (errors.metric == metric)]
            for name, group in part.groupby("optimizer", sort=False):
                colour, marker = _STYLES.get(str(name), OTHER)[0], _MARKERS.get(str(name), ".")
                size = 4 if marker == "." else 2.5
                ax.plot(group["mean"], group.train_loss, marker, color=colour, markersize=size)
            _dress(ax, METRIC_LABELS[metric] if row == len(tasks) - 1 else "")
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
        axes[row, 0].set_ylabel(f"{task}\ntrain loss", fontsize=8)
    _legend(figure, list(errors.optimizer.unique()), joined=False)
    return figure


def _dress(ax: Any, label: str) -> None:
    ax.set_yscale("log")
    ax.set_xlabel(label, fontsize=8)
    ax.tick_params(labelsize=7, which="both")
    ax.grid(True, linewidth=0.3, alpha=0.6)


def _legend(figure: Figure, names: list[str], *, joined: bool = True) -> None:
    handles = []
    for name in names:
        colour, line = _STYLES.get(name, OTHER)
        style: Any = line if joined else ""
        marker = "" if joined else _MARKERS.get(name, ".")
        handles.append(
            Line2D([], [], color=colour, linestyle=style, marker=marker, linewidth=1.0, label=plain(name))
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=7, frameon=False)
