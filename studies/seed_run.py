"""One seed's training run with the errors measured along it, which can be stopped and resumed at any iteration."""

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kfacerr.algorithms import SEVEN, Algorithm
from kfacerr.array import map_arrays
from kfacerr.command import say
from kfacerr.ea import EAFactor
from kfacerr.inverse import representation
from kfacerr.process import Estimate, Process, Settings
from kfacerr.stream import Array, Step, Window
from kfacerr.study import ErrorStudy, Row
from kfacerr.torch import KFAC, ColumnHooks
from studies.config import LAYER
from studies.environment import synchronize
from studies.forecast import Pace, Sizes, Speeds, update_seconds, window_seconds
from studies.images import Dataset
from studies.jobs import slug
from studies.presets import Preset, continued
from studies.training import Training

if TYPE_CHECKING:
    from kfacerr.recorder import RecordingWriter

__all__ = ["RESULTS", "SUMMARY", "Job", "Mirror", "SeedRun", "finish_recording"]

MUCH = 300  # seconds of a window, from which on its cost is said in advance
EVALUATE_EPOCHS = 5  # epochs between looks at the test set
RESULTS = ("seed", "own", "finished", "rows", "spectra", "log", "seconds")
"""What a run's results hold."""

SUMMARY = ("above_damping", "at_r", "at_r_plus_n", "tail")
"""What a monitored run keeps of a spectrum, see `SeedRun._summary`."""


class Mirror(Process):
    """Shows an error study what an optimizer's process holds: the optimizer updates it, the study measures it."""

    _shown: Estimate | None = None

    def show(self, process: Process, dtype: torch.dtype) -> None:
        """Takes over what the optimizer's process holds now, in the study's precision."""
        held = process.estimate
        if held is self._shown or held is None:
            return
        low = map_arrays(held.lowrank.state_dict(), lambda array: array.to(dtype))
        self._shown, self.estimate = held, Estimate(representation(low), held.trace.to(dtype))

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        """Nothing: that is the optimizer's."""


class Job(NamedTuple):
    """One seed's run.

    Attributes:
        own: the one algorithm that drives the run and is measured on it, or None for all on a shared run.
        monitor: the whole training is one window, measured where the factors are updated.
    """

    seed: int
    own: str | None = None
    monitor: bool = False

    @property
    def name(self) -> str:
        return f"seed {self.seed}" + (f", {self.own}" if self.own else "")

    @property
    def file(self) -> str:
        """What its files are called."""
        return slug("seed", self.seed, *filter(None, (self.own,)))


