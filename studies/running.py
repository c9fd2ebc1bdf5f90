"""What studies share: their output folder, stopping and resuming, and the jobs that run side by side."""

import argparse
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import joblib
import pandas as pd
import torch
from tqdm import tqdm

from kfacerr.exceptions import InputError
from kfacerr.files import write_atomically, write_text
from studies.data import Dataset, load_cifar10, load_digits_rgb
from studies.files import environment, load_checkpoint, save_checkpoint
from studies.training import select_device

__all__ = [
    "SIGNAL",
    "Outcome",
    "Run",
    "Stop",
    "add_data_arguments",
    "add_job_arguments",
    "advance",
    "begin",
    "check_at_least",
    "check_jobs",
    "command",
    "in_parallel",
    "load_dataset",
    "open_output",
    "run_job",
    "verdict",
    "with_seeds",
    "write_csv",
]

T = TypeVar("T")

CHECKPOINT_SECONDS = 300
PROGRESS_SECONDS = 120
SIGNAL = "by a signal"
STEP_LIMIT = "at the step limit"


# ------------------------------------------------------------------------------------------- output folder


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, lambda temporary: frame.to_csv(temporary, index=False, float_format="%.8g"))


def open_output(out: Path, config: dict[str, Any], resume: bool) -> None:
    """Makes DIR, or checks that what is there belongs to the same study.

    Raises:
        InputError: DIR holds a study already (without resume), or another one (with it).
    """
    path = out / "config.json"
    if path.exists():
        if not resume:
            raise InputError(f"{out} holds a study already: continue it with --resume or name another --out")
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not readable as a study's configuration: {error}") from None
        for key, value in config.items():
            # A switch that did not exist yet was off.
            if there.get(key, False if value is False else None) != value:
                raise InputError(f"{path}: {key} is {there.get(key)} there and {value} here")
    else:
        write_text(path, json.dumps(config, indent=2) + "\n")
        write_text(out / "environment.json", json.dumps(environment(), indent=2) + "\n")


def load_dataset(
    name: str, folder: Path | None, *, accept_modified: bool, n_train: int | None, n_test: int | None = None
) -> Dataset:
    """ "digits" or "cifar10", the first `n_train` train and `n_test` test images of it (None: all)."""
    digits = name == "digits"
    dataset = load_digits_rgb() if digits else load_cifar10(folder, accept_modified=accept_modified)
    return dataset.subset(n_train, n_test)


