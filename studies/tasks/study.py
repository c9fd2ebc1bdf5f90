"""Rivals, tuned alike: every optimizer on every task, over the same number of learning rates.

    python -m studies.optimizers --preset tasks [--data DIR] [--jobs J] --out DIR

1. tune: each optimizer trains each task with one seed at each learning rate of its grid. The best is that of the
   least final training loss. If it is at the grid's edge, the grid grows by one beyond it, at most twice.
2. final: at that rate it trains with fresh seeds.

Along all runs of the K-FAC family the errors of their inverses are measured, which changes none of them.

DIR gets trials.csv (a row an epoch of everything tried), errors.csv (the mean of each metric in each of those
runs), timing.csv, config.json, environment.json; and from these, see `figures.tasks`, tasks.csv and tasks.md, the
correlations, the curves and the scatter. A study that is stopped, between two trials, goes on with --resume. Times
are of whole runs, alone and in turns, after the trials: --timing-only does this last part alone.

`--preset search` is on other tasks, by which default settings may be chosen: of `CANDIDATES`, or of those that
--optimizers names, such as "R-KFAC phi_lambda=0.01 momentum=0.9". It measures no errors.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import pandas as pd

from kfacerr.command import Parser, check_at_least, run, say
from kfacerr.exceptions import InputError
from kfacerr.files import write_csv
from studies.bench.rounds import in_turns
from studies.environment import select_device
from studies.jobs import (
    Outcome,
    Stop,
    add_data_arguments,
    add_job_arguments,
    alone,
    in_parallel,
    load_checkpoint,
    open_output,
    save_checkpoint,
    slug,
    threads_of_a_job,
    verdict,
    with_seeds,
)
from studies.tasks.contestants import CANDIDATES, CONTESTANTS, LADDER, find_contestant, grid, missing
from studies.tasks.errors import measured
from studies.tasks.problems import SEARCH, TASKS, Source, Task
from studies.tasks.trials import Epoch, Run, Trial, train

__all__ = ["PRESETS", "TasksPreset", "best", "extended", "main"]

RESULTS = ("epochs", "diverged", "metrics")
EXTENSIONS = 2  # rates by which a grid may grow


@dataclass(frozen=True)
class TasksPreset:
    """One such study.

    Attributes:
        name: of the preset.
        tasks: by name.
        tuning_seed: of stage 1.
        seeds: of stage 2.
        rates: learning rates of each grid.
        timing_rounds: times that each run is timed.
        errors: whether the inverses' errors are measured.
        optimizers: who trains if nobody is named.
    """

    name: str
    tasks: Mapping[str, Task]
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    rates: int = 5
    timing_rounds: int = 2
    errors: bool = True
    optimizers: tuple[str, ...] = tuple(CONTESTANTS)


PRESETS = {
    "tasks": TasksPreset("tasks", TASKS),
    "search": TasksPreset("search", SEARCH, rates=4, seeds=(1,), errors=False, optimizers=CANDIDATES),
}


@dataclass(frozen=True)
class Study:
    """What is run, where, and what came of it so far.

    Attributes:
        preset: of the command line.
        optimizers: by name.
        source: of data that are not on every machine.
        device: of `select_device`.
        jobs: processes side by side; None for the caller's backend.
        out: DIR.
        stop: asked before every trial.
        done: results by trial, in the order they were asked for.
        outcomes: of all trials.
    """

    preset: TasksPreset
    optimizers: tuple[str, ...]
    source: Source
    device: str
    jobs: int | None
    out: Path
    stop: Stop
    done: dict[Trial, dict[str, Any]]
    outcomes: list[Outcome]

    def try_all(self, trials: Sequence[Trial]) -> bool:
        """Runs trials, those that DIR holds not again; whether all are done. Writes trials.csv after each task."""
        preset, common = self.preset, (self.source, self.device, self.preset.errors, self.out, self.stop)
        calls = [joblib.delayed(run_trial)(trial, preset.tasks[trial.task], *common) for trial in trials]
        for i, (trial, outcome) in enumerate(zip(trials, in_parallel(calls, self.jobs), strict=True), 1):
            self.outcomes.append(outcome)
            if outcome.state is not None:
                self.done[trial] = outcome.state
            if i == len(trials) or trials[i].task != trial.task:
                write_tables(self.out, self.done)
        return not any(outcome.stopped or outcome.error for outcome in self.outcomes)

    def tune(self) -> bool:
        """Stage 1; whether all of it is done."""
        preset = self.preset
        rates = {
            (task, name): grid(find_contestant(name), preset.rates)
            for task in preset.tasks
            for name in self.optimizers
        }
        trials = [Trial(*key, lr, preset.tuning_seed, "tune") for key, chosen in rates.items() for lr in chosen]
        for _ in range(EXTENSIONS + 1):
            if not self.try_all(trials):
                return False
            trials = [
                Trial(*key, lr, preset.tuning_seed, "tune") for key in rates for lr in extended(self.losses(*key))
            ]
        return True

    def losses(self, task: str, optimizer: str) -> dict[float, float]:
        """Final training losses of stage 1, by learning rate."""
        return {
            trial.lr: Epoch(*state["epochs"][-1]).train_loss
            for trial, state in self.done.items()
            if (trial.task, trial.optimizer, trial.stage) == (task, optimizer, "tune")
        }

    def finals(self) -> list[Trial]:
        """The trials of stage 2."""
        return [
            Trial(task, name, best(self.losses(task, name)), seed, "final")
            for task in self.preset.tasks
            for name in self.optimizers
            for seed in self.preset.seeds
        ]

    def time(self) -> None:
        """Rounds of whole runs at the best rates, in turns, task after task; none of those timed already."""
        path = self.out / "timing.csv"
        frames = [pd.read_csv(path)] if path.exists() else []
        for task in self.preset.tasks:
            chosen = [name for name in self.optimizers if self.losses(task, name)]
            if self.stop() or not chosen or any((frame.task == task).any() for frame in frames):
                continue
            runs = {name: partial(self._timed, task, name) for name in chosen}
            device = select_device(self.device)
            times = in_turns(runs, self.preset.timing_rounds, device, warm_up=0)
            steps = self._run(task, chosen[0]).steps
            frames.append(
                pd.DataFrame(
                    {
                        "task": task,
                        "optimizer": times.way,
                        "round": times["round"],
                        "steps": steps,
                        "ms_per_step": times.seconds / steps * 1e3,
                        "load": times.load,
                    }
                )
            )
            write_csv(path, pd.concat(frames, ignore_index=True))

    def _run(self, task: str, name: str) -> Run:
        """At its beginning, at the best rate."""
        chosen, lr = self.preset.tasks[task], best(self.losses(task, name))
        data = chosen.data(self.source)
        return Run(chosen, data, find_contestant(name), lr, self.preset.tuning_seed, self.device)

    def _timed(self, task: str, name: str, _: object) -> Any:
        run = self._run(task, name)
        yield "training", lambda: [loss for _ in range(run.task.epochs) for loss in run.epoch()]


def best(losses: Mapping[float, float]) -> float:
    """The learning rate of the least loss, the smaller of two alike."""
    return min(sorted(losses), key=losses.__getitem__)


def extended(losses: Mapping[float, float]) -> list[float]:
    """The rate beyond the best one, if that is the least or the greatest tried, and there is a rate beyond."""
    chosen = best(losses)
    step = {min(losses): -1, max(losses): 1}.get(chosen, 0)
    place = LADDER.index(chosen) + step
    return [LADDER[place]] if step and math.isfinite(losses[chosen]) and 0 <= place < len(LADDER) else []


def run_trial(
    trial: Trial, task: Task, source: Source, device: str, errors: bool, out: Path, stop: Stop
) -> Outcome:
    """One trial, unless DIR holds it; in whatever process, on whatever machine it runs."""
    path = out / "state" / f"{slug(*trial)}.pt"
    if path.exists():
        return Outcome(str(trial), load_checkpoint(path, RESULTS))
    with stop.listening():
        if stop():
            return Outcome(str(trial), None, stop.reason)
        try:
            state = result(trial, task, source, device, errors=errors)
        except InputError as error:
            return Outcome(str(trial), None, error=str(error))
        save_checkpoint(path, state)
        return Outcome(str(trial), state)


def result(trial: Trial, task: Task, source: Source, device: str, *, errors: bool) -> dict[str, Any]:
    """The trial's epochs, and of the K-FAC family the mean of each metric if `errors`."""
    contestant = find_contestant(trial.optimizer)
    run = Run(task, task.data(source), contestant, trial.lr, trial.seed, device)
    metrics: dict[str, float] = {}
    if errors and contestant.kfac:
        (epochs, diverged), metrics = measured(run)
    else:
        epochs, diverged = train(run)
    return {"epochs": [tuple(epoch) for epoch in epochs], "diverged": diverged, "metrics": metrics}


