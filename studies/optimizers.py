"""The performance study of §6: Table 2, and what SGD and AdamW, a user's usual choice, do beside it.

    python -m studies.optimizers --preset digits|cifar10-small|paper [--data DIR] [--jobs J] --out DIR

Every optimizer trains the same network from the same weights on the same batches, once a seed: a job of its own.
DIR gets epochs.csv (a row an epoch), runs.csv (a row a job), timing.csv and breakdown.csv (see `studies.timing`),
config.json, environment.json, Table 2, accuracy against epochs and time, the breakdown of a step, and claims.md.
A study that is stopped, by --time-limit, --step-limit or Ctrl-C, goes on with --resume.

**Time.** Jobs that run side by side slow each other down. So all times in Table 2 and in the figures are epochs
times the t_epoch that `studies.timing` takes of each optimizer alone, after the training; epochs.csv keeps what
the clock said in each job, evaluation and checkpoints excluded. --timing-only does this last part alone: a study
may be trained on a busy machine or a cluster, and timed on a quiet one.

**On a cluster.** joblib runs the jobs, so its Dask and Ray backends take them. With a Dask scheduler at ADDRESS
(`pip install kfacerr[cluster]`), whose workers see DIR and have one thread each (dask worker --nthreads 1):

    python -m studies.optimizers --preset paper --cluster ADDRESS --out DIR

With Ray, or any other backend:

    from ray.util.joblib import register_ray
    register_ray()
    with joblib.parallel_config("ray"):
        studies.optimizers.main(["--preset", "paper", "--cluster", "current", "--out", "DIR"])
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import pandas as pd
import torch

from figures.optimizers import epochs_to, render
from kfacerr.cli import Parser
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from kfacerr.inverse import CONTINUATIONS
from studies.data import Dataset
from studies.drivers import TABLE_1, TABLE_2
from studies.files import load_checkpoint
from studies.optimizer_claims import judge
from studies.presets import OPTIMIZER_PRESETS, OptimizerPreset
from studies.running import (
    Outcome,
    Stop,
    add_data_arguments,
    add_job_arguments,
    begin,
    command,
    in_parallel,
    run_job,
    verdict,
    with_seeds,
    write_csv,
)
from studies.timing import Timing, synchronize, time_drivers, write_timings
from studies.training import Diverged, Training

__all__ = ["Epoch", "OptimizerRun", "main"]


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
            now = self._now()
            spent = [
                before + end - start for before, end, start in zip(self._spent, now, self._started, strict=True)
            ]
            self._spent = spent[0], spent[1]
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
        self.epochs = [Epoch(*row) for row in state["epochs"]]
        self.training.load_state_dict(state["training"])
        self._loss.fill_(state["loss"])
        self._spent = state["spent"]

    def close(self) -> None:
        """Nothing is open."""


def job_name(optimizer: str, seed: int) -> str:
    return f"{optimizer}, seed {seed}"


def checkpoint_path(out: Path, optimizer: str, seed: int) -> Path:
    return out / "state" / f"{optimizer}-seed-{seed}.pt"


def run_optimizer(
    preset: OptimizerPreset, dataset: Dataset, optimizer: str, seed: int, device: str, out: Path, stop: Stop
) -> Outcome:
    """Takes one job as far as `stop` allows, in whatever process, on whatever machine it runs."""
    return run_job(
        job_name(optimizer, seed),
        checkpoint_path(out, optimizer, seed),
        lambda: OptimizerRun(preset, dataset, optimizer, seed, device),
        stop,
    )


# ------------------------------------------------------------------------------------------- what DIR holds


def write_tables(
    out: Path, preset: OptimizerPreset, states: Sequence[dict[str, Any]], timings: Sequence[Timing]
) -> None:
    """The CSVs, from the jobs' states, finished or not, and the times taken so far."""
    write_csv(out / "epochs.csv", _epochs(states))
    write_csv(out / "runs.csv", pd.DataFrame([_run_row(state, preset) for state in states]))
    write_timings(out, timings)


