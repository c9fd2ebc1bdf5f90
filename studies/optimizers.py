"""The performance study of §6: Table 2, and what SGD and AdamW, a user's usual choice, do beside it.

    python -m studies.optimizers --preset digits|cifar10-small|paper [--data DIR] [--jobs J] --out DIR

Every optimizer trains the same network from the same weights on the same batches, once a seed: a job of its own.
DIR gets epochs.csv (a row an epoch), runs.csv (a row a job), timing.csv and breakdown.csv (see `studies.timing`),
config.json, environment.json, Table 2, accuracy against epochs and time, the breakdown of a step, and claims.md.
A study that is stopped, by --time-limit, --step-limit or Ctrl-C, goes on with --resume.

**Time.** Jobs that run side by side slow each other down. So all times in Table 2 and in the figures are epochs
times the t_epoch that `studies.timing` takes of each optimizer alone, after the training; epochs.csv keeps what
the clock said in each job, evaluation and checkpoints excluded. --timing-only does this last part alone: a study
may be trained on a busy machine or a cluster (see `studies.jobs`), and timed on a quiet one.

`--preset tasks` and `--preset search` are studies of their own, of other tasks and more rivals, see
`studies.tasks.study`.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import pandas as pd
import torch

from figures.tables import epochs_to
from kfacerr.command import Parser, run
from kfacerr.exceptions import InputError
from kfacerr.files import write_csv, write_text
from kfacerr.inverse import CONTINUATIONS
from studies.claims import judge_optimizers
from studies.config import TABLE_1, family, table_2, update_period
from studies.environment import synchronize
from studies.images import Dataset
from studies.jobs import (
    Outcome,
    Stop,
    add_data_arguments,
    add_job_arguments,
    alone,
    begin,
    in_parallel,
    load_checkpoint,
    run_job,
    slug,
    verdict,
    with_seeds,
)
from studies.presets import OPTIMIZER_PRESETS, OptimizerPreset
from studies.tasks import study as tasks
from studies.timing import Timing, time_drivers, write_timings
from studies.training import Diverged, Training

__all__ = ["Epoch", "OptimizerRun", "main"]

T_UPDT_4_2 = 10  # of §4.2, whose drivers are timed beside Table 2's


RESULTS = ("optimizer", "seed", "finished", "diverged", "epochs")


class Epoch(NamedTuple):
    """What an epoch came to.

    Attributes:
        epoch: number of epochs done, from 1.
        seconds: of training, by the clock on the wall.
        cpu_seconds: of training, of this process on all its cores.
        train_loss: mean over the epoch's batches, each before its update.
    """

    epoch: int
    seconds: float
    cpu_seconds: float
    train_loss: float
    test_loss: float
    test_accuracy: float


class OptimizerRun:
    """One job: one optimizer trains with one seed, and is evaluated at each epoch's end.

    The clock stops while the run is evaluated or saved. A training that diverges is a result, not a failure: the
    run ends there, and reaches no further target.
    """

    def __init__(self, preset: OptimizerPreset, dataset: Dataset, optimizer: str, seed: int, device: str) -> None:
        self.optimizer, self.seed = optimizer, seed
        self.training = Training(preset.training_config(optimizer, seed, device), dataset)
        self.epochs: list[Epoch] = []
        self.diverged = ""
        self._loss = torch.zeros((), dtype=torch.float64, device=self.training.device)  # sum over the epoch
        self._spent = (0.0, 0.0)  # of this epoch, before the clock was started last
        self._started: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return job_name(self.optimizer, self.seed)

    @property
    def position(self) -> int:
        return self.training.k

    @property
    def end(self) -> int:
        return self.training.total_steps

    @property
    def finished(self) -> bool:
        return bool(self.diverged) or self.training.k >= self.end

    def seconds_left(self, mean: float) -> float:
        """At the mean pace so far."""
        return mean * (self.end - self.position)

    def advance(self) -> None:
        """One iteration; at an epoch's end, its row."""
        if self._started is None:
            self._started = self._now()
        try:
            self._loss += self.training.step()
            if self.training.k % self.training.steps_per_epoch == 0:
                self._end_epoch()
        except Diverged as error:
            self.diverged = str(error)

    def _end_epoch(self) -> None:
        self._pause()
        (seconds, cpu_seconds), steps = self._spent, self.training.steps_per_epoch
        evaluation = self.training.evaluate()
        done = self.training.k // steps
        self.epochs.append(Epoch(done, seconds, cpu_seconds, self._loss.item() / steps, *evaluation))
        self._spent = (0.0, 0.0)
        self._loss.zero_()

    def _now(self) -> tuple[float, float]:
        synchronize(self.training.device)
        return time.perf_counter(), time.process_time()

    def _pause(self) -> None:
        if self._started is not None:
            (wall, cpu), now = self._started, self._now()
            self._spent = self._spent[0] + now[0] - wall, self._spent[1] + now[1] - cpu
            self._started = None

    def results(self) -> dict[str, Any]:
        """What has been measured so far."""
        return {
            "optimizer": self.optimizer,
            "seed": self.seed,
            "finished": self.finished,
            "diverged": self.diverged,
            "epochs": [tuple(row) for row in self.epochs],
        }

    def state_dict(self) -> dict[str, Any]:
        """The results, and what a resume needs if the run is not finished."""
        self._pause()
        if not self.finished:
            try:
                own = {"training": self.training.state_dict(), "loss": self._loss.item(), "spent": self._spent}
                return self.results() | own
            except Diverged as error:
                self.diverged = str(error)
        return self.results()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave of an unfinished run."""
        self.epochs = [Epoch(*row) for row in state["epochs"]]
        self.training.load_state_dict(state["training"])
        self._loss.fill_(state["loss"])
        self._spent = state["spent"]

    def close(self) -> None:
        """Nothing is open."""


def job_name(optimizer: str, seed: int) -> str:
    """As messages call it."""
    return f"{optimizer}, seed {seed}"


def checkpoint_path(out: Path, optimizer: str, seed: int) -> Path:
    """Where a job keeps its state."""
    return out / "state" / f"{slug(optimizer, 'seed', seed)}.pt"


def run_optimizer(
    preset: OptimizerPreset, dataset: Dataset, optimizer: str, seed: int, device: str, out: Path, stop: Stop
) -> Outcome:
    """Takes one job as far as `stop` allows, in whatever process, on whatever machine it runs."""
    make = partial(OptimizerRun, preset, dataset, optimizer, seed, device)
    return run_job(job_name(optimizer, seed), checkpoint_path(out, optimizer, seed), make, stop, RESULTS)


# ------------------------------------------------------------------------------------------- what DIR holds

States = Sequence[dict[str, Any]]


def write_tables(out: Path, preset: OptimizerPreset, states: States, timings: Sequence[Timing]) -> None:
    """The CSVs, from the jobs' states, finished or not, and the times taken so far."""
    write_csv(out / "epochs.csv", _epochs(states))
    write_csv(out / "runs.csv", pd.DataFrame([_run_row(state, preset) for state in states]))
    write_timings(out, timings)


