"""How fast the core is, against its own floor and against what it replaces; all in one run, as ratios.

    python -m studies.bench.speed [--quick] [--tasks update ...] [--d 1024 2048 ...] [--device cpu] --out DIR

`studies.bench.tasks` says what is timed, `studies.bench.rounds` how. What NumPy's BLAS does, whose threads would
stall torch's, has its rounds after those of the rest. What is slow runs in fewer rounds, and on a CPU not at the
largest d. An exponent is the slope of log(shortest time) over the largest sizes. Peak memory is what one run adds
to the process's resident set, its result included (Linux), or the CUDA allocator's.

Writes times.csv, ratios.csv, exponents.csv, memory.csv, speed.md, speed.pdf and .png, and environment.json, after
every size anew.
"""

import argparse
import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kfacerr.command import Parser, check_at_least, path, run, say
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from studies.bench import rounds, tasks
from studies.bench.tasks import BRAND, FLOOR, NAIVE, OURS, QR, STUDY, UP_TO, UPDATE, Draw, Ways
from studies.bench.yardsticks import columns
from studies.environment import hardware, select_device
from studies.jobs import alone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["main"]

EXPECTED = {
    **dict.fromkeys((BRAND, QR, tasks.SKETCH, tasks.LINEAR), 1),
    **dict.fromkeys((tasks.RSVD, tasks.SVD_LOWRANK, tasks.ALGORITHM_1), 2),
    **dict.fromkeys((tasks.EVD, tasks.DENSE), 3),
}
"""The paper's exponents of d (§3.1, §5)."""

GOALS = (
    ("Brand update / GEMM floor, at most", UPDATE, BRAND, FLOOR, {16384: 1.3, 2048: 2.5}),
    ("QR form / Brand update, at least", UPDATE, QR, BRAND, {16384: 3.0, 2048: 2.0}),
    ("dense eigh evaluation / study step, at least", STUDY, NAIVE, OURS, {2048: 10.0}),
)
"""Design §9's: of the first way's time over the second's, at some d."""

TIMES = ["task", "d", "way", "round", "part", "seconds"]
SIZES = {task: [2**k for k in range(10, 18 if task == UPDATE else 16)] for task in tasks.TASKS}
"""d by task, but for the study's; updates go up to the layers of a large language model."""
FULL = {"study_d": 2048, "rank": 220, "columns": 256, "rounds": 15}
QUICK = {"d": [64, 96, 128], "study_d": 64, "rank": 8, "columns": 12, "rounds": 2}


# ---------------------------------------------------------------------------------------------------- measuring


