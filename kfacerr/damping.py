"""Dampings that users of K-factors choose, as values: `Damping.parse("mean=0.1")` and `str()` are inverse.

    phi=0.1       lam = 0.1 lambda_max of each factor: the paper's (§6)
    mean=0.1      lam = 0.1 tr M / d of each factor
    lam=1e-3      the same lam for each factor
    pi=1e-3       lam of A x Gamma split: lam_A = pi lam^(1/2), lam_G = lam^(1/2)/pi with
                  pi^2 = (tr A / d_A)/(tr Gamma / d_G), Martens & Grosse 2015, §6.3
    product=1e-3  1/(lambda_i(Gamma) lambda_j(A) + lam) in both eigenbases, as in kronfluence and EKFAC
    cut=1e-3      pseudo-inverse: eigenvalues up to 1e-3 lambda_max are left out

All but the last two are a lam for each factor, and so a damping ratio phi = lam/lambda_max. "pi" is "mean" in
other words: lam_A = (lam/(m_A m_G))^(1/2) m_A with m the mean eigenvalues.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .checks import instance
from .exceptions import InputError

__all__ = ["KINDS", "RELATIVE", "Damping", "Scale"]

KINDS = ("phi", "mean", "lam", "pi", "product", "cut")

RELATIVE = {
    "phi": r"$\lambda/\lambda_1$ of each factor",
    "mean": r"$\lambda/$mean eigenvalue of each factor",
    "product": r"$\lambda/$mean of the products $\lambda_i\lambda_j$",
    "cut": r"cut$/\lambda_1$ of each factor",
}
"""Kinds of a map, and what their values are shares of; "pi" is "mean" with the square root of its share."""


class Scale(NamedTuple):
    """What dampings refer to: a factor's dimension, largest eigenvalue and trace."""

    d: int
    top: float
    trace: float

    @classmethod
    def of(cls, w: np.ndarray) -> "Scale":
        """Of all eigenvalues w (d,), descending."""
        return cls(len(w), float(w[0]), float(w.sum()))

    @property
    def mean(self) -> float:
        return self.trace / self.d


@dataclass(frozen=True)
class Damping:
    """One of `KINDS` and its value.

    Attributes:
        kind: how the value is meant.
        value: positive.

    Raises:
        InputError: another kind, or a value out of range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"damping {self.kind!r} is not one of {', '.join(KINDS)}")
        if not 0 < self.value < float("inf"):
            raise InputError(f"damping {self.kind} must be positive and finite, got {self.value}")

    @classmethod
    def parse(cls, text: str) -> "Damping":
        """Of a text such as "mean=0.1".

        Args:
            text: kind and value.

        Returns:
            The damping.

        Raises:
            InputError: it is none.
        """
        kind, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            told = ", ".join(f"{name}=VALUE" for name in KINDS)
            raise InputError(f"damping {text!r} is none of {told}") from None
        return cls(kind, number)

    @classmethod
    def of(cls, value: "str | Damping") -> "Damping":
        """A damping, or the one of a text; an InputError for anything else."""
        return value if isinstance(value, Damping) else cls.parse(instance(value, "damping", str))

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    @property
    def separable(self) -> bool:
        """Whether it is a lam for each factor."""
        return self.kind not in ("product", "cut")

    def of_each_factor(self) -> "Damping":
        """Itself; an InputError where it is not `separable`."""
        if not self.separable:
            raise InputError(f"damping {str(self)!r} is no lam for each factor")
        return self

    def level(self, M: Scale) -> float:
        """lam of one factor by itself; what is left out, for a cut.

        Args:
            M: the factor's.

        Returns:
            The level.

        Raises:
            InputError: "pi" and "product", which are of both factors.
        """
        match self.kind:
            case "phi" | "cut":
                return self.value * M.top
            case "mean":
                return self.value * M.mean
            case "lam":
                return self.value
        other = "; mean=VALUE is the same in other words" if self.kind == "pi" else ""
        raise InputError(f"damping {str(self)!r} is of both factors at once{other}")

    def levels(self, A: Scale, G: Scale) -> tuple[float, float]:
        """lam_A and lam_G; for a cut what is left out, for the grid of products its one lam twice."""
        match self.kind:
            case "pi":
                split = (A.mean / G.mean) ** 0.5
                return split * self.value**0.5, self.value**0.5 / split
            case "product":
                return self.value, self.value
            case _:
                return self.level(A), self.level(G)

    def ratios(self, A: Scale, G: Scale) -> tuple[float, float]:
        """What it is of each factor's largest eigenvalue: the eigenvalues above are those that it resolves.

        On the grid of products it resolves lambda_i(A) if lambda_i(A) lambda_max(Gamma) is above lam.
        """
        one, other = self.levels(A, G)
        if self.kind == "product":
            return one / (A.top * G.top), other / (A.top * G.top)
        return one / A.top, other / G.top

    def inverse(self, w: np.ndarray, level: float) -> np.ndarray:
        """Eigenvalues of one factor's damped inverse.

        Args:
            w: (d,) of the factor, not negative.
            level: lam, or the cut.

        Returns:
            (d,).

        Raises:
            InputError: a grid of products has no inverse of one factor.
        """
        if self.kind == "product":
            raise InputError("damping 'product' is of both factors at once")
        if self.kind == "cut":
            return np.where(w > level, 1 / np.where(w > level, w, 1.0), 0.0)
        return 1 / (w + level)

    def grid(self, w_G: np.ndarray, w_A: np.ndarray, levels: tuple[float, float]) -> np.ndarray:
        """What each entry of a gradient in both eigenbases is multiplied with.

        Args:
            w_G: (d_G,) eigenvalues.
            w_A: (d_A,) eigenvalues.
            levels: of `levels`.

        Returns:
            (d_G, d_A).
        """
        if self.kind == "product":
            return 1 / (w_G[:, None] * w_A[None, :] + levels[0])
        return self.inverse(w_G, levels[1])[:, None] * self.inverse(w_A, levels[0])[None, :]
