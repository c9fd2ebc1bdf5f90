"""Per-sample gradients of a layer and what SENG asks of them: W W^T, W g and W^T v (Yang et al. 2021).

Row i of W (n, p) is the per-sample gradient of sample i over sqrt(n).

**Rows of W.** With the columns of `kfacerr.torch.columns`, (i, t) standing for position t of sample i,
`Mat(g) = G A^T = sum_i G_i A_i^T`, (20), where sample i contributes `G_i A_i^T = sum_t G_it A_it^T`. That is 1/n
of the gradient of the sample's own loss, so `Mat(W_i) = n/sqrt(n) G_i A_i^T = sqrt(n) sum_t G_it A_it^T`, and

    K_ij     = n sum_{t,s} (A_it . A_js) (G_it . G_js)       (FC, one position: n (A^T A) o (G^T G))
    (W g)_i  = sqrt(n) sum_t G_it^T Mat(g) A_it
    Mat(W^T v) = sqrt(n) G diag(v) A^T                       (v_i for every position of sample i)

K is evaluated as it stands, (n T)^2 (d_A + d_G) operations, or from the matrices `G_i A_i^T`,
n d_A d_G (T + n) operations: whichever is cheaper, in blocks.

**BatchNorm** computes `y_it = gamma o xhat_it + beta`. With the layer's input fixed, xhat does not depend on gamma
and beta, so sample i contributes `sum_t dLoss/dy_it o xhat_it` to the gradient of gamma and `sum_t dLoss/dy_it` to
that of beta; the sum over i is autograd's gradient exactly. In train mode xhat and dLoss/dy mix the samples of the
batch: a row is the sample's share of the batch's gradient, not the gradient of a loss of its own.

**Sampling** (layers of more than `im_size_threshold` weights). c_A of the d_A rows of A and c_G of the d_G rows of
G, S_A and S_G, are drawn uniformly without replacement. A pair (q, r) is in S_G x S_A with probability
1/rho = (c_G/d_G)(c_A/d_A), the draws being independent, so the sums over weights

    K_ij = sum_qr W_i,qr W_j,qr ~ rho sum_{S_G x S_A} W_i,qr W_j,qr,    (W g)_i ~ rho sum_{S_G x S_A} W_i,qr g_qr

are unbiased (Horvitz-Thompson), and the estimate of K is p.s.d. W^T v is not sampled. The step, an inverse of an
unbiased estimate, is not itself unbiased.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Curvature",
    "DenseGradients",
    "FactoredGradients",
    "batch_norm_gradients",
    "compressed",
    "dense_gradients",
    "gram_by_gradients",
    "gram_by_positions",
    "per_sample",
]

_BLOCK = 1 << 24  # elements of the largest temporary while a Gram matrix is formed


@dataclass(frozen=True)
class DenseGradients:
    """W itself.

    Attributes:
        W: (n, p), row i the per-sample gradient of sample i over sqrt(n), flattened from (d_G, d_A).
    """

    W: Tensor

    @property
    def weights(self) -> int:
        """p."""
        return self.W.shape[1]

    def gram(self) -> Tensor:
        """K = W W^T (n, n)."""
        return self.W @ self.W.T

    def product(self, g: Tensor) -> Tensor:
        """W g (n,) of Mat(g) (d_G, d_A)."""
        return self.W @ g.reshape(-1)

    def adjoint(self, v: Tensor, shape: torch.Size) -> Tensor:
        """Mat(W^T v) of the given shape."""
        return (self.W.T @ v).reshape(shape)


@dataclass(frozen=True)
class FactoredGradients:
    """W through the columns of the layer, `Mat(W_i) = sqrt(n) G_i A_i^T`; sampled where rows are given.

    Attributes:
        A: (d_A, n T), the positions of one sample side by side.
        G: (d_G, n T).
        n: number of samples.
        rows_A: (c_A,) the sampled rows of A, or None for all.
        rows_G: (c_G,) the sampled rows of G, or None for all.
    """

    A: Tensor
    G: Tensor
    n: int
    rows_A: Tensor | None = None
    rows_G: Tensor | None = None

    @property
    def weights(self) -> int:
        """p."""
        return len(self.A) * len(self.G)

    @property
    def ratio(self) -> float:
        """rho = d_A d_G / (c_A c_G), the inverse of a weight's chance to be sampled."""
        c_A, c_G = (len(X if rows is None else rows) for X, rows in ((self.A, self.rows_A), (self.G, self.rows_G)))
        return self.weights / (c_A * c_G)

    def gram(self) -> Tensor:
        """The unbiased estimate of K = W W^T (n, n), K itself if nothing is sampled."""
        A, G = self._sampled()
        c_A, c_G, columns = len(A), len(G), A.shape[1]
        positions_first = columns**2 * (c_A + c_G + 1)
        gradients_first = c_A * c_G * (columns + self.n**2)
        form = gram_by_positions if positions_first < gradients_first else gram_by_gradients
        return form(A, G, self.n) * (self.n * self.ratio)

    def product(self, g: Tensor) -> Tensor:
        """The unbiased estimate of W g (n,), Mat(g) (d_G, d_A)."""
        A, G = self._sampled()
        g = g if self.rows_G is None else g[self.rows_G]
        g = g if self.rows_A is None else g[:, self.rows_A]
        return ((g @ A) * G).sum(0).reshape(self.n, -1).sum(1) * (math.sqrt(self.n) * self.ratio)

    def adjoint(self, v: Tensor, shape: torch.Size) -> Tensor:
        """Mat(W^T v) (d_G, d_A), never sampled."""
        weights = (v * math.sqrt(self.n)).repeat_interleave(self.A.shape[1] // self.n)
        return ((self.G * weights) @ self.A.T).reshape(shape)

    def _sampled(self) -> tuple[Tensor, Tensor]:
        return (
            self.A if self.rows_A is None else self.A[self.rows_A],
            self.G if self.rows_G is None else self.G[self.rows_G],
        )


def per_sample(columns: Tensor, n: int) -> Tensor:
    """(d, n T) -> (n, d, T)."""
    return columns.reshape(len(columns), n, -1).transpose(0, 1)


def gram_by_positions(A: Tensor, G: Tensor, n: int) -> Tensor:
    """`sum_{t,s} (A_it . A_js)(G_it . G_js)` (n, n), in blocks of samples."""
    positions = A.shape[1] // n
    block = max(1, _BLOCK // (positions * A.shape[1])) * positions
    parts = []
    for A_i, G_i in zip(A.split(block, dim=1), G.split(block, dim=1), strict=True):
        products = (A_i.T @ A).mul_(G_i.T @ G)
        parts.append(products.reshape(-1, positions, n, positions).sum((1, 3)))
    return torch.cat(parts)


def gram_by_gradients(A: Tensor, G: Tensor, n: int) -> Tensor:
    """The same from the matrices `G_i A_i^T`, in blocks of rows of G."""
    A_i, G_i = per_sample(A, n).transpose(1, 2), per_sample(G, n)
    gram = A.new_zeros(n, n)
    for rows in G_i.split(max(1, _BLOCK // (n * len(A))), dim=1):
        W = torch.bmm(rows, A_i).flatten(1)
        gram.addmm_(W, W.T)
    return gram


def dense_gradients(A: Tensor, G: Tensor, n: int) -> DenseGradients:
    """W, row i `sqrt(n) vec(G_i A_i^T)`."""
    W = torch.bmm(per_sample(G, n), per_sample(A, n).transpose(1, 2)).flatten(1)
    return DenseGradients(W.mul_(math.sqrt(n)))


def compressed(A: Tensor, G: Tensor, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """Columns with at most `rank` positions a sample: `G_i A_i^T ~ (G_i V)(A_i V)^T`.

    V (T, rank) holds the leading right singular vectors of G_i, from the EVD of G_i^T G_i; exact where the rank of
    G_i is no larger.
    """
    if A.shape[1] // n <= rank:
        return A, G
    A_i, G_i = per_sample(A, n), per_sample(G, n)
    V = torch.linalg.eigh((G_i.transpose(1, 2) @ G_i).double()).eigenvectors[..., -rank:].to(G.dtype)
    A, G = (torch.bmm(X, V).transpose(0, 1).flatten(1) for X in (A_i, G_i))
    return A, G


def batch_norm_gradients(
    layer: nn.Module, x: Tensor, grad: Tensor, statistics: tuple[Tensor, Tensor] | None, *, bias: bool
) -> Tensor:
    """Each sample's share of [gamma.grad, beta.grad].

    Args:
        layer: a BatchNorm layer.
        x: its input (b, C, ...).
        grad: dLoss/dy (b, C, ...).
        statistics: the running mean and variance that the forward used, or None if it used the batch's own.
        bias: whether the bias is trained.

    Returns:
        (b, C, 2), or (b, C, 1) without the bias.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
    mean, variance = (None, None) if statistics is None else (s.to(dtype) for s in statistics)
    x_hat = F.batch_norm(x.to(dtype), mean, variance, training=statistics is None, eps=cast(float, layer.eps))
    grad = grad.to(dtype).flatten(2) if grad.ndim > 2 else grad.to(dtype).unsqueeze(2)
    shares = [(grad * x_hat.reshape_as(grad)).sum(2)]
    if bias:
        shares.append(grad.sum(2))
    return torch.stack(shares, dim=2)


@dataclass(frozen=True)
class Curvature:
    """What a layer keeps between two refreshes.

    Attributes:
        gradients: W, or what stands for it.
        eigenvalues: (n,) of K, non-negative. With its EVD any damping can be applied to one K.
        eigenvectors: (n, n) of K.
    """

    gradients: DenseGradients | FactoredGradients
    eigenvalues: Tensor
    eigenvectors: Tensor

    @classmethod
    def of(cls, gradients: DenseGradients | FactoredGradients) -> "Curvature":
        """Decomposes K in float64; raises `torch.linalg.LinAlgError` if K is not finite or eigh fails."""
        K = gradients.gram()
        if not bool(K.isfinite().all()):
            raise torch.linalg.LinAlgError("the per-sample gradients are not finite")
        eigenvalues, eigenvectors = torch.linalg.eigh(K.double())
        if not bool(eigenvalues.isfinite().all() & eigenvectors.isfinite().all()):
            raise torch.linalg.LinAlgError("the EVD gave NaN or Inf")
        return cls(gradients, eigenvalues.clamp(min=0).to(K.dtype), eigenvectors.to(K.dtype))

    def direction(self, g: Tensor, damping: float) -> Tensor:
        """`(g - W^T (lam I + K)^-1 W g) / lam` for Mat(g) (d_G, d_A)."""
        V = self.eigenvectors
        coefficients = V @ ((V.T @ self.gradients.product(g)) / (self.eigenvalues + damping))
        return (g - self.gradients.adjoint(coefficients, g.shape)) / damping

    def state_dict(self) -> dict[str, Any]:
        """Live tensors and plain values."""
        return {**vars(self), "gradients": dict(vars(self.gradients))}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Curvature":
        """The inverse of `state_dict`."""
        kind = DenseGradients if "W" in state["gradients"] else FactoredGradients
        return cls(**{**state, "gradients": kind(**state["gradients"])})
