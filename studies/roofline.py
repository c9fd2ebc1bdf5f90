"""How near the work on K-factors comes to the rate of a matrix product, and what share of a training step it is.

    python -m studies.roofline [--quick] [--d 16384] [--rank 220] [--columns 256] [--rounds 20] --out DIR

In float32 with TF32 off, through torch and, on a GPU, through CuPy: the Brand update (10) of a running process,
the EA update (8), the RSVD, the Cholesky inverse, the EVD, and the EVD of the small (r + n) matrix in float64 on
the device and on the host. Each gets its time, its flops, and their rate as a fraction of the rate of a large
square product through the same library. Then the goal of design §9: what Brand's updates of both factors and
Algorithm 8 add to a training step of the network whose first FC layer has d inputs, its updates once in
T_updt = 25 steps.

Flops are those of the algorithm, not of the program. A product of (a, b) with (b, c) has 2abc, a Cholesky inverse
d^3, a thin QR of k columns with its Q 4dk^2, and an EVD with all vectors about 9d^3. (8) counts all of X X^T, half
of which a SYRK would leave out. What is not a product has no reason to come near the rate of one.

Writes roofline.csv, roofline.md and environment.json, after every operation anew.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from kfacerr.array import cholesky_inverse, eigh_descending, namespace, to_numpy
from kfacerr.cli import Parser
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from kfacerr.inverse import damped_inverse, precondition_linear
from kfacerr.process import EAFactor
from kfacerr.rsvd import evd, rsvd
from kfacerr.stream import Array
from kfacerr.torch.precision import full_precision
from studies.data import CIFAR10_CLASSES, Dataset
from studies.files import environment
from studies.networks import scaled
from studies.running import check_at_least, command, write_csv
from studies.speed import EVD as EVD_NAME
from studies.speed import PHI, RHO, UP_TO, Run, columns, running_brand
from studies.timing import synchronize
from studies.training import Training, TrainingConfig, select_device

__all__ = ["Measured", "Operation", "main", "operations"]

PAPER_D, PAPER_HIDDEN, T_UPDT, GOAL = 16384, 2048, 25, 0.05
OVERSAMPLING, POWER = 10, 4
GEMM, BRAND, BRAND_G, APPLICATION = "GEMM", "Brand update", "Brand update of G", "Algorithm 8"
EA, RSVD, CHOLESKY, EVD = "EA update", "RSVD", "Cholesky inverse", "EVD"
SMALL, SMALL_HOST, STEP = "small EVD", "small EVD on the host", "training step (SGD)"
BUDGET = 8.0  # seconds after which the repetitions end


class Sizes(NamedTuple):
    """d_A, d_G, r and n of the layer."""

    d: int
    hidden: int
    r: int
    n: int


class Operation(NamedTuple):
    """Something to be timed.

    Attributes:
        name: as in the table.
        flops: of one run.
        make: gives what is to be run; what it holds is freed with it.
    """

    name: str
    flops: float
    make: Callable[[], Run]


class Measured(NamedTuple):
    """One line of roofline.csv; NaN where `note` says why there is no time."""

    library: str
    operation: str
    seconds: float
    rounds: int
    flops: float
    note: str = ""


def operations(sizes: Sizes, place: Callable[[np.ndarray], Array], *, dense: bool) -> Iterator[Operation]:
    """What is timed, the quick ones first.

    Args:
        sizes: of the layer.
        place: takes a host array to the library and device in question.
        dense: with the operations that are cubic in d.
    """
    d, hidden, r, n = sizes
    m, k = r + n, r + OVERSAMPLING
    rng = np.random.default_rng(0)

    def factor() -> Array:
        X = place(columns(d, 3 * n, rng))
        return X @ X.T

    def gemm() -> Run:
        side = min(8192, d)
        X = place(rng.standard_normal((side, side), dtype=np.float32))
        return lambda: X @ X

    def brand(rows: int) -> Callable[[], Run]:
        def make() -> Run:
            batches = [place(columns(rows, n, rng)) for _ in range(3)]
            process = running_brand(r, batches)
            return lambda: process.update(process.T_brand.last + 1, batches[0], None)  # type: ignore[operator]

        return make

    def application() -> Run:
        A, G = place(columns(d, n, rng)), place(columns(hidden, n, rng))
        held = [running_brand(r, [X, X]).estimate for X in (G, A)]
        of_G, of_A = (damped_inverse(x.lowrank, phi=PHI) for x in held if x is not None)
        return lambda: precondition_linear(G, A, of_G, of_A)

    def ea() -> Run:
        process, X = EAFactor(RHO), place(columns(d, n, rng))
        process.update(X)
        return lambda: process.update(X)

    def sketch() -> Run:
        M = factor()
        return lambda: rsvd(M, r, oversampling=OVERSAMPLING, n_pwr_it=POWER, rng=rng)

    def cholesky() -> Run:
        M = factor()
        return lambda: cholesky_inverse(M + namespace(M).eye(d, dtype=M.dtype, device=M.device))

    def full_evd() -> Run:
        M = factor()
        return lambda: evd(M)

    def small_matrix() -> Array:
        X = rng.standard_normal((m, 2 * m))
        return place(X @ X.T)  # in float64, as Brand's

    def small() -> Run:
        K = small_matrix()
        return lambda: eigh_descending(K)

    def small_on_host() -> Run:
        K = small_matrix()
        return lambda: [place(np.ascontiguousarray(x)) for x in eigh_descending(to_numpy(K))]  # there and back

    tall = 2 * m * (r + n)  # U^T A, A^T A, Y V_r, for each row
    yield Operation(GEMM, 2 * min(8192, d) ** 3, gemm)
    yield Operation(BRAND, d * tall + 9 * m**3, brand(d))
    if hidden > m:
        yield Operation(BRAND_G, hidden * tall + 9 * m**3, brand(hidden))
        yield Operation(APPLICATION, (d + hidden) * 4 * m * n, application)
    yield Operation(SMALL, 9 * m**3, small)
    yield Operation(SMALL_HOST, 9 * m**3, small_on_host)
    yield Operation(EA, 2 * d**2 * n, ea)
    yield Operation(RSVD, (POWER + 2) * (2 * d**2 * k + 4 * d * k**2), sketch)
    if dense:
        yield Operation(CHOLESKY, d**3, cholesky)
        yield Operation(EVD, 9 * d**3, full_evd)


def training_step(sizes: Sizes, device: torch.device) -> Run:
    """A step of SGD with the network, scaled so that its first FC layer has d inputs, in mixed precision."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * sizes.n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(4 * sizes.n) % len(CIFAR10_CLASSES)
    dataset = Dataset("noise", images, labels, images[:1], labels[:1], CIFAR10_CLASSES, True)
    config = TrainingConfig(
        batch_size=sizes.n, epochs=10**6, width=sizes.d / PAPER_D, learning_rate=1e-4, device=str(device), amp=True
    )
    return Training(config, dataset).step


