"""What a value must be that a caller gives: each check refuses another in one line, and returns what it passes."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from .exceptions import InputError

__all__ = ["choice", "instance", "is_number", "names", "path_of", "positive", "switch", "whole"]

Kind = TypeVar("Kind")


def is_number(value: Any) -> bool:
    """Whether a value can be a setting: also NumPy's numbers and a 0-d tensor (a learning rate may be one)."""
    plain = not isinstance(value, str | bytes) and getattr(value, "ndim", 0) == 0
    return plain and all(hasattr(value, name) for name in ("__float__", "__lt__"))


def whole(value: Any, what: str, least: int = 0, most: float = math.inf) -> int:
    """A whole number in a range, as an int: neither 0.5 nor NaN, which int() and HDF5 would round or misread.

    Args:
        value: what may be none.
        what: what a message calls it.
        least: the smallest.
        most: the largest.

    Returns:
        The number.

    Raises:
        InputError: it is another.
    """
    if not is_number(value) or not least <= value <= most or value == math.inf or value % 1:
        limit = f"of at least {least}" if most == math.inf else f"in {least}..{most}"
        raise InputError(f"{what} must be a whole number {limit}, got {value!r}")
    return int(value)


def positive(value: Any, what: str, *, or_zero: bool = False) -> float:
    """A positive finite number, or 0 where that is allowed, as a float; an InputError for another."""
    if not is_number(value) or not (0 < value < math.inf or (or_zero and value == 0)):
        raise InputError(f"{what} must be {'non-negative' if or_zero else 'positive'} and finite, got {value!r}")
    return float(value)


def switch(value: Any, what: str) -> bool:
    """True or False, of NumPy too, or 1 or 0; an InputError for what merely counts as one of them."""
    return bool(whole(value, what, 0, 1))


def choice(value: Any, what: str, among: Iterable[str]) -> str:
    """One of some names; an InputError that lists them for another."""
    allowed = tuple(among)
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{what} {value!r} is not one of {', '.join(allowed)}")
    return value


def names(value: Any, what: str, *kinds: type) -> tuple[Any, ...]:
    """Several names, or others of `kinds`; an InputError for a lone string, whose letters would be taken for some.

    Args:
        value: what may be none.
        what: what a message calls it.
        *kinds: of which each must be; str if none is given.

    Returns:
        Them, in their order.

    Raises:
        InputError: it is a string, nothing that can be listed, or holds another kind.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InputError(f"{what}: a list is needed, got {value!r}")
    return tuple(instance(one, f"{what}: each", *(kinds or (str,))) for one in value)


def instance(value: Kind, what: str, *kinds: type) -> Kind:
    """What is of one of `kinds`; an InputError that names both for another."""
    if not isinstance(value, kinds):
        needed = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{what} must be of type {needed}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value in few words: by its type, if it is long."""
    short = value is None or isinstance(value, str | int | float)
    return repr(value) if short else type(value).__name__


def path_of(value: Any) -> Path:
    """The path of a file or folder that is there or could be.

    Args:
        value: a string or path.

    Returns:
        The path.

    Raises:
        InputError: it is empty or none, or the file system cannot have it: too long, a loop of links, with a NUL.
    """
    if not isinstance(value, str | os.PathLike) or value == "":
        raise InputError(f"a file's name is needed, got {value!r}")
    path = Path(value)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(value)!r:.120}: no file can be called so: {reason}") from None
    return path
