"""A step P Q^T that is not formed (Algorithm 8): measured, scaled and added to the weights as it is.

Only its sum with the weights is ever d_G x d_A: one product, with weight decay and momentum in its accumulation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Product"]


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

    def fits(self, X: Tensor) -> bool:
        """Whether `add_to` can write to X."""
        return X.is_contiguous() and X.dtype == self.P.dtype

    def add_to(self, X: Tensor, beta: float, alpha: float) -> None:
        """X <- beta X + alpha P Q^T, for an X of d_G d_A elements, in any shape that starts with d_G."""
        X.view(len(X), -1).addmm_(self.P, self.Q.T, beta=beta, alpha=alpha)
