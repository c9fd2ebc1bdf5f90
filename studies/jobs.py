"""The jobs of a study, which run side by side, can be stopped at any iteration, and are resumed; and their folder.

joblib runs them. `--jobs J` asks for J processes on this machine. Without it they go to the backend that the
caller has set, such as Ray or Dask on a cluster whose workers see DIR, and else run one after the other:

    with joblib.parallel_config("ray"):
        studies.optimizers.main(["--preset", "paper", "--out", "DIR"])
"""

import argparse
import dataclasses
import json
import math
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import joblib
import torch
from tqdm import tqdm

from kfacerr.checks import whole
from kfacerr.command import check_at_least, path, say
from kfacerr.exceptions import InputError
from kfacerr.files import check_folder, clear, lock, write_atomically, write_text
from studies.data import load_dataset
from studies.environment import environment, select_device
from studies.images import Dataset

__all__ = [
    "SIGNAL",
    "Outcome",
    "Run",
    "Stop",
    "add_data_arguments",
    "add_job_arguments",
    "advance",
    "alone",
    "begin",
    "in_parallel",
    "load_checkpoint",
    "open_output",
    "run_job",
    "save_checkpoint",
    "slug",
    "threads_of_a_job",
    "verdict",
]

Preset = TypeVar("Preset")

CHECKPOINT_SECONDS = 300
PROGRESS_SECONDS = 120
SIGNAL = "by a signal"
STEP_LIMIT = "at the step limit"


# ------------------------------------------------------------------------------------------- output folder


def open_output(out: Path, config: dict[str, Any], resume: bool) -> None:
    """Makes DIR, or checks that what is there belongs to the same study.

    Raises:
        InputError: DIR holds a study already (without resume), or another one (with it).
    """
    path = out / "config.json"
    if not path.exists():
        # config.json comes last: a study that is killed in between has not begun.
        write_text(out / "environment.json", json.dumps(environment(), indent=2) + "\n")
        write_text(path, json.dumps(config, indent=2) + "\n")
        return
    if not resume:
        raise InputError(f"{out} holds a study already: continue it with --resume or name another --out")
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as a study's configuration: {error}") from None
    if not isinstance(there, dict):
        raise InputError(f"{path}: not a study's configuration")
    for key, value in config.items():
        if there.get(key) != value:
            raise InputError(f"{path}: {key} is {there.get(key)} there and {value} here")


def slug(*names: object) -> str:
    """Names as one part of a file's: "R-KFAC T_inv=50", 3 -> "r-kfac-t_inv50-3"."""
    return "-".join(str(name).lower().replace(" ", "-").replace("=", "") for name in names)


_CHECKPOINT = {"format": "kfacerr-checkpoint", "version": 1}
_ANEW = "remove it to begin this job anew"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers, strings and containers of them, atomically."""
    write_atomically(path, lambda temporary: torch.save({**_CHECKPOINT, "state": state}, temporary))


def load_checkpoint(path: Path, holds: Collection[str] = ()) -> dict[str, Any]:
    """What `save_checkpoint` saved, with its tensors on the CPU. Executes nothing in the file.

    Raises:
        InputError: there is none, or it is cut short, corrupt, or not one of ours with all that it is to hold.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as container:
            damaged = container.testzip()  # torch.save writes a CRC-32 of every tensor, and torch.load trusts
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds on a bad file
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    if damaged:
        raise InputError(f"{path}: damaged, {damaged} does not fit its checksum: {_ANEW}")
    if not isinstance(content, dict) or {key: content.get(key) for key in _CHECKPOINT} != _CHECKPOINT:
        raise InputError(f"{path}: not a checkpoint of this version of kfacerr")
    state: dict[str, Any] = content.get("state")  # type: ignore[assignment]
    if not isinstance(state, dict) or not set(holds) <= state.keys():
        raise InputError(f"{path}: not a checkpoint of such a job: {_ANEW}")
    return state


# -------------------------------------------------------------------------------------------- command line


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained on, where, and where the results go: the options of everything that trains."""
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="where the results go")
    parser.add_argument("--data", type=path, metavar="DIR", help="where the images are (default: see the docs)")
    parser.add_argument(
        "--accept-modified-data", action="store_true", help="take images that are not the official"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a study of several jobs, which can be interrupted."""
    parser.add_argument("--seed", type=int, nargs="+", metavar="S", help="seeds (default: the preset's)")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop after S seconds, resumable")
    parser.add_argument("--step-limit", type=int, metavar="N", help="stop each job after N iterations, resumable")
    parser.add_argument("--jobs", type=int, metavar="J", help="processes to run side by side (default: one)")
    parser.add_argument("--resume", action="store_true", help="continue what DIR holds")


def with_seeds(preset: Preset, arguments: argparse.Namespace) -> Preset:
    """The preset with the seeds that --seed names, if it names any."""
    return dataclasses.replace(preset, seeds=tuple(dict.fromkeys(arguments.seed))) if arguments.seed else preset  # type: ignore[type-var]


