"""The error study of §4.2: how far is a cheap K-factor inverse from the exact one, on real training?

    python -m studies.inverse_errors --preset digits|cifar10-small|paper [--data DIR] [--seed S ...] --out DIR

With the shared trajectory (the default) there is one training run a seed, and all algorithms watch the columns of
its first FC layer. With --trajectory own each algorithm trains a network of its own, as in the paper, with the
K-FAC optimizer that it drives; the reference is a shadow EA factor of that run's columns.

DIR gets errors.csv, config.json, environment.json, Figures 1 and 2, Table 1, the spectra, and claims.md;
variants.csv and variants.pdf hold the same errors at equal rank, with the other continuations, with adaptive
overwriting and with Frequent Directions; taken.csv counts the decompositions that each took in a window. A run
that is stopped, by --time-limit, --step-limit or Ctrl-C, goes on with --resume and gives the same tables as one
that was not.
"""

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch

from figures.render import render
from kfacerr.algorithms import SEVEN, Settings
from kfacerr.cli import Parser
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from kfacerr.lowrank import LowRank
from kfacerr.process import EAFactor, Estimate, Process
from kfacerr.recorder import RecordingWriter
from kfacerr.stream import Array, Step
from kfacerr.study import ErrorStudy, Row
from kfacerr.torch import KFAC, ColumnHooks
from studies.claims import judge
from studies.data import Dataset
from studies.forecast import Pace, Sizes, Speeds, update_seconds, window_seconds
from studies.presets import PRESETS, Preset
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
from studies.training import Training, find_driver

__all__ = ["SeedRun", "main"]

LAYER = "fc0"
SPECTRA_OF = SEVEN[0]  # of own trajectories, the one whose spectra are kept
MUCH = 300  # seconds of a window, from which on its cost is said in advance
EVALUATE_EPOCHS = 5  # epochs between looks at the test set


class Driven(Process):
    """The process of an optimizer, as an error study sees it: the optimizer updates it, the study measures it."""

    _seen: Estimate | None = None

    def look(self, process: Process, dtype: torch.dtype) -> None:
        """Takes over what the optimizer's process holds, in the study's precision."""
        held = process.estimate
        self.taken = process.taken
        if held is self._seen or held is None:
            return
        low = held.lowrank
        basis, D, mix = (x if x is None else x.to(dtype) for x in (low.basis, low.D, low.mix))
        self._seen, self.estimate = held, Estimate(LowRank(basis, D, mix), held.trace.to(dtype))

    def begin(self, k: int, factor: EAFactor | None) -> None:
        pass

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        pass


