"""The error study of §4.2: how far is a cheap K-factor inverse from the exact one, on real training?

    python -m studies.inverse_errors --preset digits|cifar10-small|... [--data DIR] --out DIR

With the shared trajectory (the default) there is one training run a seed, and all algorithms watch the columns of
its first FC layer. With --trajectory own each algorithm trains a network of its own, as in the paper, with the
K-FAC optimizer that it drives; the reference is a shadow EA factor of that run's columns.

DIR gets errors.csv, config.json, environment.json, Figures 1 and 2, Table 1, the spectra, and claims.md;
variants.csv and variants.pdf hold the same errors at equal rank, with the other continuations and with Frequent
Directions; overhead.csv says what the measurement cost.

With --monitor the whole training is one window: the errors at every update of the K-factors, with one damping for
all (the reference's), so that the certified bounds on metrics (1) and (2) can stand beside the true errors. DIR
then gets monitor.csv, spectrum.csv and monitor.pdf.

A run that is stopped, by --time-limit, --step-limit or Ctrl-C, goes on with --resume and gives the same tables as
one that was not.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import pandas as pd

from kfacerr.algorithms import SEVEN
from kfacerr.command import Parser, run
from kfacerr.exceptions import InputError
from kfacerr.files import write_csv, write_text
from kfacerr.study import Row
from studies.claims import findings, judge
from studies.config import LAYER, family
from studies.images import Dataset
from studies.jobs import (
    Outcome,
    Stop,
    add_data_arguments,
    add_job_arguments,
    alone,
    begin,
    in_parallel,
    run_job,
    verdict,
    with_seeds,
)
from studies.presets import PRESETS, Preset
from studies.seed_run import RESULTS, SUMMARY, Job, SeedRun, finish_recording

__all__ = ["main"]

SPECTRA_OF = SEVEN[0]  # of own trajectories, the one whose spectra are kept
States = Sequence[dict[str, Any]]


def run_seed(
    preset: Preset, dataset: Dataset, job: Job, device: str, out: Path, record: bool, stop: Stop
) -> Outcome:
    """Takes one seed's run as far as `stop` allows; a job of its own, whatever process it runs in."""
    recording = out / f"recording-{job.file}.h5" if record else None
    make = partial(SeedRun, preset, dataset, job, device, recording)
    outcome = run_job(job.name, out / "state" / f"{job.file}.pt", make, stop, RESULTS)
    if recording is not None and outcome.state is not None and outcome.state["finished"]:
        finish_recording(recording)
    return outcome


# ------------------------------------------------------------------------------------------- what DIR holds


def write_results(out: Path, preset: Preset, dataset: str, states: States) -> None:
    """Every table and figure of an error study from the seeds' states, finished or not."""
    from figures.render import render

    frame = _errors(states)
    main = frame.algorithm.isin(SEVEN)
    write_csv(out / "errors.csv", frame[main])
    write_csv(out / "variants.csv", frame[~main])
    spectra = [
        pd.DataFrame({"seed": s["seed"], "epoch": e, "factor": side, "index": range(len(w)), "eigenvalue": w})
        for s in states
        if s["own"] in (None, SPECTRA_OF)
        for e, side, w in s["spectra"]
    ]
    if spectra:
        write_csv(out / "spectra.csv", pd.concat(spectra, ignore_index=True))
    _write_common(out, states)
    if len(frame):
        write_text(out / "claims.md", judge(frame, dataset, preset.setting))
        render(out)


def write_monitored(out: Path, preset: Preset, dataset: str, states: States) -> None:
    """The tables and the figure of a monitored training."""
    from figures.monitor import render_monitor

    frame = _errors(states)
    write_csv(out / "monitor.csv", frame)
    spectra = [(s["seed"], epoch, side, *w) for s in states for epoch, side, w in s["spectra"]]
    columns = ["seed", "epoch", "factor", *SUMMARY]
    write_csv(out / "spectrum.csv", pd.DataFrame(spectra, columns=columns))
    _write_common(out, states)
    if len(frame):
        render_monitor(out)