class SeedRun:
    """One seed's training run with the errors measured along it: everything in `state_dict`.

    Args:
        preset: what to do.
        dataset: to train on.
        job: which run.
        device: to run on.
        recording: where to write the layer's K-factor recording, or None.
    """

    def __init__(
        self, preset: Preset, dataset: Dataset, job: Job, device: str, recording: Path | None = None
    ) -> None:
        steps_per_epoch = len(dataset.train_images) // preset.batch_size
        self.preset, self.job = preset, job
        self.windows = preset.windows(steps_per_epoch)
        self.end = self.windows[-1].start + self.windows[-1].length
        if job.monitor:
            self.windows = [Window(0, self.end)]
        config = preset.training_config(job.own or preset.driver, job.seed, steps_per_epoch, device)
        self.training = Training(config, dataset)
        self.hooks = ColumnHooks(self.training.model, [LAYER])
        self._mirrors = {"A": Mirror(), "G": Mirror()}
        self.study = self._make_study()
        self.rows: list[Row] = []
        self.spectra: list[tuple[int, str, list[float]]] = []
        self.log: list[tuple[int, float, float]] = []
        self.seconds = {"training": 0.0, "measurement": 0.0}
        self.recording = recording
        self._writer: RecordingWriter | None = None
        self._pace = self._forecast()

    def _make_study(self) -> ErrorStudy:
        """What is measured, and how."""
        preset, schedules = self.preset, self.preset.schedules
        settings = Settings(
            rank=schedules.rank(0),
            rho=preset.rho,
            oversampling=schedules.oversampling(0),
            n_pwr_it=preset.n_pwr_it,
            seed=self.job.seed,
        )
        if self.job.monitor:
            names = continued([Algorithm.parse(name) for name in (*SEVEN, *preset.beyond)], ("min", "trace"))
            return ErrorStudy(names, settings, self.windows, damping="common", certify=True)
        if self.job.own:
            own = continued([Algorithm.parse(self.job.own)], preset.continuations)
            pair = self._mirrors["A"], self._mirrors["G"]
            return ErrorStudy({str(name): pair for name in own}, settings, self.windows)
        return ErrorStudy(preset.algorithms, settings, self.windows)

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def position(self) -> int:
        return self.training.k

    @property
    def finished(self) -> bool:
        return self.training.k >= self.end

    # -------------------------------------------------------------------------------------------- an iteration

    def advance(self) -> None:
        """One iteration of training, and of measurement where it is due."""
        training, k, epoch = self.training, self.training.k, self.training.epoch
        update, measured = self._kind(k)
        self.hooks.enabled = update or measured
        if self.job.own and self._starts(k):
            for process in self._optimizer_processes().values():
                process.restart(k)
        started = time.perf_counter()
        training.step()
        if self.hooks.enabled:
            synchronize(training.device)
        trained = time.perf_counter()
        if self.hooks.enabled:
            self._measure(k, epoch, update)
        done = time.perf_counter()
        self.seconds["training"] += trained - started
        self.seconds["measurement"] += done - trained
        self._pace.took((update, measured), done - started)
        if training.k % (EVALUATE_EPOCHS * training.steps_per_epoch) == 0 or self.finished:
            self.log.append((epoch, *training.evaluate()))

    def _kind(self, k: int) -> tuple[bool, bool]:
        """Whether iteration k updates the factors, and whether it is measured."""
        update = k % self.preset.T_updt == 0
        return update, self.study.window(k) is not None and (update or not self.job.monitor)

    def _starts(self, k: int) -> bool:
        """Whether iteration k is a window's first."""
        return any(window.start == k for window in self.windows)

    def _measure(self, k: int, epoch: int, update: bool) -> None:
        dtype, schedules = getattr(torch, self.preset.dtype), self.preset.schedules
        if self.job.own:
            for side, process in self._optimizer_processes().items():
                self._mirrors[side].show(process, dtype)
        columns = self.hooks.pop()[LAYER]
        step = Step(k, columns.A.to(dtype), columns.G.to(dtype), update, schedules.phi(epoch))
        self.study.configure(rank=schedules.rank(epoch), oversampling=schedules.oversampling(epoch))
        rows = self.study.push(step)
        self._record(step)
        if self.job.monitor:
            self.rows += [row._replace(epoch=epoch) for row in rows]
            first = -(-epoch * self.training.steps_per_epoch // self.preset.T_updt) * self.preset.T_updt
            if k == first:
                self.spectra += [(epoch, side, self._summary(side, epoch)) for side in "AG"]
        else:
            self.rows += rows
            if self._starts(k):
                self.spectra += [(epoch, side, self.study.spectrum(side).tolist()) for side in "AG"]

    def _summary(self, side: str, epoch: int) -> list[float]:
        """Eigenvalues above the damping, lambda_r and lambda_{r+n} over lambda_1, the trace's share beyond r."""
        w = np.maximum(self.study.spectrum(side), 0.0)
        r, phi = self.preset.schedules.rank(epoch), self.preset.schedules.phi(epoch)
        above = float((w > phi * w[0]).sum())
        return [
            above,
            float(w[r] / w[0]),
            float(w[r + self.preset.batch_size] / w[0]),
            float(w[r:].sum() / w.sum()),
        ]

    def _optimizer_processes(self) -> dict[str, Process]:
        """The processes of the layer's factors in the optimizer that drives a run of its own."""
        assert isinstance(self.training.optimizer, KFAC)
        factors = self.training.optimizer.layers[LAYER].factors
        return {side: process for side, factor in factors.items() for process in factor.processes.values()}

    def _record(self, step: Step) -> None:
        if self.recording is None:
            return
        if self._writer is None:
            from kfacerr.recorder import RecordingWriter

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

    # ------------------------------------------------------------------------------------------ the time it takes

    def seconds_left(self, mean: float) -> float:
        """What the iterations still to come will take."""
        return self._pace.seconds(Counter(map(self._kind, range(self.training.k, self.end))).items())

    def _forecast(self) -> Pace:
        """Says what a window will cost, if that is much."""
        preset, fc0 = self.preset, self.training.model.fc0
        d_A = fc0.in_features + (fc0.bias is not None)
        rank = preset.schedules.rank(0)
        sizes = Sizes(d_A, fc0.out_features, preset.batch_size, rank, len(self.study.names))
        speeds = Speeds.measured(getattr(torch, preset.dtype), self.training.device)
        update, plain = update_seconds(sizes, speeds), window_seconds(sizes, speeds, 1, 0)
        window = window_seconds(sizes, speeds, preset.window_length, -(-preset.window_length // preset.T_updt))
        if window > MUCH:
            say(
                f"{self.name}: factors of order {sizes.d_A} and {sizes.d_G}; products run at "
                f"{speeds.gemm / 1e9:.0f} GFLOP/s here and a Cholesky inverse at {speeds.cholesky / 1e9:.0f}, so "
                f"that a measured update takes about {update:.0f} s and a window {window / 60:.0f} min"
            )
        return Pace({(False, True): plain, (True, True): plain + update})

    # ---------------------------------------------------------------------------------------------------- state

    def results(self) -> dict[str, Any]:
        """What has been measured so far."""
        return {
            "seed": self.job.seed,
            "own": self.job.own,
            "finished": self.finished,
            "rows": [tuple(row) for row in self.rows],
            "spectra": self.spectra,
            "log": self.log,
            "seconds": self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """The results, and what a resume needs if the run is not finished."""
        if self.finished:
            return self.results()
        return {**self.results(), "training": self.training.state_dict(), "study": self.study.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave of an unfinished run."""
        self.rows = [Row(*row) for row in state["rows"]]
        self.spectra, self.log, self.seconds = state["spectra"], state["log"], state["seconds"]
        self.training.load_state_dict(state["training"])
        device = self.training.device
        self.study.load_state_dict(map_arrays(state["study"], lambda array: array.to(device)))


def finish_recording(path: Path) -> None:
    """Gives a finished run's recording its name, if the process died between the last checkpoint and that."""
    from kfacerr.recorder import RecordingWriter

    if not path.exists() and path.with_name(path.name + ".partial").exists():
        RecordingWriter(path, resume=True).close()