def write_tables(out: Path, done: Mapping[Trial, dict[str, Any]]) -> None:
    """trials.csv and, where errors were measured, errors.csv."""
    epochs = [
        {**trial._asdict(), **Epoch(*epoch)._asdict(), "diverged": state["diverged"]}
        for trial, state in done.items()
        for epoch in state["epochs"]
    ]
    names = ["task", "optimizer", "lr", "seed", "stage", *Epoch._fields, "diverged"]
    write_csv(out / "trials.csv", pd.DataFrame(epochs, columns=names))
    errors = [
        {
            **{name: value for name, value in trial._asdict().items() if name != "stage"},
            "metric": metric,
            "mean": mean,
            "train_loss": Epoch(*state["epochs"][-1]).train_loss,
        }
        for trial, state in done.items()
        for metric, mean in state["metrics"].items()
    ]
    if errors:
        write_csv(out / "errors.csv", pd.DataFrame(errors))


# --------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status: 0 (also when a limit stopped it), 2 bad input, 130 Ctrl-C."""
    parser = Parser(prog="python -m studies.optimizers", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, choices=tuple(PRESETS))
    add_data_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="some of them (default: all)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="some of them (default: all)")
    parser.add_argument("--rates", type=int, metavar="N", help="of each grid (default: the preset's)")
    parser.add_argument("--timing-only", action="store_true", help="train no further, take the times")
    parser.add_argument("--no-timing", action="store_true", help="train only; take the times later")
    return run("optimizers", parser, alone(_run), argv)