def measure(
    ways: Ways, fresh: Callable[[int], Tensor], device: torch.device, count: int, budget: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Times: way, round, part, seconds, load, note; and peak memory: way, MiB."""
    memory: list[tuple[str, float]] = []
    frames = []
    for own in (False, True):
        pool = {name: way for name, way in ways.items() if (name in tasks.OWN_THREADS) == own}
        X = fresh(-1)
        for name, prepare in pool.items():  # which also warms up
            with contextlib.suppress(torch.OutOfMemoryError, MemoryError):  # the rounds say so
                memory.append((name, max(rounds.peak(one, device) for _, one in prepare(X))))
        frames.append(rounds.in_turns(pool, count, device, fresh=fresh, warm_up=0, budget=budget))
    return pd.concat(frames, ignore_index=True), pd.DataFrame(memory, columns=["way", "MiB"])


# ------------------------------------------------------------------------------------------------------ results


def compared(times: pd.DataFrame) -> pd.DataFrame:
    """`rounds.ratios` by task and d, of whole steps and, where a step has several, of parts."""
    whole = times.groupby(["task", "d", "way", "round"], sort=False).seconds.sum(min_count=1)
    several = times.groupby(["task", "d"]).part.transform("nunique") > 1
    everything = pd.concat([whole.reset_index().assign(part=""), times[several]], ignore_index=True)
    return rounds.ratios(everything[TIMES], tasks.BASES)


def exponents(table: pd.DataFrame, points: int = 3) -> pd.DataFrame:
    """Slopes of log(seconds) against log(d) over the largest `points` sizes of each way."""
    rows = []
    for way, expected in EXPECTED.items():
        part = table[table.way == way].nlargest(points, "d").sort_values("d")
        if len(part) >= 2:
            slope = float(np.polyfit(np.log(part.d), np.log(part.seconds), 1)[0])
            rows.append((way, expected, slope, " ".join(str(d) for d in part.d)))
    return pd.DataFrame(rows, columns=["way", "expected", "exponent", "fitted over d"])


def goals(times: pd.DataFrame) -> pd.DataFrame:
    """Design §9's goals beside the numbers, where their sizes were measured."""
    rows = []
    for what, task, way, over, bounds in GOALS:
        for d, bound in bounds.items():
            part = times.loc[(times.task == task) & (times.d == d) & times.way.isin([way, over]), TIMES]
            if part.way.nunique() < 2:
                continue
            row = rounds.ratios(part, {way: over, over: over}).set_index("way").loc[way]
            met = [v <= bound if what.endswith("most") else v >= bound for v in (row.ratio, row.shortest)]
            values = (row.ratio, row.low, row.high, row.shortest)
            rows.append((what, d, bound, *values, *("yes" if m else "no" for m in met)))
    names = ["goal", "d", "bound", "ratio", "low", "high", "shortest", "met", "met by the shortest"]
    return pd.DataFrame(rows, columns=names)


def figure(table: pd.DataFrame, slopes: pd.DataFrame, title: str) -> "Figure":
    """Shortest seconds against d, one panel a task that has several sizes."""
    from matplotlib.figure import Figure

    table = table[table.part == ""]
    shown = [task for task, part in table.groupby("task", sort=False) if part.d.nunique() > 1]
    drawing = Figure(figsize=(4.5 * max(len(shown), 1), 5.2), layout="constrained")
    fitted = dict(zip(slopes.way, slopes.exponent, strict=True))
    for axes, task in zip(
        drawing.subplots(1, len(shown), sharey=True, squeeze=False)[0] if shown else (), shown, strict=True
    ):
        for i, (way, part) in enumerate(table[table.task == task].groupby("way", sort=False)):
            label = f"{way}: $d^{{{fitted[way]:.2f}}}$" if way in fitted else str(way)
            line = ("-", "--", ":")[i % 3]
            axes.loglog(part.d, part.seconds, line, color=f"C{i}", marker="o", markersize=3, label=label)
        axes.set_xlabel("d")
        axes.set_title(task, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)  # over no curve
    if shown:
        drawing.axes[0].set_ylabel("seconds, shortest")
    drawing.suptitle(title, fontsize=9)
    return drawing


def report(tables: dict[str, pd.DataFrame], title: str) -> str:
    """speed.md."""
    times, table = tables["times"], tables["ratios"]
    shown = table.merge(tables["memory"], on=["task", "d", "way"], how="left")
    columns = {
        "task": shown.task,
        "d": shown.d,
        "way": shown.way + [f", {part}" if part else "" for part in shown.part],
        "ms": [f"{1e3 * s:.4g}" for s in shown.seconds],
        "against": shown.base,
        "ratio": [f"{x.ratio:.2f} ({x.low:.2f}-{x.high:.2f})" for x in shown.itertuples()],
        "of the shortest": [f"{x:.2f}" for x in shown.shortest],
        "rounds": shown.rounds,
        "peak MiB": [f"{x:.0f}" if x == x else "" for x in shown.MiB],
    }
    load = f"Load of the machine meanwhile (1 is ours, about): {times.load.min():.1f} to {times.load.max():.1f}."
    parts = [f"# Speed\n\n{title}.\n{load}\n"]
    for heading, frame, form in (
        ("Goals (design §9)", goals(times), ".3g"),
        ("Times", pd.DataFrame(columns), ""),
        ("Growth with d", tables["exponents"], ".2f"),
        ("Not run", times[times.note != ""][["task", "d", "way", "note"]], ""),
    ):
        if len(frame):
            text = frame.to_markdown(index=False, floatfmt=form, disable_numparse=not form)
            parts.append(f"## {heading}\n\n{text}")
    parts.append(
        "ms: the shortest time. ratio: median and, in brackets, quartiles of ratios within a round; then the "
        "ratio of the shortest times. Not run beyond these d on a CPU, where only the exponents extrapolate: "
        f"{', '.join(f'{w} {d}' for w, d in UP_TO.items())}."
    )
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.bench.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a miniature that shows it runs")
    parser.add_argument("--tasks", nargs="+", choices=tuple(tasks.TASKS), default=list(tasks.TASKS))
    parser.add_argument("--d", type=int, nargs="+", help="sizes (default: 1024 ... 32768, of updates 131072)")
    parser.add_argument("--study-d", type=int, metavar="D", help="size of the study's step (default: 2048)")
    parser.add_argument("--rank", type=int, metavar="R", help="truncation rank (default: 220)")
    parser.add_argument("--columns", type=int, metavar="N", help="columns of an update (default: 256)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds (default: 15)")
    parser.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds of one way at one size")
    parser.add_argument(
        "--largest-dense", type=int, default=8192, metavar="D", help="of what forms (d, d) matrices"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=path, required=True, metavar="DIR")
    return run("speed", parser, alone(_run), argv)


def _run(arguments: argparse.Namespace) -> None:
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    r, n = arguments.rank, arguments.columns
    check_at_least(rank=(r, 1), columns=(n, r), rounds=(arguments.rounds, 1))
    sizes = {task: arguments.d or SIZES[task] for task in SIZES} | {STUDY: [arguments.study_d]}
    jobs = [(task, d) for task in arguments.tasks for d in sizes[task]]
    if small := [d for _, d in jobs if d <= r + n]:
        raise InputError(f"Brand's update needs d > r + n = {r + n}, got {small[0]}")
    device = select_device(arguments.device)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    times, memory = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of scikit-learn, on columns it centres to zero
        for task, d in jobs:
            ways = _ways(task, d, r, lambda rows: torch.from_numpy(columns(rows, n, rng)).to(device), arguments)
            fresh = lambda round, d=d: torch.from_numpy(columns(d, n, rng)).to(device)  # noqa: E731
            taken, peaks = measure(ways, fresh, device, arguments.rounds, arguments.budget)
            times.append(taken.assign(task=task, d=d))
            memory.append(peaks.assign(task=task, d=d))
            print(f"{task}, d = {d}: load {taken.load.mean():.1f}", flush=True)
            _write(arguments, device, pd.concat(times, ignore_index=True), pd.concat(memory))
            del ways
            gc.collect()
    say(f"speed: results are in {arguments.out}")


def _ways(task: str, d: int, r: int, draw: Draw, arguments: argparse.Namespace) -> Ways:
    """Those of a task that are within reach at this size."""
    ways: Ways = tasks.TASKS[task](d, r, draw, dense=d <= arguments.largest_dense)
    if draw(1).device.type != "cpu":
        return ways
    return {way: prepare for way, prepare in ways.items() if d <= UP_TO.get(way, d)}


def _write(arguments: argparse.Namespace, device: torch.device, times: pd.DataFrame, memory: pd.DataFrame) -> None:
    from kfacerr.plot import save

    table = compared(times)
    tables = {"times": times, "ratios": table, "exponents": exponents(table[table.part == ""]), "memory": memory}
    about = rounds.write(arguments.out, tables)
    title = f"r = {arguments.rank}, n = {arguments.columns}, float32; {hardware(about, device)}"
    write_text(arguments.out / "speed.md", report(tables, title))
    drawing = figure(table, tables["exponents"], title)
    for kind in ("pdf", "png"):
        save(drawing, arguments.out / f"speed.{kind}")


if __name__ == "__main__":
    sys.exit(main())
