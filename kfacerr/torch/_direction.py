"""A step that is not formed (Algorithm 8), or is, and the descent where it takes the gradient's place.

Only the sum of a product P Q^T with the weights is ever d_G x d_A: one product, with weight decay and momentum in
its accumulation.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Direction", "Product", "descend", "norm", "reach", "scaled", "zeroed"]


class Product(NamedTuple):
    """P Q^T with P (d_G, n) and Q (d_A, n)."""

    P: Tensor
    Q: Tensor

    def numel(self) -> int:
        return len(self.P) * len(self.Q)

    def norm(self) -> Tensor:
        """Frobenius: ||P Q^T||^2 = sum (P^T P) o (Q^T Q). Linear in d."""
        return self.inner(self).clamp(min=0).sqrt()

    def inner(self, other: "Product") -> Tensor:
        """<P Q^T, G A^T> = sum (P^T G) o (Q^T A), float64. Linear in d.

        The products are in the factors' precision, at the scale of their largest entries: an entry of P^T G is off
        by eps |p_i| |g_j|, with signs that add up like sqrt(n).
        """
        P, Q = map(_unit, self)
        G, A = (P, Q) if other is self else map(_unit, other)
        products = (P.part.T @ G.part).double() * (Q.part.T @ A.part).double()
        return products.sum() * P.largest * Q.largest * G.largest * A.largest

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


class _Scaled(NamedTuple):
    """A tensor, `part` times the 0-d float64 `largest`."""

    part: Tensor
    largest: Tensor


def _unit(X: Tensor) -> _Scaled:
    """X by its largest entry, so that squares stay in range."""
    low, high = torch.aminmax(X)
    largest = torch.maximum(high, -low)
    return _Scaled(X / largest.masked_fill(largest == 0, 1.0), largest.double())


Direction = Tensor | Product
"""A step of one layer (d_G, d_A), or of one parameter."""


def norm(S: Direction) -> Tensor:
    """||S||_F, summed in float64: the squares of a long step may overflow."""
    return S.norm() if isinstance(S, Product) else torch.linalg.vector_norm(S, dtype=torch.float64)


def reach(S: Direction) -> Tensor:
    """No less than ||S||_F, float64, and cheaper: ||P||_F ||Q||_F of a product."""
    lengths = [torch.linalg.vector_norm(X, dtype=torch.float64) for X in (S if isinstance(S, Product) else (S,))]
    return lengths[0] if len(lengths) == 1 else lengths[0] * lengths[1]


def scaled(S: Direction, factor: Tensor) -> Direction:
    """S times a 0-d tensor; a formed S is written to."""
    return S.scaled(factor) if isinstance(S, Product) else S.mul_(factor.to(S))


def zeroed(S: Direction, where: Tensor) -> Direction:
    """0 if a 0-d boolean is true; a formed S is written to."""
    if isinstance(S, Product):
        return Product(S.P.masked_fill(where, 0.0), S.Q.masked_fill(where, 0.0))
    return S.masked_fill_(where, 0.0)


def descend(p: nn.Parameter, direction: Direction, group: Mapping[str, Any], state: dict[str, Any]) -> None:
    """SGD with momentum: `buf = momentum buf + direction + weight_decay p`, `p -= lr buf`.

    Args:
        p: written to.
        direction: formed where a product does not fit p.
        group: "lr", "momentum" and "weight_decay".
        state: of p, where the momentum's buffer is kept.
    """
    lr, decay, momentum = float(group["lr"]), group["weight_decay"], group["momentum"]
    if isinstance(direction, Product):
        if direction.fits(p):
            _descend_product(p, direction, state, lr, decay, momentum)
            return
        direction = direction.formed().reshape(p.shape)
    if direction.is_sparse and (decay or momentum):
        direction = direction.to_dense()
    step = direction.to(p.dtype)
    if decay:
        step = step + decay * p
    if momentum:
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(momentum).add_(step)
        else:
            state["momentum_buffer"] = step.clone()
        step = state["momentum_buffer"]
    p.add_(step, alpha=-lr)


def _descend_product(
    p: nn.Parameter, direction: Product, state: dict[str, Any], lr: float, decay: float, momentum: float
) -> None:
    if not momentum:
        direction.add_to(p, beta=1 - lr * decay, alpha=-lr)
        return
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p)
    buffer = state["momentum_buffer"]
    direction.add_to(buffer, beta=momentum, alpha=1.0)
    if decay:
        buffer.add_(p, alpha=decay)
    p.add_(buffer, alpha=-lr)