def write_results(
    out: Path, preset: OptimizerPreset, dataset: str, states: Sequence[dict[str, Any]], timings: Sequence[Timing]
) -> None:
    """Table 2, the figures and the claims."""
    epochs = _epochs(states)
    if len(epochs):
        render(out)
        write_text(
            out / "claims.md", judge(epochs, pd.DataFrame(timings, columns=Timing._fields), preset, dataset)
        )


def _epochs(states: Sequence[dict[str, Any]]) -> pd.DataFrame:
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
    return command("optimizers", _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m studies.optimizers", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, choices=tuple(OPTIMIZER_PRESETS))
    add_data_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument(
        "--optimizers", nargs="+", choices=tuple(TABLE_2), metavar="NAME", help="default: all nine"
    )
    parser.add_argument(
        "--continuation", choices=CONTINUATIONS, help="of the spectrum (default: min, the paper's)"
    )
    parser.add_argument(
        "--equal-rank", action="store_true", help="R-KFAC's FC layer at rank r + n, as the B- ones"
    )
    parser.add_argument(
        "--cluster", default="", metavar="ADDRESS", help="of a Dask scheduler; 'current': joblib's active backend"
    )
    parser.add_argument("--timing-only", action="store_true", help="train no further, take the times")
    parser.add_argument("--no-timing", action="store_true", help="train only; take the times later")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.timing_only and arguments.no_timing:
        raise InputError("--timing-only and --no-timing contradict each other")
    preset = with_seeds(OPTIMIZER_PRESETS[arguments.preset], arguments)
    if arguments.equal_rank:
        preset = dataclasses.replace(preset, equal_rank=True)
    if arguments.continuation:
        preset = dataclasses.replace(preset, continuation=arguments.continuation)
    optimizers = tuple(dict.fromkeys(arguments.optimizers or TABLE_2))
    dataset, stop = begin(
        arguments, preset, n_test=preset.n_test, resume=arguments.timing_only, optimizers=list(optimizers)
    )
    out: Path = arguments.out
    timed = (*optimizers, *(TABLE_1 if set(optimizers) == set(TABLE_2) else ()))
    configs = {name: preset.training_config(name, preset.seeds[0], arguments.device) for name in timed}
    times = out / "state" / "timing"
    timings = time_drivers(configs, dataset, preset.timing_rounds, times, lambda: True)  # those taken already
    jobs = [
        (optimizer, seed) for seed in preset.seeds for optimizer in optimizers
    ]  # of each something, if stopped
    outcomes: list[Outcome] = []

    def states() -> list[dict[str, Any]]:
        return [outcome.state for outcome in outcomes if outcome.state is not None]

    with stop.listening():
        if arguments.timing_only:
            outcomes = [_saved(out, *job) for job in jobs]
        else:
            tasks = [
                joblib.delayed(run_optimizer)(preset, dataset, *job, arguments.device, out, stop) for job in jobs
            ]
            for outcome in in_parallel(tasks, arguments.jobs, arguments.cluster):
                outcomes.append(outcome)
                write_tables(out, preset, states(), timings)
        whole = not any(outcome.stopped or outcome.error for outcome in outcomes)
        if arguments.timing_only or (whole and not arguments.no_timing):
            stop.steps = None
            timings = time_drivers(configs, dataset, preset.timing_rounds, times, stop)
    write_tables(out, preset, states(), timings)
    write_results(out, preset, dataset.name, states(), timings)
    if (table := out / "table2.md").exists():
        print(table.read_text(encoding="utf-8"))
    if stop.reason:
        outcomes.append(Outcome("timing", None, stop.reason))
    return verdict("optimizers", outcomes, out)


def _saved(out: Path, optimizer: str, seed: int) -> Outcome:
    """A job as its checkpoint left it, if it has one."""
    path = checkpoint_path(out, optimizer, seed)
    return Outcome(job_name(optimizer, seed), load_checkpoint(path) if path.exists() else None)


if __name__ == "__main__":
    sys.exit(main())
