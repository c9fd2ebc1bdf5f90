"""From the ekfac.csv of `studies.ekfac` to its table and its figure."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures.render import save_both
from figures.tables import read_table
from kfacerr.files import write_text

__all__ = ["KEYS", "LINKS", "figure", "means", "render", "report"]

LINKS = ("staleness", "truncation", "damping", "eigenvalues", "Kronecker")
"""Between an algorithm's step and the natural gradient, in their order."""

KEYS = ["recording", "epoch", "algorithm", "link", "norm", "share", "angle"]

LOOKS = dict(zip(LINKS, ("#CC79A7", "#D55E00", "#999999", "#56B4E9", "#0072B2"), strict=True))


def render(run: Path) -> None:
    """Writes ekfac.md, ekfac.pdf and ekfac.png into `run`.

    Raises:
        InputError: `run` has no ekfac.csv, or it is no such table.
    """
    split = means(read_table(run / "ekfac.csv", tuple(KEYS)))
    write_text(run / "ekfac.md", report(split))
    save_both(figure(split), run / "ekfac")


def means(split: pd.DataFrame) -> pd.DataFrame:
    """Over the recordings."""
    return (
        split.groupby(["epoch", "algorithm", "link"], sort=False)[["norm", "share", "angle"]].mean().reset_index()
    )


def report(split: pd.DataFrame) -> str:
    """ekfac.md: each difference's norm over the natural gradient's, its share of the whole in brackets."""
    rows = []
    left: list[tuple[str, ...]] = []
    for (epoch, algorithm), part in split.groupby(["epoch", "algorithm"], sort=False):
        by = part.set_index("link")
        cells = [f"{by.norm[link]:.2g} ({by.share[link]:.0%})" for link in LINKS]
        rows.append((algorithm, str(epoch), *cells, f"{by.norm['total']:.2g}", f"{by.angle['total']:.2g}"))
        if not left or left[-1][0] != str(epoch):
            left.append((str(epoch), *(f"{by.angle[link]:.2g}" for link in LINKS[2:])))
    columns = ["algorithm", "epoch", *LINKS, "total", "angle"]
    listed = pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)
    return (
        f"# Where the error of a step comes from\n\n{listed}\n\n"
        "Norms of differences over the natural gradient's, means over windows; in brackets their shares "
        "<d, S - S*>/|S - S*|^2 of the whole, which add up to 1. angle: 1 - cos of the step and the natural "
        "gradient; of the others it is\n\n"
        + pd.DataFrame(left, columns=["epoch", "K-FAC", "with one damping", "EKFAC"]).to_markdown(
            index=False, disable_numparse=True
        )
        + "\n"
    )


def figure(split: pd.DataFrame) -> Figure:
    """A row an epoch: norms of the differences and of the whole on the left, the shares stacked on the right."""
    epochs = list(dict.fromkeys(split.epoch))
    names = list(dict.fromkeys(split.algorithm))
    drawing = Figure(figsize=(9.5, 0.9 + len(epochs) * (0.6 + 0.3 * len(names))), layout="constrained")
    for (left, right), epoch in zip(drawing.subplots(len(epochs), 2, squeeze=False), epochs, strict=True):
        wide = split[split.epoch == epoch].pivot(index="algorithm", columns="link").loc[names]
        y = np.arange(len(names))
        for i, link in enumerate(LINKS):
            left.barh(y - 0.26 + 0.13 * i, wide["norm"][link], 0.12, color=LOOKS[link], label=link)
        left.plot(wide["norm"]["total"], y, "k|", markersize=16, label="all together")
        for sign in (1, -1):  # what makes up for others goes to the left of 0
            start = np.zeros(len(names))
            for link in LINKS:
                part = np.maximum(sign * wide["share"][link].to_numpy(), 0)
                right.barh(y, sign * part, 0.7, left=sign * start, color=LOOKS[link])
                start += part
        left.set_xscale("log")
        left.set_yticks(y, names, fontsize=7)
        left.set_ylabel(f"epoch {epoch}", fontsize=8)
        right.set_yticks(y, [""] * len(names))
        right.axvline(0, color="black", linewidth=0.6)
        for ax in (left, right):
            ax.invert_yaxis()
            ax.tick_params(axis="x", labelsize=7)
            ax.grid(True, axis="x", linewidth=0.3, alpha=0.5)
            ax.set_axisbelow(True)
    left.set_xlabel("norm of the difference over the natural gradient's", fontsize=7)
    right.set_xlabel("share of the whole error", fontsize=7)
    handles, labels = left.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    drawing.suptitle("from an algorithm's step to the natural gradient", fontsize=9)
    return drawing
