"""What a study leaves beside its tables: checkpoints, and the record of the environment."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kfacerr.exceptions import InputError
from kfacerr.files import write_atomically

_CHECKPOINT = {"format": "kfacerr-checkpoint", "version": 1}
_PACKAGES = ("kfacerr", "torch", "numpy", "scipy", "pandas", "h5py", "matplotlib", "scikit-learn")
_CUPY_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers, strings and containers of them, atomically."""
    write_atomically(path, lambda temporary: torch.save({**_CHECKPOINT, "state": state}, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` saved, with its tensors on the CPU. Executes nothing in the file.

    Raises:
        InputError: there is no such file, or it is cut short, corrupt or not a checkpoint of ours.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds on a bad file
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or {key: content.get(key) for key in _CHECKPOINT} != _CHECKPOINT:
        raise InputError(f"{path}: not a checkpoint of this version of kfacerr")
    state: dict[str, Any] = content["state"]
    return state


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
