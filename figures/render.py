"""From a study's CSVs to its figures and tables; reads nothing else, so that results can be rendered anywhere."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from figures.files import note, read_table, save_both
from kfacerr.files import write_text
from kfacerr.metrics import METRICS
from kfacerr.plot import METRIC_LABELS, error_figure
from kfacerr.study import by_window

__all__ = ["PAPER_TABLE_1", "render", "spectrum_figure", "table_1", "variants_figure"]

PAPER_TABLE_1 = {  # Table 1: average metrics (1)-(4) at epoch 30, and t_epoch in seconds on a V100
    "K-FAC T_inv=50": (1.51e-3, 8.42e-2, 2.69e-1, 14.4e-2, 169.0),
    "R-KFAC T_inv=50": (4.65e-3, 10.4e-2, 2.96e-1, 14.6e-2, 58.5),
    "R-KFAC T_inv=10": (4.8e-3, 4.9e-2, 0.43e-1, 0.02e-2, 71.2),
    "B-KFAC": (48.6e-3, 1.02e-2, 2.40e-1, 29.0e-2, 59.2),
    "B-KFAC-C": (11.9e-3, 1.04e-2, 1.22e-1, 0.77e-2, 59.4),
    "B-R-KFAC": (3.40e-3, 1.81e-2, 0.40e-1, 0.74e-2, 59.5),
}


COLUMNS = ("algorithm", "k", "metric", "value", "epoch", "seed")


def render(run: Path) -> None:
    """Writes Figures 1 and 2, the variants and the spectra (PDF, PNG) and Table 1 (Markdown, CSV) into `run`.

    Table 1 has a t_epoch column if `studies.timing` has left its timing.csv there.

    Raises:
        InputError: `run` has no errors.csv, or it is not a table of errors.
    """
    errors = read_table(run / "errors.csv", COLUMNS)
    drawn = note(run, errors.seed.nunique())
    save_both(error_figure(errors, METRICS[:2], title=drawn), run / "figure1")
    save_both(error_figure(errors, METRICS[2:], title=drawn), run / "figure2")
    spectra = run / "spectra.csv"
    if spectra.exists():
        save_both(
            spectrum_figure(read_table(spectra, ("seed", "epoch", "factor", "index", "eigenvalue"))),
            run / "spectra",
        )
    if (run / "variants.csv").exists() or (run / "variants.csv.gz").exists():
        variants = read_table(run / "variants.csv", (*COLUMNS, "continuation"), rows=False)
        everything = pd.concat([errors, variants], ignore_index=True)
        save_both(variants_figure(everything, note(run, errors.seed.nunique(), band=False)), run / "variants")
    table = table_1(errors)
    if (run / "timing.csv").exists():
        timing = pd.read_csv(run / "timing.csv").groupby("driver").t_epoch.agg(["mean", "std"])
        paper = table.pop("paper t_epoch (s)")
        table["t_epoch (s)"] = table.algorithm.map(timing["mean"])
        table["t_epoch SD"] = table.algorithm.map(timing["std"])
        table["paper t_epoch (s)"] = paper
    write_text(run / "table1.csv", table.to_csv(index=False, float_format="%.4g"))
    shown = table.astype(object).where(table.notna(), None)  # `missingval` is for None alone
    write_text(run / "table1.md", shown.to_markdown(index=False, floatfmt=".3g", missingval="-") + "\n")


def table_1(errors: pd.DataFrame) -> pd.DataFrame:
    """Table 1: the average of each error curve over the last window, mean and SD over seeds, the paper's beside.

    Columns: algorithm; for each metric "mean", "SD" and "paper"; "paper t_epoch (s)".
    """
    _, last = by_window(errors)[-1]
    averages = last.groupby(["algorithm", "metric", "seed"], sort=True).value.mean()
    rows = []
    for algorithm in dict.fromkeys(last.algorithm):
        paper = PAPER_TABLE_1.get(algorithm, (np.nan,) * 5)
        row: dict[str, object] = {"algorithm": algorithm}
        for number, metric in enumerate(METRICS):
            values = averages.loc[(algorithm, metric)]
            row[f"({number + 1}) mean"] = values.mean()
            row[f"({number + 1}) SD"] = values.std() if len(values) > 1 else np.nan
            row[f"({number + 1}) paper"] = paper[number]
        rows.append(row | {"paper t_epoch (s)": paper[4]})
    return pd.DataFrame(rows)


def variants_figure(errors: pd.DataFrame, title: str) -> Figure:
    """Each metric's average over the last window: a row an algorithm, a marker a spectrum continuation."""
    label, last = by_window(errors)[-1]
    averages = last.groupby(["algorithm", "metric", "continuation"]).value.mean()
    names = list(dict.fromkeys(last.algorithm))[::-1]
    figure = Figure(figsize=(6.8, 1.4 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    markers = {"min": ("o", "#0072B2"), "trace": ("s", "#D55E00"), "none": ("x", "#000000")}
    for ax, metric in zip(axes.flat, METRICS, strict=True):
        for kind, (marker, colour) in markers.items():
            known = [(averages.get((name, metric, kind)), i) for i, name in enumerate(names)]
            points = [(value, i) for value, i in known if value is not None]
            if points:
                ax.scatter(
                    *zip(*points, strict=True), marker=marker, s=14, color=colour, linewidths=1.0, label=kind
                )
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(labelsize=6.5)
        ax.grid(True, linewidth=0.3, alpha=0.6)
        ax.set_title(METRIC_LABELS[metric], fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    continuations = [f"`{label}` continuation" for label in labels]
    figure.legend(handles, continuations, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.suptitle(", ".join(filter(None, (title, label))), fontsize=8)
    return figure


def spectrum_figure(spectra: pd.DataFrame) -> Figure:
    """Eigenvalues of both EA factors at each window's start, relative to the largest: one panel a factor."""
    epochs = sorted(spectra.epoch.unique())
    figure = Figure(figsize=(6.8, 2.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for ax, factor, symbol in zip(axes, "AG", (r"$\bar\mathcal{A}$", r"$\bar\Gamma$"), strict=True):
        for colour, epoch in zip(colours, epochs, strict=False):
            part = spectra[(spectra.factor == factor) & (spectra.epoch == epoch)]
            for i, (_, one) in enumerate(part.groupby("seed")):
                relative = (one.eigenvalue / one.eigenvalue.max()).clip(lower=1e-16)
                label = f"epoch {epoch}" if i == 0 else None
                ax.loglog(one["index"] + 1, relative, color=colour, linewidth=0.9, label=label)
        ax.set_ylim(1e-10, 2)
        ax.set_title(f"spectrum of {symbol} at the window's start", fontsize=8)
        ax.set_xlabel("eigenvalue number", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(True, linewidth=0.3, alpha=0.6)
    axes[0].set_ylabel(r"$\lambda_i/\lambda_1$", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return figure
