"""The machine that a study runs on: its device, and what environment.json records of it."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kfacerr.exceptions import InputError

__all__ = ["environment", "hardware", "select_device", "synchronize"]

_PACKAGES = (
    "kfacerr",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "h5py",
    "matplotlib",
    "scikit-learn",
    "pytorch-optimizer",
)
_CUPY_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


def select_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one, else the CPU.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise InputError(f"{name!r} is not the name of a device: give cpu, cuda, cuda:1 or auto")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is asked for, but there are {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment() -> dict[str, Any]:
    """What environment.json records: enough to interpret timings and to repeat the run; no paths, no host."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [_without_folder(argument) for argument in sys.argv],
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version for name in _PACKAGES + _CUPY_PACKAGES if (version := _version(name))},
    }


def hardware(about: dict[str, Any], device: torch.device) -> str:
    """What a table of times says of the machine, from its `environment`."""
    return f"{about['cpu'] if device.type == 'cpu' else about['cuda_device']}, {about['torch_threads']} threads"


def _without_folder(argument: str) -> str:
    """`--data=/home/me/cifar` -> `--data=cifar`: an absolute path says where a machine keeps its files."""
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if os.path.isabs(value) else value)


def _git_commit() -> str | None:
    """The commit of the code, with `-dirty` for uncommitted changes; None outside a repository."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
