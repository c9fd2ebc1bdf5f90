"""What an error study costs: said in advance from the sizes, and by what was measured while it runs."""

import time
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch

from kfacerr.array import cholesky_inverse

__all__ = ["Pace", "Sizes", "Speeds", "update_seconds", "window_seconds"]


class Speeds(NamedTuple):
    """Flops a second of a product and of a Cholesky inverse, as measured here and now."""

    gemm: float
    cholesky: float

    @classmethod
    def measured(cls, dtype: torch.dtype, device: torch.device) -> "Speeds":
        """By one product and one inverse of order 2048."""
        d, n = 2048, 256
        M, X = torch.eye(d, dtype=dtype, device=device), torch.ones(d, n, dtype=dtype, device=device)
        cholesky_inverse(M)  # the first call sets things up
        started = time.perf_counter()
        float((M @ X)[0, 0])
        between = time.perf_counter()
        float(cholesky_inverse(M)[0, 0])
        return cls(2 * d**2 * n / (between - started), d**3 / (time.perf_counter() - between))


class Sizes(NamedTuple):
    """What the cost depends on: factor dimensions, columns, rank, and the number of inverses that are measured."""

    d_A: int
    d_G: int
    n: int
    rank: int
    inverses: int


def update_seconds(sizes: Sizes, speeds: Speeds) -> float:
    """A measured update: the EA factors (8), the references, one RSVD, and every inverse's error."""
    seconds = 0.0
    for d in (sizes.d_A, sizes.d_G):
        products = 2 * sizes.n + 12 * sizes.rank + sizes.inverses * (sizes.rank + sizes.n)
        seconds += d**2 * products / speeds.gemm + d**3 / speeds.cholesky
    return seconds


def window_seconds(sizes: Sizes, speeds: Speeds, iterations: int, updates: int) -> float:
    """A window: its updates, and at every iteration the reference's and each algorithm's step."""
    applied = sum(4 * d**2 * sizes.n for d in (sizes.d_A, sizes.d_G))  # the reference, and stale K-FAC
    compared = sizes.inverses * (8 * sizes.n**2 + 4 * sizes.n * (sizes.rank + sizes.n)) * sizes.d_A
    return updates * update_seconds(sizes, speeds) + iterations * (applied + compared) / speeds.gemm


class Pace:
    """The time that is left, from the mean time of each kind of iteration so far.

    Args:
        expected: seconds of the kinds that are known in advance; of others, what the mean iteration takes.
    """

    def __init__(self, expected: dict[Hashable, float]) -> None:
        self.expected = expected
        self._spent: dict[Hashable, tuple[int, float]] = {}

    def took(self, kind: Hashable, seconds: float) -> None:
        """An iteration of that kind is done."""
        count, total = self._spent.get(kind, (0, 0.0))
        self._spent[kind] = count + 1, total + seconds

    def seconds(self, kinds: Iterable[tuple[Hashable, int]]) -> float:
        """What `count` iterations of each kind will take."""
        done = sum(count for count, _ in self._spent.values())
        mean = sum(total for _, total in self._spent.values()) / max(done, 1)
        means = {kind: total / count for kind, (count, total) in self._spent.items()}
        return sum(n * means.get(kind, self.expected.get(kind, mean)) for kind, n in kinds)