def measure(library: str, operation: Operation, device: torch.device, rounds: int) -> Measured:
    """Its median time; one that takes long runs once, after everything it calls was warmed up by the others."""
    name, flops, make = operation
    try:
        run = make()
        seconds = [_timed(run, device)]
        started = time.perf_counter()
        while len(seconds) <= rounds and time.perf_counter() - started + seconds[-1] < BUDGET:
            seconds.append(_timed(run, device))
    except (RuntimeError, MemoryError) as error:  # out of memory, in either library's words
        return Measured(library, name, float("nan"), 0, flops, " ".join(str(error).split())[:80])
    finally:
        run = None  # type: ignore[assignment]
        _free(device)
    kept = seconds[1:] or seconds  # the first one warms up
    return Measured(library, name, statistics.median(kept), len(kept), flops)


def _timed(run: Run, device: torch.device) -> float:
    synchronize(device)  # of the whole device, so also of what CuPy started
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _free(device: torch.device) -> None:
    """Each library keeps what it has freed; the other could not have it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def libraries(device: torch.device) -> dict[str, Callable[[np.ndarray], Any]]:
    """How a host array gets to each library."""
    found: dict[str, Callable[[np.ndarray], Any]] = {"torch": lambda x: torch.from_numpy(x).to(device)}
    if device.type == "cuda":
        try:
            import cupy
        except ImportError:
            return found
        found["cupy"] = cupy.asarray
    return found


# ------------------------------------------------------------------------------------------------------ results


def table(measured: Sequence[Measured]) -> pd.DataFrame:
    """With tflops a second, and the fraction of the same library's GEMM rate (that of torch for the network)."""
    frame = pd.DataFrame(measured, columns=list(Measured._fields))
    frame["tflops"] = frame.flops / frame.seconds / 1e12
    rate = frame[frame.operation == GEMM].set_index("library").tflops
    frame["of_gemm"] = frame.tflops / frame.library.map(rate)
    return frame


