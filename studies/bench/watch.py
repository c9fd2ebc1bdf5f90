"""What `kfacerr.torch.watch` costs as it stands by default: CPU time of a training with it over that without it.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m studies.bench.watch

Two small perceptrons, of which the middle layer is watched by all seven algorithms, are trained by Adam on random
images. CPU time of one thread counts work, and hardly what else the machine does; the two take turns.
"""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from kfacerr.command import Parser, check_at_least, run
from kfacerr.torch import watch

__all__ = ["main", "overhead"]

SIZES = {
    "64-128-96-10, batch 32": ((64, 128, 96, 10), 32),
    "784-1024-512-10, batch 128": ((784, 1024, 512, 10), 128),
}


def overhead(widths: Sequence[int], batch: int, steps: int) -> tuple[float, float]:
    """Milliseconds of a step without `watch`, and how many times as long it takes with it."""
    plain, watched = (_trained(widths, batch, steps, watching) for watching in (False, True))
    return 1e3 * plain / steps, watched / plain


def _trained(widths: Sequence[int], batch: int, steps: int, watching: bool) -> float:
    """Seconds of CPU time."""
    torch.manual_seed(0)
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*[module for pair in layers for module in pair][:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = torch.rand(2048, widths[0]), torch.randint(widths[-1], (2048,))
    started = time.process_time()
    with watch(model, "2") if watching else contextlib.nullcontext():
        for _ in range(steps):
            chosen = torch.randint(len(images), (batch,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return time.process_time() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a model; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.bench.watch", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=1100, help="of a training (default: until window 2 has ended)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns, of which the median is printed")
    return run("watch", parser, _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    check_at_least(steps=(arguments.steps, 1), rounds=(arguments.rounds, 1))
    for name, (widths, batch) in SIZES.items():
        found = [overhead(widths, batch, arguments.steps) for _ in range(arguments.rounds)]
        step, ratio = np.median(found, axis=0)
        print(f"{name}: {step:.2g} ms a step, {ratio:.2f} times as long when watched", flush=True)


if __name__ == "__main__":
    sys.exit(main())