def _errors(states: States) -> pd.DataFrame:
    frames = [pd.DataFrame(s["rows"], columns=list(Row._fields)).assign(seed=s["seed"]) for s in states]
    return pd.concat(frames, ignore_index=True)


def _write_common(out: Path, states: States) -> None:
    """training.csv and overhead.csv."""
    runs = [(s["own"] or "shared", s["seed"], s) for s in states]
    log = [(own, seed, *entry) for own, seed, s in runs for entry in s["log"]]
    columns = ["trajectory", "seed", "epoch", "test_loss", "test_accuracy"]
    write_csv(out / "training.csv", pd.DataFrame(log, columns=columns))
    overhead = [{"trajectory": own, "seed": seed, **s["seconds"]} for own, seed, s in runs]
    write_csv(out / "overhead.csv", pd.DataFrame(overhead))


# --------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status: 0 (also when a limit stopped it), 2 bad input, 130 Ctrl-C."""
    parser = Parser(prog="python -m studies.inverse_errors", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, choices=tuple(PRESETS))
    add_data_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument("--driver", help="what drives the shared trajectory (default: the preset's)")
    parser.add_argument(
        "--trajectory",
        choices=("shared", "own"),
        default="shared",
        help="one run for all algorithms, or one for each",
    )
    parser.add_argument("--monitor", action="store_true", help="measure the whole training, not two windows")
    parser.add_argument("--record", action="store_true", help="also write each seed's K-factor recording")
    return run("inverse_errors", parser, alone(_run), argv)


def _run(arguments: argparse.Namespace) -> int:
    own, monitor = arguments.trajectory == "own", arguments.monitor
    if arguments.driver is not None and own:
        raise InputError("--driver is for the shared trajectory: on its own each algorithm drives itself")
    if monitor and (own or arguments.record):
        raise InputError("--monitor goes with neither --record nor --trajectory own")
    preset = with_seeds(PRESETS[arguments.preset], arguments)
    if arguments.driver is not None:
        preset = dataclasses.replace(preset, driver=arguments.driver)
    family(preset.driver)
    dataset, stop = begin(arguments, preset, partial(_about, preset, arguments))
    jobs = [Job(seed, name, monitor) for seed in preset.seeds for name in (SEVEN if own else (None,))]
    outcomes = list(
        _outcomes(preset, dataset, jobs, arguments, stop, write_monitored if monitor else write_results)
    )
    if (arguments.out / "table1.md").exists():
        print((arguments.out / "table1.md").read_text(encoding="utf-8"))
        print(findings(_errors([o.state for o in outcomes if o.state is not None]), arguments.out))
    return verdict("inverse_errors", outcomes, arguments.out)


def _about(preset: Preset, arguments: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """What config.json says beside the preset: for each window r, n and phi, which the figures quote."""
    per_epoch, schedules = len(dataset.train_images) // preset.batch_size, preset.schedules
    windows = [
        {
            "epoch": w.epoch,
            "start": w.start,
            "rank": schedules.rank(w.epoch),
            "columns": preset.batch_size,
            "phi": [schedules.phi(k // per_epoch) for k in (w.start, w.start + w.length - 1)],
        }
        for w in preset.windows(per_epoch)
    ]
    return {
        "layer": LAYER,
        "trajectory": arguments.trajectory,
        "monitor": arguments.monitor,
        "record": arguments.record,
        "setting": preset.setting,
        "windows": windows,
    }


def _outcomes(
    preset: Preset,
    dataset: Dataset,
    jobs: Sequence[Job],
    arguments: argparse.Namespace,
    stop: Stop,
    write: Callable[[Path, Preset, str, States], None],
) -> Iterator[Outcome]:
    """Runs the jobs; the tables are written anew after each."""
    device, out = arguments.device, arguments.out
    tasks = [joblib.delayed(run_seed)(preset, dataset, job, device, out, arguments.record, stop) for job in jobs]
    states: list[dict[str, Any]] = []
    with stop.listening():
        for outcome in in_parallel(tasks, arguments.jobs):
            if outcome.state is not None:
                states.append(outcome.state)
                write(out, preset, dataset.name, states)
            yield outcome


if __name__ == "__main__":
    sys.exit(main())
