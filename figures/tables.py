"""A study's CSVs to its tables. Nothing is read but its folder, so that results can be rendered anywhere."""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kfacerr.algorithms import Algorithm, not_used
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from kfacerr.metrics import METRICS
from kfacerr.process import Settings
from kfacerr.study import by_window

__all__ = [
    "PAPER_TABLE_1",
    "PAPER_TABLE_2",
    "PAPER_T_UPDT",
    "PARTS",
    "breakdown_table",
    "epoch_times",
    "epochs_to",
    "not_used_in",
    "note",
    "paper_name",
    "read_errors",
    "read_table",
    "runs_to_targets",
    "study_config",
    "table_1",
    "table_1_markdown",
    "table_1_times",
    "table_2",
    "table_2_markdown",
    "targets_by_rule",
    "window_settings",
    "write_table",
]

_NAN = float("nan")


# --------------------------------------------------------------------------------------------- what DIR holds


def study_config(run: Path) -> dict[str, Any]:
    """config.json of a study, or nothing where it has none that can be read.

    Raises:
        InputError: what is used of it is not of the kind that a study writes.
    """
    path = run / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    for key, fits in _KINDS.items():
        if key in config and not fits(config[key]):
            raise InputError(f"{path}: {key} is not what a study writes")
    return config


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _are_windows(value: Any) -> bool:
    numbers = ("epoch", "rank", "columns")
    return isinstance(value, list) and all(
        isinstance(one, dict) and all(_is_number(one.get(n)) for n in numbers) and _are_numbers(one.get("phi"))
        for one in value
    )


_KINDS = {
    "data": _is_text,
    "setting": _is_text,
    "windows": _are_windows,
    "targets": _are_numbers,
    "T_updt": _is_number,
}
"""Of what is read of config.json."""


def note(run: Path, seeds: int, *, band: bool = True) -> str:
    """One line over a figure: the data and the setting, as config.json names them, and what is drawn."""
    config = study_config(run)
    drawn = f"mean of {seeds} seeds" + (", band: their range" if band else "") if seeds > 1 else ""
    return ", ".join(filter(None, (config.get("data", ""), config.get("setting", ""), drawn)))


def window_settings(run: Path) -> dict[int, dict[str, Any]]:
    """By the epoch of each window: its rank, its columns, and phi at its start and its end."""
    return {window["epoch"]: window for window in study_config(run).get("windows", ())}


def not_used_in(run: Path, errors: pd.DataFrame, spectra: pd.DataFrame | None) -> list[str]:
    """What `kfacerr.algorithms.not_used` says of the last window, where the folder tells r, n and the spectra d.

    Args:
        run: the study's folder.
        errors: its table.
        spectra: columns epoch, factor, index: every eigenvalue's number.

    Returns:
        A sentence for each algorithm and factor.
    """
    window = window_settings(run).get(errors.epoch.max())
    if window is None or spectra is None:
        return []
    dimensions = {str(side): int(index.max()) + 1 for side, index in spectra.groupby("factor")["index"]}
    names = dict.fromkeys(errors.algorithm)
    return not_used(names, Settings(rank=int(window["rank"])), dimensions, int(window["columns"]))


_WHOLE = ("k", "epoch", "seed", "round", "table", "index")
_TEXT = (
    "algorithm",
    "metric",
    "factor",
    "optimizer",
    "driver",
    "part",
    "recording",
    "dtype",
    "link",
    "role",
    "continuation",
    "task",
    "stage",
)


def read_table(
    path: Path, columns: tuple[str, ...], *, rows: bool = True, bound: float | None = None
) -> pd.DataFrame:
    """A study's table, or what `gzip` made of it.

    Args:
        path: the table.
        columns: that it must have.
        rows: whether it must have some.
        bound: Inf, where that may stand in it: what is said of an error of which nothing is certain.

    Returns:
        The table, with all its columns.

    Raises:
        InputError: it is missing, lacks one of `columns`, has entries of another kind, NaN or Inf in them, or is
            empty where `rows` are needed; names the file.
    """
    compressed = path.with_name(path.name + ".gz")
    if not path.exists():
        if not compressed.exists():
            raise InputError(f"{path}: no such file")
        path = compressed
    try:
        frame = pd.read_csv(path)
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise InputError(f"{path}: not readable as a table: {' '.join(str(error).split())}") from None
    missing = [name for name in columns if name not in frame]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}")
    if frame.empty and rows:
        raise InputError(f"{path}: has no rows")
    for name in columns if len(frame) else ():
        if name in _TEXT:
            if not frame[name].map(_is_text).all():
                raise InputError(f"{path}: column {name!r} is not all names")
        elif not pd.api.types.is_numeric_dtype(frame[name]):
            raise InputError(f"{path}: column {name!r} is not all numbers")
        elif (odd := ~np.isfinite(frame[name].to_numpy()) & ~(frame[name] == bound).to_numpy()).any():
            line = int(np.argmax(odd))
            raise InputError(f"{path}: column {name!r} is {frame[name][line]} in line {line + 2}")
        elif name in _WHOLE and not ((frame[name] >= 0) & (frame[name] < 2**53) & (frame[name] % 1 == 0)).all():
            raise InputError(f"{path}: column {name!r} is not all whole numbers")
    return frame


