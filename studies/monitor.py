"""Whole-run monitoring: the four errors at every K-factor update of an entire training, and the certificates.

    python -m studies.monitor --preset digits|cifar10-small|paper [--data DIR] [--seed S ...] --out DIR

The paper measured two windows, since more was too expensive. Here all of the training is measured, with one
damping for all (the reference's), so that the certified bound on metrics (1) and (2) can stand beside the true
error. Periods count from iteration 0. DIR gets monitor.csv (its metrics `certified_A` and `certified_G` are
the bounds, where an algorithm has one), spectrum.csv, overhead.csv, monitor.pdf and .png. Stops and resumes as
`studies.inverse_errors` does.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch

from figures.monitor import render_monitor
from kfacerr.algorithms import SEVEN, Settings
from kfacerr.cli import Parser
from kfacerr.inverse import DampedInverse
from kfacerr.stream import Step, Window
from kfacerr.study import ErrorStudy, Row
from studies.data import Dataset
from studies.inverse_errors import LAYER, SeedRun
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

__all__ = ["MonitoredRun", "main"]

EXTRA = ("B-R-KFAC adaptive=1.2", "FD")
"""Beside the seven: overwriting when the certificate has grown by a fifth, and Frequent Directions."""


class MonitoredRun(SeedRun):
    """A training run whose every K-factor update is measured."""

    def __init__(self, preset: Preset, dataset: Dataset, seed: int, device: str) -> None:
        super().__init__(preset, dataset, seed, device)
        self.seconds = {"training": 0.0, "measurement": 0.0}
        self.decay: list[tuple[int, str, int, float, float, float]] = []

    def _make_study(self, settings: Settings) -> ErrorStudy:
        return ErrorStudy(
            [*SEVEN, *EXTRA],
            settings,
            [Window(0, self.end)],
            continuations=("min", "trace"),
            damping="common",
        )

    def _advance(self) -> None:
        training, preset = self.training, self.preset
        k, epoch = training.k, training.epoch
        update = k % preset.T_updt == 0
        self.hooks.enabled = update
        started = self._clock()
        training.step()
        trained = self._clock()
        if update:
            columns = self.hooks.pop()[LAYER]
            dtype = getattr(torch, preset.dtype)
            phi = preset.phi(epoch)
            step = Step(k, columns.A.to(dtype), columns.G.to(dtype), True, phi)
            self.study.tune(rank=preset.rank(epoch), oversampling=preset.oversampling(epoch))
            rows = self.study.push(step) + self._certified(k)
            self.rows += [row._replace(epoch=epoch) for row in rows]
            if k == -(-epoch * training.steps_per_epoch // preset.T_updt) * preset.T_updt:
                self.decay += [self._spectrum(epoch, side, phi) for side in "AG"]
        self.seconds["training"] += trained - started
        self.seconds["measurement"] += self._clock() - trained

    def _clock(self) -> float:
        if self.training.device.type == "cuda":
            torch.cuda.synchronize(self.training.device)
        return time.perf_counter()

    def _certified(self, k: int) -> list[Row]:
        """The certified bounds on metrics (1) and (2), of the algorithms that have one now."""
        rows = []
        for side, state in self.study.sides.items():
            for name, process in state.processes.items():
                known, estimate = process.certificate, process.estimate
                if known is None or estimate is None:
                    continue
                for kind in self.study.continuations:
                    inverse = state.held[name, kind].inverse
                    tau = inverse.tau if isinstance(inverse, DampedInverse) else 0 * state.lam
                    bound = float(known.relative_inverse_bound(estimate.lowrank, state.lam, tau))
                    rows.append(Row(name, k, f"certified_{side}", bound, 0, kind))
        return rows

    def _spectrum(self, epoch: int, side: str, phi: float) -> tuple[int, str, int, float, float, float]:
        """(epoch, side, eigenvalues above the damping, lambda_r and lambda_{r+n} over lambda_1, tail beyond r)."""
        w = np.maximum(self.study.spectrum(side), 0.0)
        r, n = self.preset.rank(epoch), self.preset.batch_size
        above = int((w > phi * w[0]).sum())
        return epoch, side, above, float(w[r] / w[0]), float(w[r + n] / w[0]), float(w[r:].sum() / w.sum())

    def results(self) -> dict[str, Any]:
        return {**super().results(), "seconds": self.seconds, "decay": self.decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seconds, self.decay = state["seconds"], [tuple(entry) for entry in state["decay"]]


def write_results(out: Path, states: Sequence[dict[str, Any]]) -> None:
    """The tables and the figure from the seeds' states, finished or not."""
    frames = [pd.DataFrame(s["rows"], columns=list(Row._fields)).assign(seed=s["seed"]) for s in states]
    if not frames or not sum(map(len, frames)):
        return
    write_csv(out / "monitor.csv", pd.concat(frames, ignore_index=True))
    columns = ["epoch", "factor", "above_damping", "at_r", "at_r_plus_n", "tail"]
    spectra = [pd.DataFrame(s["decay"], columns=columns).assign(seed=s["seed"]) for s in states]
    write_csv(out / "spectrum.csv", pd.concat(spectra, ignore_index=True))
    overhead = pd.DataFrame([{"seed": s["seed"], **s["seconds"]} for s in states])
    write_csv(out / "overhead.csv", overhead)
    render_monitor(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status: 0 (also when a limit stopped it), 2 bad input, 130 Ctrl-C."""
    parser = Parser(prog="python -m studies.monitor", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, choices=tuple(PRESETS))
    add_data_arguments(parser)
    add_job_arguments(parser)
    return command("monitor", parser, run, argv)


def run(arguments: argparse.Namespace) -> int:
    """The study, as the command line asks for it."""
    preset = with_seeds(PRESETS[arguments.preset], arguments)
    dataset, stop = begin(arguments, preset, study="monitor")
    jobs = [
        joblib.delayed(_run_seed)(preset, dataset, seed, arguments.device, arguments.out, stop)
        for seed in preset.seeds
    ]
    outcomes: list[Outcome] = []
    with stop.listening():
        for outcome in in_parallel(jobs, arguments.jobs):
            outcomes.append(outcome)
            write_results(arguments.out, [o.state for o in outcomes if o.state is not None])
    return verdict("monitor", outcomes, arguments.out)


def _run_seed(preset: Preset, dataset: Dataset, seed: int, device: str, out: Path, stop: Stop) -> Outcome:
    path = out / "state" / f"seed-{seed}.pt"
    return run_job(f"seed {seed}", path, lambda: MonitoredRun(preset, dataset, seed, device), stop)


if __name__ == "__main__":
    sys.exit(main())