def write_results(
    out: Path, preset: OptimizerPreset, T_updt: int, dataset: str, states: States, timings: Sequence[Timing]
) -> None:
    """Table 2, the figures and the claims."""
    from figures.optimizers import render

    epochs = _epochs(states)
    if len(epochs):
        render(out)
        timing = pd.DataFrame(timings, columns=Timing._fields)
        write_text(out / "claims.md", judge_optimizers(epochs, timing, preset, T_updt, dataset))


def _epochs(states: States) -> pd.DataFrame:
    rows = [(s["optimizer"], s["seed"], *epoch) for s in states for epoch in s["epochs"]]
    return pd.DataFrame(rows, columns=["optimizer", "seed", *Epoch._fields])


def _run_row(state: dict[str, Any], preset: OptimizerPreset) -> dict[str, Any]:
    """One job's line of runs.csv."""
    epochs = pd.DataFrame(state["epochs"], columns=list(Epoch._fields))
    last = epochs.iloc[-1] if len(epochs) else pd.Series(dtype=float)
    return {
        "optimizer": state["optimizer"],
        "seed": state["seed"],
        "finished": state["finished"],
        "diverged": state["diverged"],
        "epochs": len(epochs),
        "seconds": epochs.seconds.sum(),
        "best_test_accuracy": epochs.test_accuracy.max(),
        "last_test_accuracy": last.get("test_accuracy"),
        "last_test_loss": last.get("test_loss"),
        **{f"epochs_to_{target:g}": epochs_to(epochs, target) for target in preset.targets},
    }