def added(frame: pd.DataFrame, library: str) -> dict[str, float] | None:
    """Milliseconds of a step, of what B-KFAC adds to it, and its share of the sum; None while one is missing."""
    times = frame[frame.library == library].set_index("operation").seconds
    step = frame[frame.operation == STEP].seconds
    if step.empty or not {BRAND, BRAND_G, APPLICATION} <= set(times.index):
        return None
    updates, application = (times[BRAND] + times[BRAND_G]) / T_UPDT, times[APPLICATION]
    total = step.iloc[0] + updates + application
    return {
        "step": 1e3 * step.iloc[0],
        "updates": 1e3 * updates,
        "application": 1e3 * application,
        "share": (updates + application) / total,
        "share of updates": updates / total,
    }


def report(frame: pd.DataFrame, sizes: Sizes, hardware: str) -> str:
    """roofline.md."""
    shown = pd.DataFrame(
        {
            "library": frame.library,
            "operation": frame.operation,
            "ms": [f"{1e3 * x:.4g}" for x in frame.seconds],
            "Gflop": [f"{x / 1e9:.4g}" if x else "" for x in frame.flops],
            "Tflop/s": [f"{x:.3g}" if x else "" for x in frame.tflops],
            "of GEMM's rate": [f"{100 * x:.1f}%" if x else "" for x in frame.of_gemm],
            "runs": frame.rounds,
            "note": frame.note,
        }
    )
    d, hidden, r, n = sizes
    parts = [
        f"# Roofline\n\n{hardware}; d = {d} (d_G = {hidden}), r = {r}, n = {n}, r + n = {r + n}, float32, TF32 "
        "off; medians. Flops are the algorithm's, see `studies.roofline`. The small EVDs are in float64. CuPy's "
        '"Cholesky inverse" is its `inv`, by LU.',
        shown.to_markdown(index=False, disable_numparse=True),
    ]
    for library in frame.library.unique():
        if (sums := added(frame, library)) is not None:
            met = "met" if sums["share"] < GOAL else "missed"
            parts.append(
                f"**{library}: B-update and Algorithm 8 are {100 * sums['share']:.1f}% of a step** "
                f"(goal: under {100 * GOAL:.0f}%, {met}): {sums['step']:.3g} ms of SGD in mixed precision, "
                f"{sums['updates']:.3g} ms of Brand updates of both factors over T_updt = {T_UPDT}, "
                f"{sums['application']:.3g} ms of Algorithm 8 at every step. The updates alone: "
                f"{100 * sums['share of updates']:.1f}%."
            )
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """The roofline; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a miniature that shows it runs")
    parser.add_argument("--d", type=int, help="inputs of the layer (default: 16384)")
    parser.add_argument("--rank", type=int, metavar="R", help="truncation rank (default: 220)")
    parser.add_argument("--columns", type=int, metavar="N", help="columns of an update (default: 256)")
    parser.add_argument("--rounds", type=int, metavar="N", help="repetitions of what is quick (default: 20)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return command("roofline", parser, _run, argv)


FULL = {"d": PAPER_D, "rank": 220, "columns": 256, "rounds": 20}
QUICK = {"d": 512, "rank": 12, "columns": 16, "rounds": 2}


def _run(arguments: argparse.Namespace) -> int:
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    d, r, n = arguments.d, arguments.rank, arguments.columns
    check_at_least(rank=(r, 1), columns=(n, 1), rounds=(arguments.rounds, 1))
    if d <= r + n + OVERSAMPLING:
        raise InputError(f"d must be more than r + n + {OVERSAMPLING} = {r + n + OVERSAMPLING}, got {d}")
    device = select_device(arguments.device)
    sizes = Sizes(d, scaled(PAPER_HIDDEN, d / PAPER_D), r, n)
    dense = device.type == "cuda" or d <= UP_TO[EVD_NAME]
    measured: list[Measured] = []
    with full_precision(device.type):
        for library, place in libraries(device).items():
            for operation in operations(sizes, place, dense=dense):
                measured.append(measure(library, operation, device, arguments.rounds))
                _write(arguments.out, measured, sizes)
                if library == "torch" and operation.name == APPLICATION:
                    step = Operation(STEP, 0.0, lambda: training_step(sizes, device))
                    measured.append(measure(library, step, device, arguments.rounds))
    _write(arguments.out, measured, sizes)
    print((arguments.out / "roofline.md").read_text(encoding="utf-8"))
    return 0


def _write(out: Path, measured: Sequence[Measured], sizes: Sizes) -> None:
    frame, about = table(measured), environment()
    write_csv(out / "roofline.csv", frame)
    write_text(out / "environment.json", json.dumps(about, indent=2) + "\n")
    hardware = about["cuda_device"] or f"{about['cpu']}, {about['torch_threads']} threads"
    write_text(out / "roofline.md", report(frame, sizes, hardware))


if __name__ == "__main__":
    sys.exit(main())
