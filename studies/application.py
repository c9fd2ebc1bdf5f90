"""One optimizer step of a single fully connected layer as d = d_A = d_G grows: Algorithm 8 against Algorithm 1.

    python -m studies.application [--d 256 512 ...] [--batch 64] [--rank 64] [--rounds 7] --out DIR

Four ways to the same kind of step, each a `KFAC` whose factors stand still, so that what is timed is a forward, a
backward (which also gives the gradient of the input, as inside a network) and `step()`:

    Algorithm 8, drop-in   a FactoredLinear: G A^T is never formed
    Algorithm 8, hooks     the backward forms G A^T, the step does not use it
    Algorithm 1            l.15-18 on G A^T with the same low-rank inverses
    K-FAC                  l.15-18 with d modes, as an EVD gives: cubic in d, and so only up to --dense-up-to

The first three take the same step. All of them write d^2 weights, so that no step as a whole is linear in d. What
Algorithm 8 saves are the products of d_G d_A m that apply low-rank inverses to G A^T and the passes over a step of
the weights' size; the drop-in saves the product of d_G d_A n and the memory that form G A^T, too. In each round
every way takes one step in turn, and ratios are of the same round.

Writes application.csv (d, way, round, part, seconds), ratios.csv, ratios.md, application.pdf and .png, and
environment.json.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kfacerr.cli import Parser
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from kfacerr.lowrank import LowRank
from kfacerr.plot import save
from kfacerr.process import EAFactor, Estimate, Process
from kfacerr.torch import KFAC, FactorInfo, factored
from studies.files import environment
from studies.running import check_at_least, command, write_csv
from studies.timing import synchronize
from studies.training import select_device

__all__ = ["WAYS", "main", "measure", "ratios"]

DROP_IN, HOOKS, ALGORITHM_1, DENSE = "Algorithm 8, drop-in", "Algorithm 8, hooks", "Algorithm 1", "K-FAC"
WAYS = (DROP_IN, HOOKS, ALGORITHM_1, DENSE)
PARTS = ("forward", "backward", "step")
_LOOKS = {
    DROP_IN: ("#009E73", "-"),
    HOOKS: ("#D55E00", "--"),
    ALGORITHM_1: ("#0072B2", "-"),
    DENSE: ("#000000", ":"),
}


class Full(Process):
    """An estimate with all d modes, as K-FAC's EVD gives; which ones does not matter to the time."""

    needs_factor = False

    def __init__(self, info: FactorInfo) -> None:
        super().__init__()

    def update(self, k: int, X: Tensor, factor: EAFactor | None) -> None:
        if self.estimate is None:
            D = torch.linspace(1, 0.1, len(X), dtype=X.dtype, device=X.device)
            self.estimate = Estimate(LowRank(torch.eye(len(X), dtype=X.dtype, device=X.device), D), D.sum())


