"""t_epoch of drivers, taken one at a time, and where the time of a step goes.

    python -m studies.timing --preset digits|cifar10-small|... [--data DIR] --out DIR

times the algorithms of Table 1, with all measurement off, at the sizes of the error study's preset. DIR may be
that study's: its Table 1 then gets the t_epoch column. `studies.optimizers` takes its times here as well.

A round is a fresh training run of each driver in turn: its first iteration, which starts everything up, and then,
timed, as many whole cycles of its updates as fill ten T_updt; that gives every kind of step its share. t_epoch is
the time of a step times the steps of an epoch. Evaluation is not in it. Nothing else of ours runs, and rounds
alternate between the drivers; their standard deviation says how large a disturbance was.

Where the time goes follows from the kinds of steps, without a look inside an optimizer: of the lightest steps, the
time until `optimizer.step()` begins, the time in it, and the rest; what steps that update the factors take beyond
these; and what steps that decompose take beyond those. Where the two only come together, all is decomposition.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from kfacerr.command import Parser, check_at_least, run
from kfacerr.exceptions import InputError
from kfacerr.files import write_csv
from studies.config import TABLE_1, TrainingConfig, update_period
from studies.data import load_dataset
from studies.drivers import Updates, find_driver
from studies.environment import select_device, synchronize
from studies.images import Dataset
from studies.jobs import add_data_arguments, alone, load_checkpoint, save_checkpoint, slug
from studies.presets import PRESETS
from studies.training import Training

__all__ = ["Timing", "main", "measure", "parts", "time_drivers", "write_timings"]


class Timing(NamedTuple):
    """One driver in one round.

    Attributes:
        table: 1 with the periods of §4.2, 2 with those of §6.
        driver: its name.
        round: counted from 0.
        steps: that were timed.
        t_epoch: seconds of an epoch.
        parts: seconds of an epoch by part.
    """

    table: int
    driver: str
    round: int
    steps: int
    t_epoch: float
    parts: dict[str, float]


def measure(config: TrainingConfig, dataset: Dataset, round: int) -> Timing:
    """A fresh run's t_epoch over whole cycles of its driver's updates."""
    # Schedules stand still at their start, where every algorithm has its work to do; epochs are plenty.
    training = Training(dataclasses.replace(config, epochs=10**6, schedule_epochs=10**6), dataset)
    per_epoch = training.steps_per_epoch
    updates = find_driver(config.driver).updates(config, per_epoch)
    steps = -(-10 * update_period(per_epoch) // updates.cycle) * updates.cycle
    training.step()
    laps = _laps(training, steps, wait=False)
    seconds = laps.sum()
    if (
        training.device.type != "cpu"
    ):  # parts need a device that is waited for at every mark, t_epoch one that is not
        laps = _laps(training, steps, wait=True)
    scale = per_epoch / steps
    kinds = [_kind(k, updates) for k in range(training.k - steps, training.k)]
    split = {part: float(s) * scale for part, s in parts(laps, kinds).items()}
    return Timing(1 if config.T_updt else 2, config.driver, round, steps, float(seconds) * scale, split)


def _laps(training: Training, steps: int, *, wait: bool) -> np.ndarray:
    """(steps, 3): seconds of each step until `optimizer.step()` begins, in it, and after it."""
    marks: list[float] = []

    def mark(*_: object) -> None:
        if wait:
            synchronize(training.device)
        marks.append(time.perf_counter())

    handles = (
        training.optimizer.register_step_pre_hook(mark),
        training.optimizer.register_step_post_hook(mark),
    )
    synchronize(training.device)
    mark()
    for _ in range(steps):
        training.step()
        mark()
    synchronize(training.device)
    marks[-1] = time.perf_counter()
    for handle in handles:
        handle.remove()
    return np.diff(marks).reshape(steps, 3)


def _kind(k: int, updates: Updates) -> int:
    """0 for a plain iteration, 1 for one that updates the factors, 2 for one that decomposes as well."""
    if any(k % period == 0 for period in updates.decompositions):
        return 2
    return int(updates.factors > 0 and k % updates.factors == 0)


def parts(laps: np.ndarray, kinds: Sequence[int]) -> dict[str, float]:
    """Where the time of some steps went, which adds up to it.

    Args:
        laps: (steps, 3), see `_laps`.
        kinds: of each step, see `_kind`; the lightest there is stands for what every step does.

    Returns:
        Seconds by part.
    """
    kind, steps = np.asarray(kinds), len(kinds)
    lightest = kind.min()
    before, within, after = laps[kind == lightest].mean(0) * steps
    totals = {"forward/backward": before, "step": within, "other": after}
    base = laps[kind == lightest].sum(1).mean()
    for number, part in ((1, "EA update"), (2, "decomposition")):
        if number > lightest and (kind == number).any():
            mean = laps[kind == number].sum(1).mean()
            totals[part] = (mean - base) * int((kind >= number).sum())
            base = mean
    return totals


def time_drivers(
    configs: Sequence[TrainingConfig],
    dataset: Dataset,
    rounds: int,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
) -> list[Timing]:
    """Rounds of `measure`, one after the other in this process; those that `folder` holds are not taken again.

    Raises:
        InputError: `folder` holds times of another configuration.
    """
    timings = []
    jobs = [(round, config) for round in range(rounds) for config in configs]
    for round, config in tqdm(jobs, unit="timing", disable=None):
        path = folder / f"{slug('periods', config.T_updt, config.driver, round)}.pt"
        if path.exists():
            saved = load_checkpoint(path, ("config", "timing"))
            if saved["config"] != dataclasses.asdict(config):
                raise InputError(f"{path}: was taken of another configuration; remove {folder} to time anew")
            if set(saved["timing"]) != set(Timing._fields):
                raise InputError(f"{path}: holds no times; remove {folder} to time anew")
            timings.append(Timing(**saved["timing"]))
        elif not stop():
            timings.append(measure(config, dataset, round))
            save_checkpoint(path, {"config": dataclasses.asdict(config), "timing": timings[-1]._asdict()})
    return timings


def write_timings(out: Path, timings: Sequence[Timing]) -> None:
    """timing.csv: table, driver, round, steps, t_epoch; breakdown.csv: table, driver, round, part, seconds."""
    rows = [t._asdict() for t in timings]
    names = [name for name in Timing._fields if name != "parts"]
    write_csv(out / "timing.csv", pd.DataFrame(rows, columns=names))
    split = [(t.table, t.driver, t.round, part, s) for t in timings for part, s in t.parts.items()]
    columns = ["table", "driver", "round", "part", "seconds"]
    write_csv(out / "breakdown.csv", pd.DataFrame(split, columns=columns))


def main(argv: Sequence[str] | None = None) -> int:
    """Times Table 1's algorithms; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.timing", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, choices=tuple(PRESETS))
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times each is timed")
    add_data_arguments(parser)
    return run("timing", parser, alone(_run), argv)


def _run(arguments: argparse.Namespace) -> None:
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
    configs = [preset.training_config(name, preset.seeds[0], per_epoch, arguments.device) for name in TABLE_1]
    timings = time_drivers(configs, dataset, arguments.rounds, arguments.out / "state" / "timing")
    write_timings(arguments.out, timings)
    if (arguments.out / "errors.csv").exists():
        from figures.render import render

        render(arguments.out)
    times = pd.DataFrame(timings).groupby("driver", sort=False).t_epoch.agg(["mean", "std"])
    print(times.to_markdown(floatfmt=".3g"))


if __name__ == "__main__":
    sys.exit(main())
