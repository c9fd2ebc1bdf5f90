"""Files written whole or not at all, and refused before the work if they could not be written after it."""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .checks import path_of
from .exceptions import InputError

if TYPE_CHECKING:
    import filelock
    import pandas as pd

__all__ = [
    "check_claim",
    "check_folder",
    "check_outputs",
    "check_regular",
    "clear",
    "lock",
    "write_atomically",
    "write_csv",
    "write_text",
]


def write_atomically(path: Path, writer: Callable[[Path], object]) -> None:
    """Have `writer` write a temporary file beside `path`, then rename it: a reader never sees half a file.

    Makes missing folders. If the writer fails, or is interrupted, an older `path` is left as it was. Where `path`
    is a link, what it leads to is replaced.

    Args:
        path: the file.
        writer: writes the file that it is given; its name ends as `path` does.

    Raises:
        InputError: the file cannot be written; names it.
    """
    check_regular(path_of(path))
    path = path.resolve() if path.is_symlink() else path
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


def clear(folder: Path) -> None:
    """Removes what a killed process left of `write_atomically` in a folder that nobody else writes in."""
    for temporary in folder.rglob(".*.tmp*"):
        if re.fullmatch(r"\..*\.\d+\.tmp(\..*)?", temporary.name):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: Path, frame: "pd.DataFrame", *, digits: int = 8) -> None:
    """Write a table without its index, numbers with `digits` significant digits, atomically."""
    write_atomically(path, lambda temporary: frame.to_csv(temporary, index=False, float_format=f"%.{digits}g"))


def lock(path: Path) -> "filelock.BaseFileLock":
    """A lock beside `path`, held by this process until `release()`; a dead process holds none.

    Args:
        path: the file; missing folders are made.

    Returns:
        The lock, held.

    Raises:
        InputError: another process holds it, or it cannot be made; names `path`.
    """
    import filelock  # with asyncio; readers need neither

    held = filelock.FileLock(path.parent / f".{path.name}.lock", timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except filelock.Timeout:
        raise InputError(f"{path}: in use by another process") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be locked: {error.strerror or error}") from error
    return held


def check_claim(claimed: int, path: str | os.PathLike[str], where: str) -> None:
    """Refuses to read more than a file can hold; what compresses an array gives at most 1000 to 1.

    Args:
        claimed: bytes that what is to be read takes.
        path: the file.
        where: the file and the place in it.

    Raises:
        InputError: it claims too much; begins with `where`.
    """
    held = os.path.getsize(path)
    if claimed > max(1000 * held, 1 << 20):
        raise InputError(f"{where}: claims {claimed:,} bytes in a file of {held:,}: truncated or damaged")


def check_outputs(written: Mapping[str, Path], others: Mapping[str, Path]) -> None:
    """Refuses what would fail, or do harm, when it is written after a long computation.

    Args:
        written: files to be written, by what a message calls them ("--out").
        others: files that none of these may replace, by what a message calls them ("the recording itself").

    Raises:
        InputError: a folder is missing or closed, a name is that of a folder or of no regular file, or two names
            are of one file.
    """
    for path in written.values():
        try:
            _check_output(path)
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # too long, a closed folder; a loop of links; a NUL
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{str(path)!r:.120}: cannot be written: {reason}") from None
    for (what, path), (_, other) in itertools.combinations({**others, **written}.items(), 2):
        if _same(path, other):
            raise InputError(f"{other}: is {what}, another name is needed")


def check_folder(folder: Path) -> None:
    """Refuses a folder of results that cannot be made or written in, or in which writing one file changes another.

    Args:
        folder: what is there already, or not yet.

    Raises:
        InputError: names what stands in the way.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise InputError(f"{folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: the folder {there} is not writable")
    if folder.is_dir():
        for link in filter(Path.is_symlink, folder.iterdir()):
            if link.resolve().parent == folder.resolve():
                raise InputError(
                    f"{link}: is a link to {link.resolve().name} beside it: make it a file of its own"
                )


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one file: also through links, hard ones too."""
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return one.resolve() == other.resolve()


def check_regular(path: Path) -> None:
    """Refuses to replace what is there and no regular file."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a file's name is needed")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is a pipe or a device, which would be replaced: a file's name is needed")


def _check_output(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    check_regular(path)
    if not os.access(path.resolve().parent, os.W_OK):
        raise InputError(f"{path}: the folder {path.resolve().parent} is not writable")
