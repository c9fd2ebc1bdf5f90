"""A study that is killed at any of its writes is resumed to the same bytes, and nothing of the killed run stays.

What kill -9 leaves is what is on the disk at that moment. So one study runs in a process of its own, in which DIR is
copied before each file is opened for writing, renamed, removed or flushed; and each copy is resumed.
"""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kfacerr.recording import Recording
from studies import inverse_errors
from studies.config import PRESETS
from tests.studies.test_inverse_errors import TINY

SMALLEST = dataclasses.replace(
    TINY,
    n_train=16,
    window_epochs=(1,),
    window_length=3,
    seeds=(0,),
    equal_rank=(),
    beyond=(),
    continuations=("min",),
)
OPTIONS = ("--preset", "smallest", "--device", "cpu", "--record", "--out")
TABLES = ("errors.csv", "variants.csv", "spectra.csv", "training.csv", "claims.md", "config.json")
RECORDING = "recording-seed-0.h5"

PROGRAM = f"""
import os, shutil, sys
from pathlib import Path
import h5py, torch
from figures import render
from studies import inverse_errors, jobs
from studies.config import PRESETS, Preset

PRESETS["smallest"] = {SMALLEST!r}
render.render = lambda _: None
jobs.CHECKPOINT_SECONDS = -1  # after every iteration
out, copies = map(Path, sys.argv[1:])
torch.set_num_threads(1)
busy = False

def copied(what):
    global busy
    busy = True
    number = len(list(copies.iterdir()))
    shutil.copytree(out, copies / f"{{number:03}}-{{what}}") if out.exists() else (copies / f"000-{{what}}").mkdir()
    busy = False

def audit(event, arguments):
    writes = event in ("os.rename", "os.remove", "os.mkdir") or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if writes and not busy and str(out) in os.fsdecode(arguments[0]):
        copied(event)

def before(owner, name):
    function = getattr(owner, name)

    def call(*arguments, **options):
        copied(f"{{owner.__name__}}.{{name}}")
        return function(*arguments, **options)

    setattr(owner, name, call)

before(h5py.File, "flush")
before(h5py.File, "close")
before(torch, "save")
sys.addaudithook(audit)
sys.exit(inverse_errors.main([*{OPTIONS!r}, str(out)]))
"""


@pytest.fixture(autouse=True)
def _smallest(monkeypatch):
    monkeypatch.setitem(PRESETS, "smallest", SMALLEST)
    monkeypatch.setattr("figures.render.render", lambda _: None)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, list[Path]]:
    """What a whole study left, and what each of its writes found."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "copies").mkdir()
    command = [sys.executable, "-c", PROGRAM, str(folder / "whole"), str(folder / "copies")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "whole", sorted((folder / "copies").iterdir())


def test_a_study_killed_at_any_write_is_resumed_to_the_same_bytes(killed, tmp_path):
    whole, copies = killed
    reached = {copy.name.split("-", 1)[1] for copy in copies}
    assert reached >= {"open", "os.rename", "File.flush", "File.close", "torch.save"}, "the writes are seen"
    there = names(whole)
    for copy in copies:
        shutil.copytree(copy, out := tmp_path / copy.name)
        assert inverse_errors.main([*OPTIONS, str(out), "--resume"]) == 0, copy.name
        assert names(out) == there, copy.name
        for name in TABLES:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), (copy.name, name)
        assert_same_recording(out / RECORDING, whole / RECORDING)


def names(folder: Path) -> set[str]:
    """All that a folder holds but locks, which are nobody's any more."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock"}


def assert_same_recording(one: Path, other: Path) -> None:
    with Recording(one) as a, Recording(other) as b:
        for step, expected in zip(a.layer("fc0").steps(), b.layer("fc0").steps(), strict=True):
            assert step._replace(A=None, G=None) == expected._replace(A=None, G=None)
            np.testing.assert_array_equal(step.A, expected.A)
            np.testing.assert_array_equal(step.G, expected.G)
