"""A symmetric p.s.d. matrix U diag(D) U^T of low rank: what every process hands to the inverse."""

from dataclasses import dataclass
from functools import cached_property

from .array import namespace
from .checks import whole
from .exceptions import InputError
from .stream import Array

__all__ = ["LowRank", "null_level", "without_null"]


def null_level(order: int) -> float:
    """How many roundings of w_1 an eigenvalue of a p.s.d. matrix of this order may be and still be no mode.

    Entry (i, j) of a matrix M is rounded by about unit |M_ij|, with a sign of its own; such an error has a norm of
    about 2 unit max_i |M e_i|, at most 2 unit w_1. The EVD adds as much, slowly growing. Twice the most seen of
    zero eigenvalues: 4 at order 4, 8 at 200, 19 at 1000. (The common rule, order unit w_1, is below rounding for
    small orders, and at 2000 in float32 it takes modes of 2e-4 w_1 for zero.) It stays below the rounding that
    `kfacerr.certificate` allows for.
    """
    return 8 + order**0.5


def without_null(w: Array, unit: float, order: int) -> Array:
    """Eigenvalues (m,) of a p.s.d. matrix, the null ones set to 0: the numerical rank is how many stay positive.

    Args:
        w: (m,) descending; rounding may have made some negative.
        unit: round-off of what w was computed from.
        order: of the matrix.

    Returns:
        (m,).
    """
    xp = namespace(w)
    return xp.where(w > null_level(order) * unit * w[0], w, xp.zeros_like(w))


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

    def __post_init__(self) -> None:
        basis, D = (tuple(getattr(X, "shape", ())) for X in (self.basis, self.D))
        mix = basis[1:] * 2 if self.mix is None else tuple(getattr(self.mix, "shape", ()))
        if len(basis) != 2 or basis[1:] + D != mix:
            told = ", ".join(map(str, (basis, D) if self.mix is None else (basis, D, mix)))
            raise InputError(f"a basis (d, p), D (m,) and mix (p, m), or p = m without, are needed, got {told}")

    def __repr__(self) -> str:
        return f"<kfacerr LowRank: d={self.d}, m={self.D.shape[0]}>"

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
        whole(r, "the rank r")
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