def read_errors(path: Path, *, rows: bool = True) -> pd.DataFrame:
    """A study's table of errors, in which every algorithm of a window has all four metrics; see `read_table`."""
    columns = ("algorithm", "k", "metric", "value", "epoch", "seed")
    errors = read_table(path, columns, rows=rows, bound=math.inf)
    infinite = errors[(errors.value == math.inf) & errors.metric.isin(METRICS)]
    if len(infinite):
        raise InputError(f"{path}: column 'value' is inf in line {infinite.index[0] + 2}")
    for (epoch, algorithm), part in errors.groupby(["epoch", "algorithm"]):
        if lacking := set(METRICS) - set(part.metric):
            raise InputError(f"{path}: {algorithm!r} has no {min(lacking)} at epoch {epoch}")
    return errors


def write_table(table: pd.DataFrame, stem: Path, form: str) -> None:
    """As CSV and Markdown."""
    write_text(stem.with_suffix(".csv"), table.to_csv(index=False, float_format="%.5g"))
    write_text(stem.with_suffix(".md"), table.to_markdown(index=False, floatfmt=form, missingval="-") + "\n")


# ------------------------------------------------------------------------------------------------- Table 1

PAPER_TABLE_1 = {  # Table 1: average metrics (1)-(4) at epoch 30, and t_epoch in seconds on a V100
    "K-FAC T_inv=50": (1.51e-3, 8.42e-2, 2.69e-1, 14.4e-2, 169.0),
    "R-KFAC T_inv=50": (4.65e-3, 10.4e-2, 2.96e-1, 14.6e-2, 58.5),
    "R-KFAC T_inv=10": (4.8e-3, 4.9e-2, 0.43e-1, 0.02e-2, 71.2),
    "B-KFAC": (48.6e-3, 1.02e-2, 2.40e-1, 29.0e-2, 59.2),
    "B-KFAC-C": (11.9e-3, 1.04e-2, 1.22e-1, 0.77e-2, 59.4),
    "B-R-KFAC": (3.40e-3, 1.81e-2, 0.40e-1, 0.74e-2, 59.5),
}


def table_1(errors: pd.DataFrame, timing: pd.DataFrame | None = None) -> pd.DataFrame:
    """Table 1: the average of each error curve over the last window, mean and SD over seeds, the paper's beside.

    Columns: algorithm; epoch; for each metric "mean", "SD" and "paper"; with a timing (columns driver, t_epoch)
    "t_epoch (s)" and "t_epoch SD"; "paper t_epoch (s)".
    """
    _, last = by_window(errors)[-1]
    averages = last.groupby(["algorithm", "metric", "seed"], sort=True).value.mean()
    times = None if timing is None else timing.groupby("driver").t_epoch.agg(["mean", "std"])
    rows = []
    for algorithm in dict.fromkeys(last.algorithm):
        paper = PAPER_TABLE_1.get(algorithm, (_NAN,) * 5)
        row: dict[str, object] = {"algorithm": algorithm, "epoch": last.epoch.iloc[0]}
        for number, metric in enumerate(METRICS):
            values = averages.loc[(algorithm, metric)]
            row[f"({number + 1}) mean"] = values.mean()
            row[f"({number + 1}) SD"] = values.std() if len(values) > 1 else _NAN
            row[f"({number + 1}) paper"] = paper[number]
        if times is not None:
            row["t_epoch (s)"] = times["mean"].get(algorithm, _NAN)
            row["t_epoch SD"] = times["std"].get(algorithm, _NAN)
        rows.append(row | {"paper t_epoch (s)": paper[4]})
    return pd.DataFrame(rows)


def table_1_markdown(table: pd.DataFrame, label: str, data: str, seeds: int, notes: Sequence[str] = ()) -> str:
    """Table 1 within 100 columns: two lines an algorithm, ours above the paper's, in percent; notes below."""
    rows = []
    for row in table.to_dict("records"):
        ours, paper = {"algorithm": row["algorithm"]}, {"algorithm": "- paper"}
        for number in range(1, len(METRICS) + 1):
            mean, deviation = 100 * row[f"({number}) mean"], 100 * row[f"({number}) SD"]
            ours[f"({number}) %"] = _with_deviation(mean, deviation)
            paper[f"({number}) %"] = _number(100 * row[f"({number}) paper"])
        ours["t_epoch (s)"] = _with_deviation(row.get("t_epoch (s)", _NAN), row.get("t_epoch SD", _NAN))
        paper["t_epoch (s)"] = _number(row["paper t_epoch (s)"])
        rows += [ours, paper]
    over = f", mean ± SD over {seeds} seeds" if seeds > 1 else ""
    return (
        f"Table 1 on {data or 'our data'}, {label}{over}; below each line the paper's.\n"
        "Errors (1) in the inverse of A, (2) of Gamma, (3) in the norm of the step, (4) in its angle.\n\n"
        + pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
        + "\n"
        + ("\n".join(["", *(f"- {note}" for note in notes), ""]) if notes else "")
    )


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}"


