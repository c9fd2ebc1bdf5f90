"""Claims as values: an inequality, an identity or "is p.s.d." with both its sides, which holds up to rounding.

A matrix that is off by delta in spectral norm is off by at most |||I||| delta in the norm |||.|||, and every
matrix that claims are made of is off by a small multiple of eps lambda_max(M_k). That product is a claim's
`scale`, and a claim holds if it is violated by no more than `TOLERANCE` eps scale.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .array import namespace, to_numpy
from .stream import Array

__all__ = ["EPS", "TOLERANCE", "Claim", "Identity", "Inequality", "Psd", "frobenius", "in_every_norm", "norms"]

TOLERANCE = 64.0
"""Multiples of eps * scale that rounding may cost a claim. The most seen on 1200 random streams, d <= 8, is 17."""

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Inequality:
    """small <= large.

    Attributes:
        name: the statement, by the paper's number.
        small: left side.
        large: right side.
        scale: what rounding errors of both sides are proportional to.
        where: the instance, such as "k=3, nuclear".
        unit: round-off of the dtype both sides were computed in.
    """

    name: str
    small: float
    large: float
    scale: float
    where: str = ""
    unit: float = EPS

    @property
    def slack(self) -> float:
        """large - small; negative beyond rounding only if the inequality is violated."""
        return self.large - self.small

    def holds(self, rtol: float | None = None) -> bool:
        """Whether small <= large + rtol scale, by default with rtol = TOLERANCE eps."""
        return self.slack >= -_rtol(rtol, self.unit) * self.scale

    def attained(self, rtol: float | None = None) -> bool:
        """Whether the two sides are equal, as `holds` measures it."""
        return abs(self.slack) <= _rtol(rtol, self.unit) * self.scale


@dataclass(frozen=True, eq=False)
class Identity:
    """left = right, two matrices (d, d) or two numbers. Attributes as for `Inequality`."""

    name: str
    left: Any
    right: Any
    scale: float
    where: str = ""
    unit: float = EPS

    @property
    def residual(self) -> float:
        """||left - right||_F / scale."""
        difference = frobenius(self.left - self.right)
        return difference / self.scale if difference else 0.0

    @property
    def slack(self) -> float:
        """Minus the absolute residual: 0 is best."""
        return -self.residual * self.scale

    def holds(self, rtol: float | None = None) -> bool:
        return self.residual <= _rtol(rtol, self.unit)


@dataclass(frozen=True, eq=False)
class Psd:
    """matrix (d, d) is symmetric positive semi-definite. Attributes as for `Inequality`."""

    name: str
    matrix: Array
    scale: float
    where: str = ""
    unit: float = EPS

    @property
    def slack(self) -> float:
        """The smallest eigenvalue of the symmetric part."""
        xp = namespace(self.matrix)
        return float(xp.linalg.eigvalsh((self.matrix + self.matrix.T) / 2)[0])

    def holds(self, rtol: float | None = None) -> bool:
        allowed = _rtol(rtol, self.unit) * self.scale
        asymmetry = frobenius(self.matrix - self.matrix.T) / self.matrix.shape[0] ** 0.5
        return asymmetry <= allowed and self.slack >= -allowed


Claim = Inequality | Identity | Psd


def norms(E: Array) -> dict[str, float]:
    """The unitarily invariant norms of E (d, d) by name: spectral, Frobenius, nuclear, Ky-Fan k for 1 < k < d.

    The spectral norm is Ky-Fan 1 and the nuclear norm Ky-Fan d. By Fan dominance, E is smaller than F in every
    unitarily invariant norm if it is in all Ky-Fan norms.
    """
    return _norms(to_numpy(namespace(E).linalg.svdvals(E)))


def _norms(singular_values: np.ndarray) -> dict[str, float]:
    sums = np.cumsum(singular_values, dtype=np.float64)
    named = {
        "spectral": float(sums[0]),
        "Frobenius": float(np.linalg.norm(singular_values.astype(np.float64))),
        "nuclear": float(sums[-1]),
    }
    return named | {f"Ky-Fan {k}": float(sums[k - 1]) for k in range(2, len(sums))}


def in_every_norm(
    name: str, small: Array, large: Array, *, scale: float, where: str, unit: float
) -> list[Inequality]:
    """|||small||| <= |||large||| for all of `norms`, as one inequality each."""
    smaller, larger = norms(small), norms(large)
    of_identity = _norms(np.ones(small.shape[0]))
    return [
        Inequality(name, smaller[norm], larger[norm], of_identity[norm] * scale, f"{where}, {norm}", unit)
        for norm in smaller
    ]


def _rtol(rtol: float | None, unit: float) -> float:
    return TOLERANCE * unit if rtol is None else rtol


def frobenius(E: Any) -> float:
    """Frobenius norm of a matrix, absolute value of a number."""
    if isinstance(E, float):
        return abs(E)
    return float(np.linalg.norm(to_numpy(E).astype(np.float64)))
