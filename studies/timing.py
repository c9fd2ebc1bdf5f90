"""t_epoch of drivers, taken one at a time, and where the time of a step goes.

    python -m studies.timing --preset digits|cifar10-small|paper [--data DIR] --out DIR

times the algorithms of Table 1, with all measurement off, at the sizes of the error study's preset. DIR may be
that study's: its Table 1 then gets the t_epoch column. `studies.optimizers` takes its times here as well.

Jobs that run side by side share memory, caches and turbo clocks, and so slow each other down; what a run of one of
several jobs took says little. Here nothing else of ours runs. A round is a fresh training run of each driver in
turn: its first iteration, which starts everything up, and then, timed, as many whole cycles of its updates as fill
ten T_updt; that gives every kind of step its share. t_epoch is the time of a step times the steps of an epoch.
Evaluation is not in it, and the device is synchronised at both ends. Rounds alternate between the drivers, so that
a disturbance from outside meets all of them alike; their standard deviation says how large it was.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pandas as pd
import torch
from torch.autograd.profiler import record_function
from tqdm import tqdm

from figures.render import render
from kfacerr.cli import Parser
from kfacerr.exceptions import InputError
from kfacerr.process import EAFactor
from kfacerr.torch import KFAC
from kfacerr.torch.layers import Factor, Layer
from kfacerr.torch.seng import SENG
from studies.data import Dataset
from studies.drivers import TABLE_1, find_driver, update_period
from studies.files import load_checkpoint, save_checkpoint
from studies.presets import PRESETS
from studies.running import add_data_arguments, check_at_least, command, load_dataset, write_csv
from studies.training import Training, TrainingConfig, select_device

__all__ = ["PARTS", "Stopwatch", "Timing", "main", "measure", "synchronize", "time_drivers", "write_timings"]

FORWARD_BACKWARD = "forward/backward"
FACTORS = "EA update"
DECOMPOSITION = "decomposition"
APPLICATION = "application"
OTHER = "other"  # the batch, clip, weight decay and update of the weights, the loop
PARTS = (FORWARD_BACKWARD, FACTORS, DECOMPOSITION, APPLICATION, OTHER)
"""Of a step. What is called from within another part is not counted in that one."""

LABELS = {"studies.forward_backward": FORWARD_BACKWARD}
SEAMS: tuple[tuple[type, str, str], ...] = (
    (Layer, "collect", FACTORS),  # the columns: hooks, unfolded convolutions
    (KFAC, "_columns", FACTORS),
    (EAFactor, "update", FACTORS),  # (8)
    (Factor, "_attempt", DECOMPOSITION),  # (9), (10), EVD: whatever the process does
    (KFAC, "_precondition", APPLICATION),  # Alg. 1 l.15-18, or Alg. 8
    (KFAC, "_descend_product", APPLICATION),  # Alg. 8's one product, which also is the update
    (SENG, "_refresh", DECOMPOSITION),
    (SENG, "_directions", APPLICATION),
)
"""Methods whose time is taken, and the part each belongs to."""


class Timing(NamedTuple):
    """One driver in one round.

    Attributes:
        t_epoch: seconds of an epoch.
        parts: seconds of an epoch in each of `PARTS`.
    """

    driver: str
    round: int
    steps: int
    t_epoch: float
    parts: dict[str, float]


class Stopwatch:
    """Adds up the time spent in each of `PARTS`, by standing in for `SEAMS` and for `record_function`'s labels.

    torch.profiler would give the same from a trace of every operator; this costs microseconds a call, and so may
    run while t_epoch is taken. On a GPU each end waits for the device, which costs more: t_epoch is taken without.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    def _mark(self) -> None:
        """The time since the last mark goes to the innermost part that is open."""
        synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _enter(self, part: str) -> None:
        self._mark()
        self._open.append(part)

    def _leave(self) -> None:
        self._mark()
        self._open.pop()

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return timed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it time is taken; it is one part of its own, `OTHER`. Labels reach no profiler meanwhile."""

        def enter(label: record_function) -> record_function:
            self._enter(LABELS.get(label.name, self._open[-1]))
            return label

        def leave(label: record_function, *error: object) -> None:
            self._leave()

        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(record_function, "__enter__", enter))
            patches.enter_context(mock.patch.object(record_function, "__exit__", leave))
            for owner, name, part in SEAMS:
                timed = self._timed(getattr(owner, name), part)
                patches.enter_context(mock.patch.object(owner, name, timed))
            self._enter(OTHER)
            try:
                yield
            finally:
                self._leave()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(config: TrainingConfig, dataset: Dataset, round: int) -> Timing:
    """A fresh run's t_epoch over whole cycles of its driver's updates."""
    # Schedules stand still at their start, where every algorithm has its work to do; epochs are plenty.
    training = Training(dataclasses.replace(config, epochs=10**6, schedule_epochs=10**6), dataset)
    per_epoch = training.steps_per_epoch
    cycle = find_driver(config.driver).cycle(per_epoch)
    steps = -(-10 * update_period(per_epoch) // cycle) * cycle
    training.step()
    watch = Stopwatch(training.device)
    on_cpu = training.device.type == "cpu"
    seconds = _timed(training, steps, watch if on_cpu else None)
    if not on_cpu:
        _timed(training, steps, watch)
    scale = per_epoch / steps
    parts = {part: s * scale for part, s in watch.seconds.items()}
    return Timing(config.driver, round, steps, seconds * scale, parts)


def _timed(training: Training, steps: int, watch: Stopwatch | None) -> float:
    with contextlib.nullcontext() if watch is None else watch.listening():
        synchronize(training.device)
        start = time.perf_counter()
        for _ in range(steps):
            training.step()
        synchronize(training.device)
        return time.perf_counter() - start


def time_drivers(
    configs: dict[str, TrainingConfig],
    dataset: Dataset,
    rounds: int,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
) -> list[Timing]:
    """Rounds of `measure`, one after the other in this process; those that `folder` holds are not taken again."""
    timings = []
    jobs = [(round, name) for round in range(rounds) for name in configs]
    for round, name in tqdm(jobs, unit="timing", disable=None):
        config = asdict(configs[name])
        path = folder / f"{name.replace(' ', '-')}-{round}.pt"
        if path.exists():
            saved = load_checkpoint(path)
            if asdict(TrainingConfig(**saved["config"])) != config:  # one that lacks a setting has its default
                raise InputError(f"{path}: was taken of another configuration; remove {folder} to time anew")
            timings.append(Timing(**saved["timing"]))
        elif not stop():
            timings.append(measure(configs[name], dataset, round))
            save_checkpoint(path, {"config": config, "timing": timings[-1]._asdict()})
    return timings


def write_timings(out: Path, timings: Sequence[Timing]) -> None:
    """timing.csv: driver, round, steps, t_epoch; breakdown.csv: driver, round, part, seconds of an epoch."""
    rows: list[dict[str, Any]] = [{k: v for k, v in t._asdict().items() if k != "parts"} for t in timings]
    write_csv(out / "timing.csv", pd.DataFrame(rows, columns=["driver", "round", "steps", "t_epoch"]))
    parts = [(t.driver, t.round, part, s) for t in timings for part, s in t.parts.items()]
    columns = ["driver", "round", "part", "seconds"]
    write_csv(out / "breakdown.csv", pd.DataFrame(parts, columns=columns))


def main(argv: Sequence[str] | None = None) -> int:
    """Times Table 1's algorithms; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.timing", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, choices=tuple(PRESETS))
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times each is timed (default: 3)")
    add_data_arguments(parser)
    return command("timing", parser, _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    check_at_least(rounds=(arguments.rounds, 1))
    select_device(arguments.device)
    preset = PRESETS[arguments.preset]
    dataset = load_dataset(
        preset.dataset,
        arguments.data,
        accept_modified=arguments.accept_modified_data,
        n_train=preset.n_train,
    )
    per_epoch = len(dataset.train_images) // preset.batch_size
    configs = {
        name: preset.training_config(name, preset.seeds[0], per_epoch, arguments.device) for name in TABLE_1
    }
    timings = time_drivers(configs, dataset, arguments.rounds, arguments.out / "state" / "timing")
    write_timings(arguments.out, timings)
    if (arguments.out / "errors.csv").exists():
        render(arguments.out)
    times = pd.DataFrame(timings).groupby("driver", sort=False).t_epoch.agg(["mean", "std"])
    print(times.to_markdown(floatfmt=".3g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
