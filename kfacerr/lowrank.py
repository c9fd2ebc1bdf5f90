"""A symmetric p.s.d. matrix U diag(D) U^T of low rank: what every process hands to the inverse."""

from dataclasses import dataclass
from functools import cached_property

from .array import namespace
from .stream import Array

__all__ = ["NULL", "LowRank", "without_null"]

NULL = 64.0
"""An eigenvalue that NULL roundings may have made is no mode."""


def without_null(w: Array, unit: float, top: Array | None = None) -> Array:
    """Eigenvalues (m,) of a p.s.d. matrix, the null ones set to 0: the numerical rank is how many stay positive.

    Null are those up to NULL unit w_1. Entry (i, j) of a matrix M is rounded by about unit |M_ij|, with a sign of
    its own; such an error has a spectral norm of about 2 unit max_i |M e_i|, which is at most 2 unit w_1 at any d.
    The EVD adds as much. The most seen of a zero eigenvalue, d = 3 to 2000, is 27 unit w_1. (The common rule,
    d unit w_1, is below rounding for small d, and at d = 2000 in float32 it takes modes of 2e-4 w_1 for zero.)
    As NULL is several times that, two backends disagree on a mode only if its eigenvalue is within their rounding
    of the threshold, and not whenever it is zero.

    Args:
        w: (m,) descending; rounding may have made some negative.
        unit: round-off of what w was computed from.
        top: what w_1 stands for, if it is not the matrix's largest eigenvalue.

    Returns:
        (m,).
    """
    xp = namespace(w)
    return xp.where(w > NULL * unit * (w[0] if top is None else top), w, xp.zeros_like(w))


@dataclass(frozen=True, eq=False)
class LowRank:
    """U diag(D) U^T with U = basis, or U = basis @ mix not formed until it is asked for.

    The Brand update in Gram form (`kfacerr.brand`) needs its r + n modes only through products, so it hands out
    the second form; truncation then forms the r leading columns and no others.

    A mode with D_i = 0 is absent: it carries no information, and its column of U may be zero.

    Attributes:
        basis: (d, p), orthonormal columns if `mix` is None.
        D: (m,) eigenvalues, descending, non-negative.
        mix: (p, m) or None.
    """

    basis: Array
    D: Array
    mix: Array | None = None

    @property
    def d(self) -> int:
        return self.basis.shape[0]

    @property
    def m(self) -> int:
        return self.D.shape[0]

    @cached_property
    def U(self) -> Array:
        """(d, m) orthonormal columns (zero ones where D is 0 by numerical rank)."""
        return self.basis if self.mix is None else self.basis @ self.mix

    @property
    def lambda_max(self) -> Array:
        """Largest eigenvalue, a 0-d array."""
        return self.D[0]

    @property
    def modes(self) -> Array:
        """How many modes are present, a 0-d array of D's dtype."""
        xp = namespace(self.D)
        return xp.sum(xp.astype(self.D > 0, self.D.dtype))

    def project(self, X: Array) -> Array:
        """U^T X: (d, n) -> (m, n)."""
        Z = self.basis.T @ X
        return Z if self.mix is None else self.mix.T @ Z

    def expand(self, Z: Array) -> Array:
        """U Z: (m, n) -> (d, n)."""
        return self.basis @ (Z if self.mix is None else self.mix @ Z)

    def apply(self, X: Array) -> Array:
        """U diag(D) U^T X: (d, n) -> (d, n)."""
        return self.expand(self.D[:, None] * self.project(X))

    def truncate(self, r: int) -> "LowRank":
        """The r leading modes: the optimal rank-r truncation in every unitarily invariant norm."""
        if self.mix is None:
            return self if r >= self.m else LowRank(self.basis[:, :r], self.D[:r])
        kept = min(r, self.m)
        return LowRank(self.basis @ self.mix[:, :kept], self.D[:kept])

    def dense(self) -> Array:
        """The (d, d) matrix."""
        return (self.U * self.D[None, :]) @ self.U.T

    def trace(self) -> Array:
        """Sum of D, a 0-d array."""
        return namespace(self.D).sum(self.D)

    def state_dict(self) -> dict[str, Array]:
        """The arrays; `LowRank(**state)` is this representation again."""
        return {"basis": self.basis, "D": self.D, "mix": self.mix}