class Bench:
    """One layer and its optimizer, with factors that are ready and stand still."""

    def __init__(self, way: str, d: int, batch: int, rank: int, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(0)
        self.layer = nn.Linear(d, d, bias=False, device=device)
        if way == DROP_IN:
            factored(self.layer)
        self.x = torch.randn(batch, d, device=device, requires_grad=True)
        self.weights = torch.randn(batch, d, device=device) / d**0.5
        self.optimizer = KFAC(
            self.layer,
            policy={"": Full if way == DENSE else f"B-KFAC rank={rank}"},
            linear_application=way == HOOKS,
            lr=1e-3,
            T_updt=lambda epoch: 10**9 if epoch else 1,
            T_brand=1,
        )
        self.optimizer.epoch = 0
        for _ in range(1 if way == DENSE else 2 + -(-rank // batch)):
            self.step()
        self.optimizer.epoch = 1
        self.step()

    def step(self) -> dict[str, float]:
        """One step; the seconds of its parts."""
        self.optimizer.zero_grad()
        self.x.grad = None
        marks = [self._now()]
        loss = (self.layer(self.x).tanh() * self.weights).sum() / len(self.x)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        return {part: end - start for part, start, end in zip(PARTS, marks, marks[1:], strict=False)}

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def measure(
    sizes: Sequence[int],
    *,
    batch: int,
    rank: int,
    rounds: int,
    dense_up_to: int,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Columns d, way, round, part, seconds."""
    rows: list[tuple[Any, ...]] = []
    for d in sizes:
        benches = {way: Bench(way, d, batch, rank, device) for way in WAYS if way != DENSE or d <= dense_up_to}
        for round in range(rounds):
            for way, bench in benches.items():
                rows += [(d, way, round, part, seconds) for part, seconds in bench.step().items()]
        say(f"d = {d}: {rounds} rounds of {len(benches)} ways")
        del bench, benches
        gc.collect()
    return pd.DataFrame(rows, columns=["d", "way", "round", "part", "seconds"])


def ratios(times: pd.DataFrame) -> pd.DataFrame:
    """Of a whole step and of `step()` alone, each way's time over the drop-in's in the same round.

    Columns d, way, what, seconds (median), ratio (median), low and high (of the ratio over the rounds).
    """
    rows = []
    for what, parts in (("whole", PARTS), ("backward", ("backward",)), ("step()", ("step",))):
        chosen = times[times.part.isin(parts)]
        for d, of_size in chosen.groupby("d", sort=False):
            seconds = of_size.pivot_table(index="round", columns="way", values="seconds", aggfunc="sum")
            for way in (way for way in WAYS if way in seconds):
                ratio = seconds[way] / seconds[DROP_IN]
                rows.append((d, way, what, seconds[way].median(), ratio.median(), ratio.min(), ratio.max()))
    return pd.DataFrame(rows, columns=["d", "way", "what", "seconds", "ratio", "low", "high"])


def figure(table: pd.DataFrame, title: str) -> Figure:
    """Seconds against d, one panel for the whole step and one for `step()`."""
    drawing = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, what in zip(drawing.subplots(1, 2), ("whole", "step()"), strict=True):
        for way, part in table[table.what == what].groupby("way", sort=False):
            colour, line = _LOOKS[str(way)]
            axes.loglog(part.d, part.seconds, line, color=colour, marker="o", markersize=3, label=way)
        axes.set_xscale("log", base=2)
        sizes = table["d"].unique()
        axes.set_xticks(sizes, [str(d) for d in sizes], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("d")
        axes.set_title("forward, backward and step" if what == "whole" else "step() alone", fontsize=9)
        axes.grid(alpha=0.3)
    drawing.axes[0].set_ylabel("seconds, median")
    drawing.axes[0].legend(fontsize=7)
    drawing.suptitle(title, fontsize=9)
    return drawing


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.application", description=__doc__.split("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="columns (default: 64)")
    parser.add_argument("--rank", type=int, default=64, metavar="R", help="truncation rank (default: 64)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps timed (default: 7)")
    parser.add_argument("--dense-up-to", type=int, default=2048, metavar="D", help="of K-FAC (default: 2048)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return command("application", parser, _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    check_at_least(batch=(arguments.batch, 1), rank=(arguments.rank, 1), rounds=(arguments.rounds, 1))
    least = arguments.rank + arguments.batch
    if small := [d for d in arguments.d if d <= least]:
        raise InputError(f"Brand's update needs d > r + n = {least}, got {small[0]}")
    times = measure(
        arguments.d,
        batch=arguments.batch,
        rank=arguments.rank,
        rounds=arguments.rounds,
        dense_up_to=arguments.dense_up_to,
        device=select_device(arguments.device),
        say=lambda text: print(text, flush=True),
    )
    table = ratios(times)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    about = environment()
    write_csv(out / "application.csv", times)
    write_csv(out / "ratios.csv", table)
    write_text(out / "environment.json", json.dumps(about, indent=2) + "\n")
    text = _readable(table).to_markdown(index=False)
    hardware = about["cuda_device"] if arguments.device != "cpu" else about["cpu"]
    title = f"n = {arguments.batch}, r = {arguments.rank}; {hardware}, {about['torch_threads']} threads"
    note = f"{title}; medians of {arguments.rounds} rounds, in brackets the range of the ratio over them."
    write_text(out / "ratios.md", f"{text}\n\n{note}\n")
    drawing = figure(table, title)
    for kind in ("pdf", "png"):
        save(drawing, out / f"application.{kind}")
    print(f"{text}\n\n{note}")
    return 0


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each part and size: milliseconds of the drop-in, and the others' ratios to it."""
    rows = []
    for what in table["what"].unique():
        for d in table["d"].unique():
            by_way = table[(table["what"] == what) & (table["d"] == d)].set_index("way")
            row: dict[str, Any] = {"what": what, "d": d, f"{DROP_IN} (ms)": f"{1e3 * by_way.seconds[DROP_IN]:.2f}"}
            for way in WAYS[1:]:
                ratio = by_way[["ratio", "low", "high"]].to_dict("index").get(way)
                row[f"{way} / drop-in"] = "{ratio:.2f} ({low:.2f}-{high:.2f})".format(**ratio) if ratio else "-"
            rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.exit(main())
