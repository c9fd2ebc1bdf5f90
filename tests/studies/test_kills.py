"""A study that is killed at any of its writes is resumed to the same bytes, and nothing of the killed run stays.

What kill -9 leaves is what is on the disk at that moment. So one study runs in a process of its own, in which DIR
is copied before each file is opened for writing, renamed, removed or flushed; and each copy is resumed. Its jobs,
files and tables are those of the error study; in place of a network a number is trained.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from kfacerr.algorithms import SEVEN
from kfacerr.metrics import METRICS
from kfacerr.recording import Recording
from kfacerr.stream import Step, Window
from kfacerr.study import Row
from studies import inverse_errors, jobs
from studies.presets import PRESETS
from studies.seed_run import SeedRun
from tests.studies.helpers import tiny_dataset
from tests.studies.test_inverse_errors import TINY

OPTIONS = ("--preset", "tiny", "--device", "cpu", "--seed", "0", "--record", "--out")
RECORDING = "recording-seed-0.h5"
TIMES = {"overhead.csv", "environment.json"}  # of the clock


class Number:
    """Stands for a training: x_{k+1} = cos x_k."""

    def __init__(self) -> None:
        self.k, self.x, self.device = 0, torch.ones(3, dtype=torch.float64), torch.device("cpu")
        self.model = SimpleNamespace(fc0=SimpleNamespace(bias=None))

    def state_dict(self) -> dict[str, Any]:
        return {"k": self.k, "x": self.x}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.k, self.x = state["k"], state["x"]


class NumberRun(SeedRun):
    """A seed's run of two iterations before its window and two in it."""

    def __init__(self, preset: Any, dataset: Any, job: Any, device: str, recording: Path | None = None) -> None:
        self.preset, self.job, self.recording, self._writer = preset, job, recording, None
        self.windows, self.end = [Window(2, 2, 1)], 4
        self.training: Any = Number()
        self.study: Any = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
        self.hooks: Any = SimpleNamespace(close=lambda: None)
        self.rows, self.spectra, self.log = [], [], []
        self.seconds = {"training": 0.0, "measurement": 0.0}

    def advance(self) -> None:
        number, k = self.training, self.training.k
        X = number.x.numpy().reshape(3, 1)
        self._record(Step(k, X.astype(np.float32), X[:2].astype(np.float32), k % 2 == 0, 0.1))
        if k in self.windows[0]:
            self.rows += [Row(name, k, metric, float(X[0, 0]), 1) for name in SEVEN for metric in METRICS]
        self.spectra += [(1, side, [1.0, 0.5]) for side in "AG"] if self._starts(k) else []
        number.k, number.x = k + 1, number.x.cos()
        if number.k % 2 == 0:
            self.log.append((k, float(X[0, 0]), 0.5))


def study(patch: pytest.MonkeyPatch, out: Path, *options: str) -> int:
    """The study, which saves its state after every iteration."""
    patch.setitem(PRESETS, "tiny", TINY)
    patch.setattr("figures.render.render", lambda _: None)
    patch.setattr(jobs, "CHECKPOINT_SECONDS", -1)
    patch.setattr(jobs, "load_dataset", lambda *_, **__: tiny_dataset())
    patch.setattr(jobs, "environment", dict)
    patch.setattr(inverse_errors, "SeedRun", NumberRun)
    return inverse_errors.main([*OPTIONS, str(out), *options])


def copying(out: Path, copies: Path) -> int:
    """Runs the study in this process, and copies what is there at each write."""
    busy = False

    def copied(event: str) -> None:
        nonlocal busy
        busy = True
        copy = copies / f"{len(list(copies.iterdir())):03}-{event}"
        shutil.copytree(out, copy) if out.exists() else copy.mkdir()
        busy = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in ("os.rename", "os.remove")) and not busy and str(out) in os.fsdecode(arguments[0]):
            copied(event)

    def before(owner: Any, name: str) -> None:  # what no audit event tells of
        function: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            copied(f"{owner.__name__}.{name}")
            return function(*arguments, **options)

        setattr(owner, name, call)

    for owner, name in ((h5py.File, "flush"), (h5py.File, "close"), (torch, "save")):
        before(owner, name)
    sys.addaudithook(audit)
    with pytest.MonkeyPatch.context() as patch:
        return study(patch, out)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, list[Path]]:
    """What a whole study left, and what each of its writes found."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "copies").mkdir()
    program = "import sys; from pathlib import Path; from tests.studies.test_kills import copying; "
    program += "sys.exit(copying(*map(Path, sys.argv[1:])))"
    command = [sys.executable, "-c", program, str(folder / "whole"), str(folder / "copies")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=root)
    assert done.returncode == 0, done.stderr
    return folder / "whole", sorted((folder / "copies").iterdir())


def test_a_study_killed_at_any_write_is_resumed_to_the_same_bytes(killed, tmp_path, monkeypatch):
    whole, copies = killed
    reached = {copy.name.split("-", 1)[1] for copy in copies}
    assert reached == {"open", "os.rename", "os.remove", "File.flush", "File.close", "torch.save"}
    expected, seen = contents(whole), set()
    for copy in copies:
        state = str(sorted(contents(copy, everything=True).items()))
        if state in seen:  # what was there before is there still
            continue
        seen.add(state)
        shutil.copytree(copy, out := tmp_path / copy.name)
        assert study(monkeypatch, out, "--resume") == 0, copy.name
        found = contents(out)
        assert found.keys() == expected.keys(), copy.name
        assert [name for name in found if found[name] != expected[name]] == [], copy.name
        assert_same_recording(out / RECORDING, whole / RECORDING)
    assert len(seen) > 30


def contents(folder: Path, *, everything: bool = False) -> dict[str, str]:
    """By the name of each file, what is in it: of tables and texts, as the others hold times, or of all."""
    found = {}
    for path in folder.rglob("*"):
        same = everything or (path.suffix in (".csv", ".md", ".json") and path.name not in TIMES)
        if path.is_file() and path.suffix != ".lock":  # locks are nobody's any more
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if same else ""
    return found


def assert_same_recording(one: Path, other: Path) -> None:
    with Recording(one) as a, Recording(other) as b:
        for step, expected in zip(a.layer("fc0").steps(), b.layer("fc0").steps(), strict=True):
            assert step._replace(A=None, G=None) == expected._replace(A=None, G=None)
            np.testing.assert_array_equal(step.A, expected.A)
            np.testing.assert_array_equal(step.G, expected.G)
