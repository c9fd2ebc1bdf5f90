"""Values that are none, and the one way that a call and a command line have to say so."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from kfacerr.exceptions import InputError

NAN, INF = float("nan"), float("inf")
NO_NUMBER = ("x", None, [1.0], {}, 1j)
NOT_POSITIVE = (NAN, INF, 0, -1, *NO_NUMBER)
NEGATIVE = (NAN, INF, -1, *NO_NUMBER)
NO_COUNT = (NAN, INF, -1, 0.5, *NO_NUMBER)
NO_SIZE = (0, *NO_COUNT)
NO_SHARE = (0, 2, NAN, INF, -1, *NO_NUMBER)
NO_DECAY = (1, *NO_SHARE)
NO_SWITCH = ("x", 3, 0.5, None, [])
NO_NAME = ("max", "", None, 3, [], {})
NO_DAMPING = (*NO_NAME, "phi", "mean=0", "lam=-1", "pi=nan", "product=inf", "cut=x", 0.1)
NO_LIST = ("B-KFAC", 3, [3], ["x"])
NO_ARRAY = (None, "x", 3, [[1.0]], {})
NO_WINDOWS = (
    *("x", 3, [3], ["ab"], [()], [(0, 0)], [(-1, 3)], [(0, 3), (2, 3)], [(0, NAN)], [(0.5, 3)], [(0, INF)]),
    *([(0, "x")], [(0, 3, 1, 2)], [(0, 3, -1)]),
)


def given(*values: Any) -> tuple[Any, ...]:
    """Without None, where that stands for a default."""
    return tuple(value for value in values if value is not None)


def with_entry(X: np.ndarray, value: float) -> np.ndarray:
    """A copy whose first entry is another."""
    X = X.copy()
    X.flat[0] = value
    return X


def no_matrix(X: Any) -> tuple[Any, ...]:
    """What stands for X (NumPy) and is no real floating matrix of its kind and size."""
    kinds = (np.int64, np.complex128, np.float16, object)
    return (*NO_ARRAY, *map(X.astype, kinds), X[0], X[None], with_entry(X, NAN), with_entry(X, -INF))


Row = tuple[Callable[..., Any], Mapping[str, Any], Mapping[str, Sequence[Any]]]
"""A call, arguments that it takes, and for each argument values that it refuses."""


def assert_refuses(call: Callable[..., Any], good: Mapping[str, Any], bad: Mapping[str, Sequence[Any]]) -> None:
    """The good call is taken; each bad value in its place is an InputError of one line."""
    call(**good)
    for name, values in bad.items():
        for value in values:
            said = f"{name} = {value!r}"
            try:
                call(**{**good, name: value})
            except InputError as error:
                if "\n" in str(error):
                    pytest.fail(f"{said}: {error}")
            except Exception as error:
                pytest.fail(f"{said}: {type(error).__name__}: {error}")
            else:
                pytest.fail(f"{said} is taken")


def assert_one_line(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], argv: list[str]) -> None:
    """The command line exits with status 2 and one line on stderr."""
    try:
        status: object = main(argv)
    except SystemExit as stop:  # argparse's way
        status = stop.code
    except Exception as error:
        pytest.fail(f"{argv}: {type(error).__name__}: {error}")
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1 and said.endswith("\n"), (argv, status, said)