class SeedRun:
    """One seed's training run with the errors measured along it: everything in `state_dict`.

    Args:
        preset: what to do.
        dataset: to train on.
        seed: of the run.
        device: to run on.
        recording: where to write the layer's K-factor recording, or None.
        own: the one algorithm that drives this run and is measured on it, or None for all on a shared run.
    """

    def __init__(
        self,
        preset: Preset,
        dataset: Dataset,
        seed: int,
        device: str,
        recording: Path | None = None,
        own: str | None = None,
    ) -> None:
        steps_per_epoch = len(dataset.train_images) // preset.batch_size
        self.preset, self.seed, self.own = preset, seed, own
        self.windows = preset.windows(steps_per_epoch)
        self.end = self.windows[-1].start + self.windows[-1].length
        config = preset.training_config(own or preset.driver, seed, steps_per_epoch, device)
        self.training = Training(config, dataset)
        if own and self._optimizer().hyper.T_updt != preset.T_updt:
            raise InputError(
                f"{own} updates every {self._optimizer().hyper.T_updt} iterations, not {preset.T_updt}"
            )
        self.hooks = ColumnHooks(self.training.model, [LAYER])
        settings = Settings(
            rank=preset.rank(0),
            rho=preset.rho,
            oversampling=preset.oversampling(0),
            n_pwr_it=preset.n_pwr_it,
            seed=seed,
        )
        self._driven = {"A": Driven(), "G": Driven()}
        self.study = self._make_study(settings)
        self.rows: list[Row] = []
        self.spectra: list[tuple[int, str, list[float]]] = []
        self.log: list[tuple[int, float, float]] = []
        self.taken: list[tuple[int, str, str, int]] = []
        self._taken_before: dict[str, dict[str, int]] = {}
        self.recording = recording
        self._writer: RecordingWriter | None = None
        self._pace = self._forecast()

    def _make_study(self, settings: Settings) -> ErrorStudy:
        """What is measured, and how."""
        preset = self.preset
        measured = {self.own: (self._driven["A"], self._driven["G"])} if self.own else preset.algorithms
        return ErrorStudy(measured, settings, self.windows, continuations=preset.continuations)

    @property
    def name(self) -> str:
        return job_name(self.seed, self.own)

    @property
    def position(self) -> int:
        return self.training.k

    @property
    def finished(self) -> bool:
        return self.training.k >= self.end

    def advance(self) -> None:
        """One iteration of training, and of measurement where it is due."""
        kind, started = self._kind(self.training.k), time.perf_counter()
        self._advance()
        self._pace.took(kind, time.perf_counter() - started)

    def _kind(self, k: int) -> tuple[bool, bool]:
        """What iteration k costs by: whether it is measured, and whether it is an update."""
        return self.study.window(k) is not None, k % self.preset.T_updt == 0

    def seconds_left(self) -> float:
        """What the iterations still to come will take."""
        return self._pace.seconds(Counter(map(self._kind, range(self.training.k, self.end))).items())

    def _forecast(self) -> Pace:
        """Says what a window will cost, if that is much."""
        preset, fc0 = self.preset, self.training.model.fc0
        inverses = len(self.study.names) * len(preset.continuations)
        d_A = fc0.in_features + (fc0.bias is not None)
        sizes = Sizes(d_A, fc0.out_features, preset.batch_size, preset.rank(0), inverses)
        speeds = Speeds.measured(getattr(torch, preset.dtype), self.training.device)
        updates = -(-preset.window_length // preset.T_updt)
        update = update_seconds(sizes, speeds)
        window = window_seconds(sizes, speeds, preset.window_length, updates)
        if window > MUCH:
            print(
                f"{self.name}: factors of order {sizes.d_A} and {sizes.d_G}; products run at "
                f"{speeds.gemm / 1e9:.0f} GFLOP/s here and a Cholesky inverse at {speeds.cholesky / 1e9:.0f}, so "
                f"that a measured update takes about {update:.0f} s and a window {window / 60:.0f} min",
                file=sys.stderr,
                flush=True,
            )
        plain = window_seconds(sizes, speeds, 1, 0)
        return Pace({(True, False): plain, (True, True): plain + update})

    def _advance(self) -> None:
        training, preset = self.training, self.preset
        k, epoch = training.k, training.epoch
        update = k % preset.T_updt == 0
        window = self.study.window(k)
        self.hooks.enabled = update or window is not None
        starts = window is not None and k == window.start
        if self.own and starts:
            for process in self._optimizer_processes().values():
                process.restart(k)
        training.step()
        if self.hooks.enabled:
            if self.own:
                for side, process in self._optimizer_processes().items():
                    self._driven[side].look(process, getattr(torch, preset.dtype))
            columns = self.hooks.pop()[LAYER]
            dtype = getattr(torch, preset.dtype)
            step = Step(k, columns.A.to(dtype), columns.G.to(dtype), update, preset.phi(epoch))
            self.study.tune(rank=preset.rank(epoch), oversampling=preset.oversampling(epoch))
            if starts:
                self._taken_before = self._taken()
            self.rows += self.study.push(step)
            self._record(step)
        if window is not None and k == window.start + window.length - 1:
            self.taken += [
                (window.epoch, name, side, count - self._taken_before[side][name])
                for side, counts in self._taken().items()
                for name, count in counts.items()
            ]
        if window is not None and starts:
            self.spectra += [(window.epoch, side, self.study.spectrum(side).tolist()) for side in "AG"]
        if training.k % (EVALUATE_EPOCHS * training.steps_per_epoch) == 0 or self.finished:
            self.log.append((epoch, *training.evaluate()))

    def _taken(self) -> dict[str, dict[str, int]]:
        """The decompositions that each algorithm has taken so far, by factor."""
        sides = self.study.sides.items()
        return {side: {n: p.taken for n, p in state.processes.items()} for side, state in sides}

    def _optimizer(self) -> KFAC:
        """What drives a run on its own trajectory."""
        optimizer = self.training.optimizer
        assert isinstance(optimizer, KFAC)
        return optimizer

    def _optimizer_processes(self) -> dict[str, Process]:
        """The processes of the layer's factors in that optimizer."""
        return {side: factor.process for side, factor in self._optimizer().layers[LAYER].factors.items()}

    def _record(self, step: Step) -> None:
        if self.recording is None:
            return
        if self._writer is None:
            resume = step.k > 0  # whatever lies there at the first iteration is of a run that was never saved
            self._writer = RecordingWriter(self.recording, resume=resume, overwrite=not resume)
            self._writer.add_layer(
                LAYER,
                d_A=step.A.shape[0],
                d_G=step.G.shape[0],
                n=step.A.shape[1],
                bias=self.training.model.fc0.bias is not None,
                batch_size=self.preset.batch_size,
                update_every=self.preset.T_updt,
                windows=self.windows,
            )
            self._writer.truncate(LAYER, step.k)
        self._writer.append(LAYER, step)

    def close(self) -> None:
        """Ends the recording: it takes its name if the run is finished, and stays partial if not."""
        self.hooks.close()
        if self._writer is not None:
            (self._writer.close if self.finished else self._writer.suspend)()

    def results(self) -> dict[str, Any]:
        """What has been measured so far."""
        return {
            "seed": self.seed,
            "own": self.own,
            "finished": self.finished,
            "rows": [tuple(row) for row in self.rows],
            "spectra": self.spectra,
            "log": self.log,
            "taken": self.taken,
        }

    def state_dict(self) -> dict[str, Any]:
        """The results, and what a resume needs if the run is not finished."""
        if self.finished:
            return self.results()
        return self.results() | {
            "training": self.training.state_dict(),
            "study": self.study.state_dict(),
            "taken_before": self._taken_before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = [Row(*row) for row in state["rows"]]
        self.spectra, self.log = state["spectra"], state["log"]
        self.taken, self._taken_before = state["taken"], state["taken_before"]
        self.training.load_state_dict(state["training"])
        self.study.load_state_dict(_to(state["study"], self.training.device))


def _to(state: Any, device: torch.device) -> Any:
    """Nested containers with their tensors on `device`."""
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, dict):
        return {key: _to(value, device) for key, value in state.items()}
    return state


# ------------------------------------------------------------------------------------------- what DIR holds


def job_name(seed: int, own: str | None) -> str:
    return f"seed {seed}" + (f", {own}" if own else "")


def checkpoint_path(out: Path, seed: int, own: str | None = None) -> Path:
    return out / "state" / f"{_slug(seed, own)}.pt"


def _slug(seed: int, own: str | None) -> str:
    """What a job's files are called."""
    return f"seed-{seed}" + (f"-{own.lower().replace(' ', '-').replace('=', '')}" if own else "")


def write_results(out: Path, dataset: str, states: Sequence[dict[str, Any]]) -> None:
    """Every table and figure from the seeds' states, finished or not."""
    if not states:
        return
    frames = [pd.DataFrame(s["rows"], columns=list(Row._fields)).assign(seed=s["seed"]) for s in states]
    frame = pd.concat(frames, ignore_index=True)
    main = frame.algorithm.isin(SEVEN) & (frame.continuation == "min")
    write_csv(out / "errors.csv", frame[main])
    write_csv(out / "variants.csv", frame[~main])
    spectra = [
        pd.DataFrame({"seed": s["seed"], "epoch": e, "factor": side, "index": range(len(w)), "eigenvalue": w})
        for s in states
        if s.get("own") in (None, SPECTRA_OF)
        for e, side, w in s["spectra"]
    ]
    if spectra:
        write_csv(out / "spectra.csv", pd.concat(spectra, ignore_index=True))
    log = [(s.get("own") or "shared", s["seed"], *entry) for s in states for entry in s["log"]]
    columns = ["trajectory", "seed", "epoch", "test_loss", "test_accuracy"]
    write_csv(out / "training.csv", pd.DataFrame(log, columns=columns))
    taken = [(s["seed"], *entry) for s in states for entry in s.get("taken", ())]
    if taken:
        write_csv(
            out / "taken.csv", pd.DataFrame(taken, columns=["seed", "epoch", "algorithm", "factor", "taken"])
        )
    if len(frame):
        write_text(out / "claims.md", judge(frame, dataset))
        render(out)


# --------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status: 0 (also when a limit stopped it), 2 bad input, 130 Ctrl-C."""
    return command("inverse_errors", _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--monitor", action="store_true", help="measure the whole training, see studies.monitor, not two windows"
    )
    parser.add_argument("--record", action="store_true", help="also write each seed's K-factor recording")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.monitor:
        return _monitor(arguments)
    if arguments.driver and arguments.trajectory == "own":
        raise InputError("--driver is for the shared trajectory: on its own each algorithm drives itself")
    preset = with_seeds(PRESETS[arguments.preset], arguments)
    if arguments.driver:
        preset = dataclasses.replace(preset, driver=arguments.driver)
    find_driver(preset.driver)
    dataset, stop = begin(arguments, preset, layer=LAYER, trajectory=arguments.trajectory)
    jobs = [
        joblib.delayed(run_seed)(
            preset, dataset, seed, own, arguments.device, arguments.out, arguments.record, stop
        )
        for seed in preset.seeds
        for own in (SEVEN if arguments.trajectory == "own" else (None,))
    ]
    outcomes: list[Outcome] = []
    with stop.listening():
        for outcome in in_parallel(jobs, arguments.jobs):
            outcomes.append(outcome)
            write_results(arguments.out, dataset.name, [o.state for o in outcomes if o.state is not None])
    table = arguments.out / "table1.md"
    if table.exists():
        print(table.read_text(encoding="utf-8"))
    return verdict("inverse_errors", outcomes, arguments.out)


def _monitor(arguments: argparse.Namespace) -> int:
    from studies.monitor import run  # which builds on this module

    if arguments.record or arguments.driver or arguments.trajectory == "own":
        raise InputError("--monitor goes with none of --record, --driver and --trajectory own")
    return run(arguments)


def run_seed(
    preset: Preset,
    dataset: Dataset,
    seed: int,
    own: str | None,
    device: str,
    out: Path,
    record: bool,
    stop: Stop,
) -> Outcome:
    """Takes one seed's run as far as `stop` allows; a job of its own, whatever process it runs in."""
    recording = out / f"recording-{_slug(seed, own)}.h5" if record else None
    return run_job(
        job_name(seed, own),
        checkpoint_path(out, seed, own),
        lambda: SeedRun(preset, dataset, seed, device, recording, own),
        stop,
    )


if __name__ == "__main__":
    sys.exit(main())
