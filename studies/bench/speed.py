"""How fast the core is, against its own floor and against what it replaces; all in one run, as ratios.

    python -m studies.bench.speed [--quick] [--tasks update ...] [--d 1024 2048 ...] [--device cpu] --out DIR

`studies.bench.tasks` says what is timed, `studies.bench.rounds` how. What NumPy's BLAS does, whose threads would
stall torch's, has its rounds after those of the rest. What is slow runs in fewer rounds, and on a CPU not at the
largest d. An exponent is the slope of log(shortest time) over the largest sizes. Beside what has known flops
stands its rate as a share of a large square product's; what is not a product has no reason to come near that.

Peak memory is what one run adds to the process's resident set, its result included (Linux), or the CUDA
allocator's. The accuracy of the Brand update stands beside its speed: after many float32 updates, against the same
process in float64, on decaying columns and with a large mean. On a GPU --library cupy takes CuPy in torch's place.

Writes times.csv, ratios.csv, exponents.csv, memory.csv, accuracy.csv, speed.md, speed.pdf and .png, and
environment.json, after every size anew.
"""

import argparse
import contextlib
import gc
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from kfacerr.command import Parser, check_at_least, run
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from kfacerr.processes import Brand
from studies.bench import rounds, tasks
from studies.bench.tasks import BRAND, FLOOR, GEMM, NAIVE, OURS, QR, STUDY, UP_TO, UPDATE, Place, Ways
from studies.bench.yardsticks import RHO, TextbookProcess, columns
from studies.environment import hardware, select_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["main"]

EXPECTED = {BRAND: 1, QR: 1, tasks.LINEAR: 1, tasks.RSVD: 2, tasks.SVD_LOWRANK: 2, tasks.ALGORITHM_1: 2} | {
    **{tasks.EVD: 3, tasks.DENSE: 3}
}
"""The paper's exponents of d (§3.1, §5)."""

GOALS = (
    ("Brand update / GEMM floor, at most", UPDATE, BRAND, FLOOR, {16384: 1.3, 2048: 2.5}),
    ("QR form / Brand update, at least", UPDATE, QR, BRAND, {16384: 3.0, 2048: 2.0}),
    ("dense eigh evaluation / study step, at least", STUDY, NAIVE, OURS, {2048: 10.0}),
)
"""Design §9's: of the first way's time over the second's, at some d."""

TIMES = ["task", "d", "way", "round", "part", "seconds"]
FULL = {
    "d": [2**k for k in range(10, 16)],
    "study_d": 2048,
    "rank": 220,
    "columns": 256,
    "rounds": 15,
    "updates": 100,
}
QUICK = {"d": [64, 96, 128], "study_d": 64, "rank": 8, "columns": 12, "rounds": 2, "updates": 10}


# ---------------------------------------------------------------------------------------------------- measuring