# --------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status: 0 (also when a limit stopped it), 2 bad input, 130 Ctrl-C."""
    program = "python -m studies.optimizers"
    first = Parser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    if first.parse_known_args(argv)[0].preset in tasks.PRESETS:
        return tasks.main(argv)
    parser = Parser(prog=program, description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, choices=(*OPTIMIZER_PRESETS, *tasks.PRESETS))
    add_data_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument(
        "--optimizers", nargs="+", metavar="NAME", help='e.g. SGD "R-KFAC T_inv=25" (default: all of Table 2)'
    )
    parser.add_argument(
        "--continuation", choices=CONTINUATIONS, help="of the spectrum (default: min, the paper's)"
    )
    parser.add_argument(
        "--equal-rank", action="store_true", help="R-KFAC's FC layer at rank r + n, as the B- ones"
    )
    parser.add_argument("--timing-only", action="store_true", help="train no further, take the times")
    parser.add_argument("--no-timing", action="store_true", help="train only; take the times later")
    return run("optimizers", parser, alone(_run), argv)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.timing_only and arguments.no_timing:
        raise InputError("--timing-only and --no-timing contradict each other")
    preset = with_seeds(OPTIMIZER_PRESETS[arguments.preset], arguments)
    if arguments.equal_rank:
        preset = dataclasses.replace(preset, equal_rank=True)
    if arguments.continuation:
        preset = dataclasses.replace(preset, continuation=arguments.continuation)
    for name in arguments.optimizers or ():
        family(name)
    about = partial(_about, preset, arguments.optimizers)
    dataset, stop = begin(arguments, preset, about, n_test=preset.n_test, resume=arguments.timing_only)
    optimizers, T_updt = about(dataset).values()
    device, out = arguments.device, arguments.out
    configs = [preset.training_config(name, preset.seeds[0], device) for name in optimizers]
    if not arguments.optimizers:
        configs += [preset.training_config(name, preset.seeds[0], device, T_updt=T_UPDT_4_2) for name in TABLE_1]
    take = partial(time_drivers, configs, dataset, preset.timing_rounds, out / "state" / "timing")
    timings = take(lambda: True)  # those taken already
    jobs = [(name, seed) for seed in preset.seeds for name in optimizers]  # of each something, if stopped
    with stop.listening():
        if arguments.timing_only:
            outcomes = [_saved(out, *job) for job in jobs]
        else:
            tasks = [joblib.delayed(run_optimizer)(preset, dataset, *job, device, out, stop) for job in jobs]
            outcomes = _gathered(in_parallel(tasks, arguments.jobs), partial(write_tables, out, preset), timings)
        whole = not any(outcome.stopped or outcome.error for outcome in outcomes)
        if arguments.timing_only or (whole and not arguments.no_timing):
            stop.steps = None
            timings = take(stop)
    write_tables(out, preset, _states(outcomes), timings)
    write_results(out, preset, T_updt, dataset.name, _states(outcomes), timings)
    if (table := out / "table2.md").exists():
        print(table.read_text(encoding="utf-8"))
    if stop.reason:
        outcomes.append(Outcome("timing", None, stop.reason))
    return verdict("optimizers", outcomes, out)


def _about(preset: OptimizerPreset, optimizers: Sequence[str] | None, dataset: Dataset) -> dict[str, Any]:
    """What config.json says beside the preset."""
    per_epoch = len(dataset.train_images) // preset.batch_size
    return {
        "optimizers": list(dict.fromkeys(optimizers or table_2(per_epoch))),
        "T_updt": update_period(per_epoch),
    }


def _gathered(
    results: Any, write: Callable[[States, Sequence[Timing]], None], timings: Sequence[Timing]
) -> list[Outcome]:
    """The outcomes; the tables are written anew after each."""
    outcomes: list[Outcome] = []
    for outcome in results:
        outcomes.append(outcome)
        write(_states(outcomes), timings)
    return outcomes


def _states(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [outcome.state for outcome in outcomes if outcome.state is not None]


def _saved(out: Path, optimizer: str, seed: int) -> Outcome:
    """A job as its checkpoint left it, if it has one."""
    path = checkpoint_path(out, optimizer, seed)
    return Outcome(job_name(optimizer, seed), load_checkpoint(path, RESULTS) if path.exists() else None)


if __name__ == "__main__":
    sys.exit(main())
