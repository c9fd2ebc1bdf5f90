"""Files written whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import filelock

from .exceptions import InputError

__all__ = ["lock", "write_atomically", "write_text"]


def write_atomically(path: Path, writer: Callable[[Path], object]) -> None:
    """Have `writer` write a temporary file beside `path`, then rename it: a reader never sees half a file.

    Makes missing folders. If the writer fails, or is interrupted, an older `path` is left as it was.

    Raises:
        InputError: the file cannot be written; names it.
    """
    # The suffix stays last, because savefig and to_csv choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # if `path.parent` is no folder, that is being reported already
            temporary.unlink(missing_ok=True)


def lock(path: Path) -> filelock.BaseFileLock:
    """A lock beside `path`, held by this process until `release()`; a dead process holds none.

    Raises:
        InputError: another process holds it, or it cannot be made; names `path`.
    """
    held = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except filelock.Timeout:
        raise InputError(f"{path}: in use by another process") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be locked: {error.strerror or error}") from error
    return held


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