def begin(
    arguments: argparse.Namespace,
    preset: Any,
    about: Callable[[Dataset], dict[str, Any]],
    *,
    n_test: int | None = None,
    resume: bool = False,
) -> tuple[Dataset, "Stop"]:
    """What every study of several jobs does before its first: the options checked, the data read, DIR opened.

    Args:
        arguments: of `add_data_arguments` and `add_job_arguments`.
        preset: a dataclass with fields dataset, n_train and seeds.
        about: what else config.json says beside the preset and the name of the data.
        n_test: test images used; None for all.
        resume: go on with what DIR holds, whatever the options say.
    """
    select_device(arguments.device)
    check_at_least(
        jobs=(arguments.jobs, 1),
        seed=(min(preset.seeds), 0),
        time_limit=(arguments.time_limit, 0),
        step_limit=(arguments.step_limit, 0),
    )
    whole(max(preset.seeds), "--seed", 0, 2**63 - 1)  # of torch's generators
    dataset = load_dataset(
        preset.dataset,
        arguments.data,
        accept_modified=arguments.accept_modified_data,
        n_train=preset.n_train,
        n_test=n_test,
    )
    told = {"data": dataset.name, "threads": threads_of_a_job(arguments.jobs), **about(dataset)}
    config = json.loads(json.dumps({**dataclasses.asdict(preset), **told}))
    open_output(arguments.out, config, resume or arguments.resume)
    return dataset, Stop(arguments.out / "state" / "stopped", arguments.time_limit, arguments.step_limit)


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
    def seconds_left(self, mean: float) -> float: ...
    def results(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Outcome(NamedTuple):
    """What became of a job: its results if there are any, why it stopped, or what went wrong."""

    name: str
    state: dict[str, Any] | None
    stopped: str = ""
    error: str = ""


def run_job(
    name: str, checkpoint: Path, make_run: Callable[[], Run], stop: "Stop", holds: Collection[str] = ()
) -> Outcome:
    """Takes a run as far as `stop` allows, from where its checkpoint left it; for whatever process it runs in.

    Args:
        name: of the job.
        checkpoint: where it is saved.
        make_run: makes the run from its beginning.
        stop: asked before every iteration.
        holds: what its results are, by name.

    Returns:
        What became of it.

    Raises:
        InputError: the checkpoint is not one of such a job.
    """
    saved = load_checkpoint(checkpoint, (*holds, "finished")) if checkpoint.exists() else None
    if saved is not None and saved["finished"]:
        return Outcome(name, saved)
    with stop.listening():
        if stop():
            return Outcome(name, saved, stop.reason)
        run = make_run()
        try:
            if saved is not None:
                _take_up(run, saved, checkpoint)
                saved = None  # it may be as large as the run
            advance(run, checkpoint, stop)
            return Outcome(name, run.results(), stop.reason)
        except InputError as error:
            return Outcome(name, run.results(), error=str(error))
        finally:
            run.close()


def _take_up(run: Run, saved: dict[str, Any], checkpoint: Path) -> None:
    try:
        run.load_state_dict(saved)
    except InputError:
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # torch's and ours
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{checkpoint}: not a checkpoint of such a job ({reason:.200}): {_ANEW}") from error


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
                left = run.seconds_left((now - started) / (run.position - first))
                say(_progress(run, now - started, left))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(checkpoint, run.state_dict())
                saved = time.monotonic()
    save_checkpoint(checkpoint, run.state_dict())


def _progress(run: Run, elapsed: float, left: float) -> str:
    """One line of a log."""
    clock = tqdm.format_interval
    return f"{run.name}: iteration {run.position} of {run.end}, {clock(elapsed)} so far, {clock(left)} left"


def in_parallel(jobs: Iterable[Any], count: int | None) -> Iterator[Any]:
    """The results of `joblib.delayed` jobs, in order: as they come, where the backend can.

    Args:
        jobs: what to run.
        count: how many side by side, in processes of this machine that share its cores; None for the backend that
            the caller has set with `joblib.parallel_config`, or this process.
    """
    if count is not None:
        with joblib.parallel_config("loky", n_jobs=count, inner_max_num_threads=threads_of_a_job(count)):
            yield from joblib.Parallel(return_as="generator")(jobs)
        return
    backend, _ = joblib.parallel.get_active_backend()
    yield from joblib.Parallel(return_as="generator" if backend.supports_return_generator else "list")(jobs)


def threads_of_a_job(count: int | None) -> int:
    """Threads that each of `count` jobs side by side computes with: config.json says it, as sums depend on it."""
    return max(1, torch.get_num_threads() // (count or 1))


def alone(function: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
    """A command line's function, while no other process works in the DIR of its --out.

    The lock stands beside DIR, which is not made before the options are checked. What a killed process left there
    under a temporary name is removed.
    """

    def call(arguments: argparse.Namespace) -> int | None:
        check_folder(arguments.out)
        held = lock(arguments.out.resolve())
        try:
            clear(arguments.out)
            return function(arguments)
        finally:
            held.release()

    return call


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
        say(f"{program}: stopped {', '.join(sorted(reasons))}; continue with --resume")
        return 130 if SIGNAL in reasons else 0
    say(f"{program}: results are in {out}")
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
        """Within it a first Ctrl-C, SIGTERM or SIGHUP lets the iteration finish and be saved; a second does not.

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

        names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP, and under nohup it is to be ignored
        signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        signals = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
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