def _run(arguments: argparse.Namespace) -> int:
    study = _begun(arguments)
    with study.stop.listening():
        if arguments.timing_only:
            study.stop.steps = -1  # no trial begins
        whole = study.tune() and study.try_all(study.finals())
        if arguments.timing_only and not whole:
            raise InputError(
                f"{study.out}: not all is trained; continue it with --resume, and take the times then"
            )
        study.stop.steps = None
        if whole and not arguments.no_timing:
            study.time()
    write_tables(study.out, study.done)
    if any(trial.stage == "final" for trial in study.done):
        from figures.tasks import render

        render(study.out)
        print((study.out / "tasks.md").read_text(encoding="utf-8"))
    if study.stop.reason:
        study.outcomes.append(Outcome("timing", None, study.stop.reason))
    return verdict("optimizers", study.outcomes, study.out)


def _begun(arguments: argparse.Namespace) -> Study:
    """The options checked, DIR opened; a task or an optimizer that lacks something is left out with a line."""
    if arguments.timing_only and arguments.no_timing:
        raise InputError("--timing-only and --no-timing contradict each other")
    if arguments.step_limit is not None:
        raise InputError("--step-limit: a trial is not stopped within; --time-limit stops between two")
    preset = with_seeds(PRESETS[arguments.preset], arguments)
    rates = preset.rates if arguments.rates is None else arguments.rates
    check_at_least(
        jobs=(arguments.jobs, 1),
        rates=(rates, 1),
        seed=(min(preset.seeds), 0),
        time_limit=(arguments.time_limit, 0),
    )
    if preset.tuning_seed in preset.seeds:
        raise InputError(f"--seed {preset.tuning_seed} chooses the learning rates: name others for the comparison")
    device = str(select_device(arguments.device))
    optimizers = _optimizers(arguments.optimizers or preset.optimizers)
    source = Source(arguments.data, arguments.accept_modified_data)
    tasks, data = _tasks(preset, arguments.tasks, source)
    preset = replace(preset, tasks=tasks, rates=rates)
    config = {
        "preset": preset.name,
        "tasks": data,
        "optimizers": list(optimizers),
        "tuning_seed": preset.tuning_seed,
        "seeds": list(preset.seeds),
        "rates": rates,
        "threads": threads_of_a_job(arguments.jobs),
    }
    open_output(arguments.out, json.loads(json.dumps(config)), arguments.resume or arguments.timing_only)
    stop = Stop(arguments.out / "state" / "stopped", arguments.time_limit, arguments.step_limit)
    return Study(preset, optimizers, source, device, arguments.jobs, arguments.out, stop, {}, [])


def _optimizers(names: Sequence[str]) -> tuple[str, ...]:
    chosen = [find_contestant(name) for name in dict.fromkeys(names)]
    for one in chosen:
        if lacks := missing(one):
            say(f"optimizers: {one.name} is left out: it needs the package {lacks}, of the extra 'peers'")
    there = tuple(one.name for one in chosen if not missing(one))
    if not there:
        raise InputError("no optimizer is left to try")
    return there


def _tasks(
    preset: TasksPreset, names: Sequence[str] | None, source: Source
) -> tuple[dict[str, Task], dict[str, dict[str, Any]]]:
    """Those whose data are there; and what config.json says of each."""
    for name in names or ():
        if name not in preset.tasks:
            raise InputError(f"no task is called {name!r}: {', '.join(preset.tasks)}")
    tasks, told = {}, {}
    for name in dict.fromkeys(names or preset.tasks):
        task = preset.tasks[name]
        try:
            data = task.data(source)
        except InputError as error:
            if names or source.folder:
                raise
            say(f"optimizers: task {name} is left out: {error}")
            continue
        tasks[name] = task
        told[name] = {
            "data": data.name,
            "n_train": len(data.train[0]),
            "batch_size": task.batch_size,
            "epochs": task.epochs,
            "rank": task.rank,
            "layer": task.layer,
        }
    return tasks, told