# -------------------------------------------------------------------------------------------- command line


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained on, where, and where the results go: the options of everything that trains."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where CIFAR-10 is (default: the user's cache)")
    parser.add_argument(
        "--accept-modified-data", action="store_true", help="take images that are not the official"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a study of several jobs, which can be interrupted."""
    parser.add_argument("--seed", type=int, nargs="+", metavar="S", help="seeds (default: the preset's)")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop after S seconds, resumable")
    parser.add_argument("--step-limit", type=int, metavar="N", help="stop each job after N iterations, resumable")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="jobs to run side by side")
    parser.add_argument("--resume", action="store_true", help="continue what DIR holds")


def command(
    program: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Runs a study's command line; its exit status: what `run` returns, 2 after bad input, 130 after Ctrl-C."""
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def check_jobs(arguments: argparse.Namespace, seeds: Sequence[int]) -> None:
    """Refuses bad values of the options above before anything is written."""
    select_device(arguments.device)
    check_at_least(
        jobs=(arguments.jobs, 1),
        seed=(min(seeds), 0),
        time_limit=(arguments.time_limit, 0),
        step_limit=(arguments.step_limit, 0),
    )


def check_at_least(**options: tuple[float | None, float]) -> None:
    """Refuses an option below its least value; None is not given."""
    for option, (value, least) in options.items():
        if value is not None and not value >= least:
            raise InputError(f"--{option.replace('_', '-')} must be at least {least}, got {value}")


# ---------------------------------------------------------------------------------------------------- jobs


class Run(Protocol):
    """One job: a training run, with whatever is measured along it, that can be interrupted at any iteration."""

    @property
    def name(self) -> str: ...
    @property
    def position(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    def advance(self) -> None: ...
    def results(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Forecasting(Protocol):
    """A run that knows what its iterations still to come will take."""

    def seconds_left(self) -> float: ...


class Outcome(NamedTuple):
    """What became of a job: its results if there are any, why it stopped, or what went wrong."""

    name: str
    state: dict[str, Any] | None
    stopped: str = ""
    error: str = ""


def run_job(name: str, checkpoint: Path, make_run: Callable[[], Run], stop: "Stop") -> Outcome:
    """Takes a run as far as `stop` allows, from where its checkpoint left it; for whatever process it runs in."""
    saved = load_checkpoint(checkpoint) if checkpoint.exists() else None
    if saved is not None and saved["finished"]:
        return Outcome(name, saved)
    with stop.listening():
        if stop():
            return Outcome(name, saved, stop.reason)
        run = make_run()
        try:
            if saved is not None:
                run.load_state_dict(saved)
                saved = None  # it may be as large as the run
            advance(run, checkpoint, stop)
            return Outcome(name, run.results(), stop.reason)
        except InputError as error:
            return Outcome(name, run.results(), error=str(error))
        finally:
            run.close()


def advance(run: Run, checkpoint: Path, stop: Callable[[], bool]) -> None:
    """Runs to the end or until `stop`; saves the state every few minutes and at the end.

    Shows a bar on a terminal; elsewhere a run that takes longer says every few minutes where it is.
    """
    started = saved = said = time.monotonic()
    first = run.position
    bar = tqdm(total=run.end, initial=first, unit="step", desc=run.name, disable=None)
    with bar:
        while not run.finished and not stop():
            run.advance()
            bar.update()
            now = time.monotonic()
            if bar.disable and now - said > PROGRESS_SECONDS:
                said = now
                mean = (now - started) / (run.position - first)
                left = run.seconds_left() if isinstance(run, Forecasting) else mean * (run.end - run.position)
                print(_progress(run, now - started, left), file=sys.stderr, flush=True)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(checkpoint, run.state_dict())
                saved = time.monotonic()
    save_checkpoint(checkpoint, run.state_dict())


def _progress(run: Run, elapsed: float, left: float) -> str:
    """One line of a log."""
    clock = tqdm.format_interval
    return f"{run.name}: iteration {run.position} of {run.end}, {clock(elapsed)} so far, {clock(left)} left"


def in_parallel(jobs: Iterable[Any], count: int, cluster: str = "") -> Iterator[Any]:
    """The results of `joblib.delayed` jobs as they come, in order.

    Args:
        jobs: what to run.
        count: how many side by side, in processes of this machine that share its cores.
        cluster: "" for this machine; "current" for the backend that the caller has set with
            `joblib.parallel_config`; else the address of a Dask scheduler.
    """
    if not cluster:
        threads = max(1, torch.get_num_threads() // count)
        with joblib.parallel_config("loky", n_jobs=count, inner_max_num_threads=threads):
            yield from joblib.Parallel(return_as="generator")(jobs)
    elif cluster == "current":
        yield from joblib.Parallel()(jobs)
    else:
        with _dask(cluster), joblib.parallel_config("dask"):
            yield from joblib.Parallel()(jobs)


@contextmanager
def _dask(address: str) -> Iterator[None]:
    try:
        from distributed import Client
    except ImportError:
        raise InputError("a Dask cluster needs `pip install kfacerr[cluster]`") from None
    try:
        client = Client(address, timeout=30)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--cluster {address}: no Dask scheduler answers there: {error}") from None
    with client:
        yield


def with_seeds(preset: T, arguments: argparse.Namespace) -> T:
    """The preset with the seeds that --seed names, if it names any."""
    return dataclasses.replace(preset, seeds=tuple(dict.fromkeys(arguments.seed))) if arguments.seed else preset  # type: ignore[type-var]


def begin(
    arguments: argparse.Namespace, preset: Any, *, n_test: int | None = None, resume: bool = False, **what: Any
) -> tuple[Dataset, "Stop"]:
    """What every study of several jobs does before its first: the options checked, the data read, DIR opened.

    Args:
        arguments: of `add_data_arguments` and `add_job_arguments`.
        preset: a dataclass with fields dataset, n_train and seeds.
        n_test: test images used; None for all.
        resume: go on with what DIR holds, whatever the options say.
        what: what else config.json says beside the preset and the name of the data.
    """
    check_jobs(arguments, preset.seeds)
    dataset = load_dataset(
        preset.dataset,
        arguments.data,
        accept_modified=arguments.accept_modified_data,
        n_train=preset.n_train,
        n_test=n_test,
    )
    config = json.loads(json.dumps(dataclasses.asdict(preset) | {"data": dataset.name, **what}))
    open_output(arguments.out, config, resume or arguments.resume)
    return dataset, Stop(arguments.out / "state" / "stopped", arguments.time_limit, arguments.step_limit)


def verdict(program: str, outcomes: Sequence[Outcome], out: Path) -> int:
    """Says how the jobs ended; the exit status.

    Raises:
        InputError: one failed; the first one's message.
    """
    for outcome in outcomes:
        if outcome.error:
            raise InputError(f"{outcome.name}: {outcome.error}")
    reasons = {outcome.stopped for outcome in outcomes if outcome.stopped}
    if reasons:
        print(f"{program}: stopped {', '.join(sorted(reasons))}; continue with --resume", file=sys.stderr)
        return 130 if SIGNAL in reasons else 0
    print(f"{program}: results are in {out}", file=sys.stderr)
    return 0


class Stop:
    """Asked before every iteration of a job: whether a limit is reached or Ctrl-C was pressed.

    Args:
        marker: a file by which a signal that reached one process reaches all the others.
        time_limit: seconds from now on, or None.
        step_limit: iterations of each job, or None.
    """

    POLL_SECONDS = 0.5  # between looks at the marker, which on a cluster lies on a shared file system

    def __init__(self, marker: Path, time_limit: float | None, step_limit: int | None) -> None:
        self.marker = marker
        self.deadline = None if time_limit is None else time.time() + time_limit
        self.steps = step_limit
        self.reason = ""
        self._looked = -math.inf
        marker.unlink(missing_ok=True)

    def __call__(self) -> bool:
        if self.deadline is not None and time.time() >= self.deadline:
            self.reason = self.reason or "at the time limit"
        elif self.steps is not None and self.steps < 0:
            self.reason = self.reason or STEP_LIMIT
        elif self.steps is not None:
            self.steps -= 1
        if not self.reason and time.monotonic() - self._looked > self.POLL_SECONDS:
            self._looked = time.monotonic()
            if self.marker.exists():  # the signal may have reached another process only
                self.reason = SIGNAL
        return bool(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it a first Ctrl-C or SIGTERM lets the iteration finish and be saved; a second one does not.

        Jobs in threads of a cluster's worker cannot listen to signals; they see the marker.
        """
        steps, self._looked = self.steps, -math.inf
        if self.marker.exists():
            self.reason = SIGNAL

        def on_signal(number: int, frame: object) -> None:
            if self.reason == SIGNAL:
                raise KeyboardInterrupt
            self.reason = SIGNAL
            self.marker.parent.mkdir(parents=True, exist_ok=True)
            self.marker.touch()

        signals = (signal.SIGINT, signal.SIGTERM)
        listens = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, on_signal) for number in signals} if listens else {}
        try:
            yield
        finally:
            self.steps = steps
            if self.reason == STEP_LIMIT:
                self.reason = ""  # the limit is each job's; the others stop all
            for number, handler in before.items():
                signal.signal(number, handler)