def _with_deviation(mean: float, deviation: float) -> str:
    return _number(mean) + ("" if np.isnan(deviation) else f" ± {deviation:.2g}")


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


# ------------------------------------------------------------------------------------------------- Table 2

PAPER_T_UPDT = 25
PAPER_TABLE_2 = {  # seconds to 91%, 93%, 93.5%; t_epoch; hits of 93.5% in 10; epochs to 93%. On a V100
    "SENG": (999.0, 1098.0, 1144.0, 25.4, 10, 43.1),
    "K-FAC": (2610.0, 4021.0, _NAN, 97.8, 0, 41.1),
    "R-KFAC": (920.3, 1357.0, _NAN, 47.7, 0, 28.9),
    "R-KFAC T_inv=25": (1019.0, 1526.0, 2108.0, 53.3, 6, 28.5),
    "B-KFAC": (894.0, 1325.0, 1913.0, 46.3, 10, 28.6),
    "B-KFAC-C": (911.2, 1352.3, 2031.0, 47.4, 6, 28.5),
    "B-R-KFAC": (945.9, 1324.8, 1975.0, 48.4, 8, 28.3),
}


_REFERENCE = "R-KFAC"
"""Whose times the others' are ratios to."""


def paper_name(driver: str, T_updt: int) -> str:
    """What the paper calls a driver of a run, whose periods are in proportion to its epochs.

    Its "R-KFAC T_inv=25" takes an RSVD at every update of the factors: one with T_inv = T_updt.
    """
    try:
        algorithm = Algorithm.parse(driver)
    except InputError:  # SENG, SGD, AdamW
        return driver
    return str(algorithm.with_settings(T_inv=PAPER_T_UPDT)) if algorithm.get("T_inv") == T_updt else driver


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
    alone = timing.groupby("driver").t_epoch.agg(["mean", "std"]).assign(clock="alone")
    return pd.concat([alone, jobs[~jobs.index.isin(alone.index)]]).loc[jobs.index]


def table_2(epochs: pd.DataFrame, timing: pd.DataFrame, targets: Sequence[float], T_updt: int) -> pd.DataFrame:
    """Table 2: times to the three targets, t_epoch, hits of the third, epochs to the second; the paper's beside.

    Times are epochs times t_epoch. Means and empirical standard deviations (n - 1) are over the runs that reach
    the target, as in the paper. For a quantity Q the columns are "Q", "Q SD", "Q /R-KFAC" and "Q paper/R-KFAC":
    ratios to R-KFAC's mean, since the absolute times are of other machines and networks. Rows are in the order of
    the optimizers in `epochs`.
    """
    runs, times = runs_to_targets(epochs, targets), epoch_times(epochs, timing)
    rows = []
    for name in times.index:
        own, paper = runs[runs.optimizer == name], PAPER_TABLE_2.get(paper_name(name, T_updt), (_NAN,) * 6)
        row: dict[str, Any] = {"optimizer": name, "runs": len(own)}
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
    table = pd.DataFrame(rows).set_index("optimizer")
    for column in [name for name in table if str(name).endswith("/R-KFAC")]:
        table[column] = table[column] / table[column].get(_REFERENCE, _NAN)
    return table.reset_index()


def _quantity(name: str, mean: float, deviation: float, paper: float) -> dict[str, float]:
    """The four columns of a quantity; the ratios are still to be divided by R-KFAC's."""
    return {name: mean, f"{name} SD": deviation, f"{name} /R-KFAC": mean, f"{name} paper/R-KFAC": paper}


def table_2_markdown(table: pd.DataFrame, targets: Sequence[float], data: str) -> str:
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


PARTS = ("forward/backward", "EA update", "decomposition", "application", "step", "other")


def breakdown_table(breakdown: pd.DataFrame) -> pd.DataFrame:
    """Seconds of an epoch by part, mean over rounds: a row a driver, Table 2's first."""
    keys = ["table", "driver"]
    table = breakdown.pivot_table(index=keys, columns="part", values="seconds", aggfunc="mean", sort=False)
    order = list(breakdown[keys].drop_duplicates().itertuples(index=False, name=None))
    table = table.reindex(index=order, columns=[part for part in PARTS if part in table])
    table["total"] = table.sum(axis=1)
    table = table.sort_values("table", ascending=False, kind="stable").reset_index()
    table["driver"] += table.pop("table").map({1: " (Table 1's periods)", 2: ""})
    return table.rename_axis(columns=None)
