"""A step P Q^T that is not formed (Algorithm 8): measured, scaled and added to the weights as it is.

Only its sum with the weights is ever d_G x d_A: one product, with weight decay and momentum in its accumulation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Direction", "Product", "norm", "scaled", "zeroed"]


class Product(NamedTuple):
    """P Q^T with P (d_G, n) and Q (d_A, n)."""

    P: Tensor
    Q: Tensor

    def numel(self) -> int:
        return len(self.P) * len(self.Q)

    def norm(self) -> Tensor:
        """Frobenius: ||P Q^T||^2 = sum (P^T P) o (Q^T Q), in float64. Linear in d."""
        return self.inner(self).clamp(min=0).sqrt()

    def inner(self, other: "Product") -> Tensor:
        """<P Q^T, G A^T> = sum (P^T G) o (Q^T A), in float64. Linear in d."""
        P, Q, G, A = (X.double() for X in (*self, *other))
        return torch.sum((P.T @ G) * (Q.T @ A))

    def scaled(self, factor: Tensor) -> "Product":
        return self._replace(P=self.P * factor.to(self.P))

    def formed(self) -> Tensor:
        return self.P @ self.Q.T

    def transposed(self) -> "Product":
        return Product(self.Q, self.P)

    def fits(self, X: Tensor) -> bool:
        """Whether `add_to` can write to X."""
        return X.is_contiguous() and X.dtype == self.P.dtype

    def add_to(self, X: Tensor, beta: float, alpha: float) -> None:
        """X <- beta X + alpha P Q^T, for an X of as many elements, in any shape that starts with P's rows."""
        X.view(len(X), -1).addmm_(self.P, self.Q.T, beta=beta, alpha=alpha)


Direction = Tensor | Product
"""A step of one layer (d_G, d_A), or of one parameter."""


def norm(S: Direction) -> Tensor:
    """||S||_F, summed in float64: the squares of a long step may overflow."""
    return S.norm() if isinstance(S, Product) else torch.linalg.vector_norm(S, dtype=torch.float64)


def scaled(S: Direction, factor: Tensor) -> Direction:
    """S times a 0-d tensor; a formed S is written to."""
    return S.scaled(factor) if isinstance(S, Product) else S.mul_(factor.to(S))


def zeroed(S: Direction, where: Tensor) -> Direction:
    """0 if a 0-d boolean is true; a formed S is written to."""
    if isinstance(S, Product):
        return Product(S.P.masked_fill(where, 0.0), S.Q.masked_fill(where, 0.0))
    return S.masked_fill_(where, 0.0)