def measure(
    ways: Ways, d: int, n: int, rng: np.random.Generator, device: torch.device, count: int, budget: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Times: way, round, part, seconds, load, note; and peak memory: way, MiB."""
    memory: list[tuple[str, float]] = []
    frames = []

    def fresh(round: int) -> np.ndarray:
        return columns(d, n, rng)

    for own in (False, True):
        pool = {name: way.prepare for name, way in ways.items() if (name in tasks.OWN_THREADS) == own}
        X = fresh(-1)
        for name, prepare in pool.items():  # which also warms up
            with contextlib.suppress(torch.OutOfMemoryError, MemoryError):  # the rounds say so
                memory.append((name, max(rounds.peak(one, device) for _, one in prepare(X))))
        frames.append(rounds.in_turns(pool, count, device, fresh=fresh, warm_up=0, budget=budget))
    return pd.concat(frames, ignore_index=True), pd.DataFrame(memory, columns=["way", "MiB"])


def accuracy(d: int, r: int, n: int, updates: int, seed: int) -> pd.DataFrame:
    """Columns columns, way, updates, orthonormality max|U^T U - I|, error ||M_B - M_B(float64)||_F / ||.||_F."""
    rows = []
    for kind, mean in (("decaying", 0.0), ("large mean", 30.0)):
        rng = np.random.default_rng(seed)
        gram, textbook, exact = Brand(rank=r, rho=RHO), TextbookProcess(r), TextbookProcess(r)
        for k in range(updates):
            X = torch.from_numpy(columns(d, n, rng, mean))
            gram.update(k, X, None)
            textbook.update(X)
            exact.update(X.double())
        assert gram.estimate is not None and exact.U is not None and exact.D is not None
        low = gram.estimate.lowrank
        M = (exact.U * exact.D) @ exact.U.T
        for way, U, D in ((BRAND, low.U, low.D), (QR, textbook.U, textbook.D)):
            assert U is not None and D is not None
            V = U.double()
            W = V[:, D > 0]
            defect = float((W.T @ W - torch.eye(W.shape[1], dtype=W.dtype)).abs().max())
            error = float(torch.linalg.norm((V * D.double()) @ V.T - M) / torch.linalg.norm(M))
            rows.append((kind, way, d, updates, defect, error))
    return pd.DataFrame(rows, columns=["columns", "way", "d", "updates", "orthonormality", "error"])


# ------------------------------------------------------------------------------------------------------ results


def compared(times: pd.DataFrame) -> pd.DataFrame:
    """`rounds.ratios` by task and d, with Tflop/s and the share of the fastest product's rate."""
    whole = (
        times.groupby(["task", "d", "way", "round"], sort=False)
        .seconds.sum(min_count=1)
        .reset_index()
        .assign(part="")
    )
    several = times.groupby(["task", "d"]).part.transform("nunique") > 1
    table = rounds.ratios(pd.concat([whole, times[several]], ignore_index=True)[TIMES], tasks.BASES)
    flops = times.groupby(["task", "d", "way"]).flops.first()
    table["tflops"] = [
        flops[key] / 1e12 for key in zip(table.task, table.d, table.way, strict=True)
    ] / table.seconds
    table.loc[(table.tflops == 0) | (table.part != ""), "tflops"] = float("nan")
    return table.assign(of_gemm=table.tflops / table.tflops[table.way == GEMM].max())


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
        "of GEMM's rate": [f"{x:.1%}" if x == x else "" for x in shown.of_gemm],
        "peak MiB": [f"{x:.0f}" if x == x else "" for x in shown.MiB],
    }
    load = f"Load of the machine meanwhile (1 is ours, about): {times.load.min():.1f} to {times.load.max():.1f}."
    parts = [f"# Speed\n\n{title}.\n{load}\n"]
    for heading, frame, form in (
        ("Goals (design §9)", goals(times), ".3g"),
        ("Times", pd.DataFrame(columns), ""),
        ("Growth with d", tables["exponents"], ".2f"),
        ("Accuracy of the Brand update in float32 (design §7: 1e-4)", tables["accuracy"], ".2g"),
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
    parser.add_argument("--d", type=int, nargs="+", help="sizes (default: 1024 ... 32768)")
    parser.add_argument("--study-d", type=int, metavar="D", help="size of the study's step (default: 2048)")
    parser.add_argument("--rank", type=int, metavar="R", help="truncation rank (default: 220)")
    parser.add_argument("--columns", type=int, metavar="N", help="columns of an update (default: 256)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds (default: 15)")
    parser.add_argument("--updates", type=int, metavar="N", help="of the accuracy test (default: 100)")
    parser.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds of one way at one size")
    parser.add_argument(
        "--largest-dense", type=int, default=8192, metavar="D", help="of what forms (d, d) matrices"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--library", choices=("torch", "cupy"), default="torch")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return run("speed", parser, _run, argv)


def _place(arguments: argparse.Namespace) -> Place:
    device = select_device(arguments.device)
    if arguments.library == "torch":
        return Place(lambda x: torch.from_numpy(x).to(device), device, True)
    try:
        import cupy
    except ImportError as error:
        raise InputError(f"--library cupy: {error}: pip install 'kfacerr[cuda]'") from None
    return Place(cupy.asarray, device, False)


def _run(arguments: argparse.Namespace) -> None:
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    r, n = arguments.rank, arguments.columns
    check_at_least(rank=(r, 1), columns=(n, r), rounds=(arguments.rounds, 1), updates=(arguments.updates, 2))
    if small := [d for d in (*arguments.d, arguments.study_d) if d <= r + n]:
        raise InputError(f"Brand's update needs d > r + n = {r + n}, got {small[0]}")
    place = _place(arguments)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    exact = accuracy(max(arguments.study_d, r + n + 1), r, n, arguments.updates, 0)
    sizes = {tasks.STUDY: [arguments.study_d], tasks.RATES: [max(arguments.d)]}
    torch_only = {tasks.LAYER, tasks.STUDY}
    times, memory = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of scikit-learn, on columns it centres to zero
        for task in arguments.tasks:
            for d in sizes.get(task, arguments.d) if place.torch or task not in torch_only else ():
                ways: Ways = tasks.TASKS[task](d, r, n, place, rng, dense=d <= arguments.largest_dense)
                if place.device.type == "cpu":
                    ways = {way: ways[way] for way in ways if d <= UP_TO.get(way, d)}
                taken, peaks = measure(ways, d, n, rng, place.device, arguments.rounds, arguments.budget)
                flops = [ways[way].flops for way in taken.way]
                times.append(taken.assign(task=task, d=d, flops=flops))
                memory.append(peaks.assign(task=task, d=d))
                print(f"{task}, d = {d}: load {taken.load.mean():.1f}", flush=True)
                _write(arguments, place.device, pd.concat(times), pd.concat(memory), exact)
                del ways
                gc.collect()
    print(f"speed: results are in {arguments.out}", file=sys.stderr)


def _write(
    arguments: argparse.Namespace,
    device: torch.device,
    times: pd.DataFrame,
    memory: pd.DataFrame,
    exact: pd.DataFrame,
) -> None:
    from kfacerr.plot import save

    table = compared(times)
    tables = {"times": times, "ratios": table, "exponents": exponents(table[table.part == ""])}
    tables |= {"memory": memory, "accuracy": exact}
    about: dict[str, Any] = rounds.write(arguments.out, tables)
    title = (
        f"r = {arguments.rank}, n = {arguments.columns}, float32, {arguments.library}; {hardware(about, device)}"
    )
    write_text(arguments.out / "speed.md", report(tables, title))
    drawing = figure(table, tables["exponents"], title)
    for kind in ("pdf", "png"):
        save(drawing, arguments.out / f"speed.{kind}")


if __name__ == "__main__":
    sys.exit(main())
