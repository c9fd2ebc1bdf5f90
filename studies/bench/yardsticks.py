"""What the core's speed is held against: the same done as in a textbook, or densely."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfacerr.brand import symmetric_brand
from kfacerr.processes import Brand

__all__ = ["PHI", "RHO", "NaiveStudy", "TextbookProcess", "columns", "naive_errors", "running", "textbook_brand"]

RHO, PHI = 0.95, 0.1


def columns(d: int, n: int, rng: np.random.Generator, mean: float = 0.0) -> np.ndarray:
    """(d, n) float32 columns of a covariance with eigenvalues 1/i, about `mean` times one vector of length 1."""
    noise = rng.standard_normal((d, n), dtype=np.float32) * np.arange(1, d + 1, dtype=np.float32)[:, None] ** -0.5
    return (noise + np.float32(mean / d**0.5)) / np.float32(n**0.5)


def running(rank: int, batches: Sequence[Any]) -> Brand:
    """A `Brand` process that has taken these columns."""
    process = Brand(rank=rank, rho=RHO)
    for k, X in enumerate(batches):
        process.update(k, X, None)
    return process


def textbook_brand(U: Tensor, D: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 3 through QR, projected twice: (U, D) of U diag(D) U^T + A A^T, all r + n columns formed."""
    C = U.T @ A
    Z = A - U @ C
    again = U.T @ Z
    C, Z = C + again, Z - U @ again
    Q, R = torch.linalg.qr(Z)
    top = torch.cat([torch.diag(D) + C @ C.T, C @ R.T], dim=1)
    K = torch.cat([top, torch.cat([R @ C.T, R @ R.T], dim=1)])
    w, V = torch.linalg.eigh(K)
    return torch.cat([U, Q], dim=1) @ V.flip(1), w.flip(0).clamp(min=0)


class TextbookProcess:
    """(10) by `textbook_brand`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.U: Tensor | None = None
        self.D: Tensor | None = None

    def update(self, X: Tensor) -> None:
        """With columns X (d, n)."""
        if self.U is None or self.D is None:
            low = symmetric_brand(None, X)
            self.U, self.D = low.U, low.D
        else:
            U, D = self.U[:, : self.rank], RHO * self.D[: self.rank]
            self.U, self.D = textbook_brand(U, D, (1 - RHO) ** 0.5 * X)


class NaiveStudy:
    """One factor of the seven algorithms as one would first write it: an EVD wherever (8)-(10) speak of one."""

    def __init__(self, r: int, X: Tensor) -> None:
        self.r = r
        self.M = X @ X.T
        self.fixed = torch.linalg.eigh(self.M)  # K-FAC's, and of R-KFAC T_inv=50 and 300 when they were due
        # B-KFAC, B-R-KFAC and B-KFAC-C between their heavy updates.
        self.brand = [self.M.clone() for _ in range(3)]
        self.estimates: list[tuple[Tensor, Tensor]] = []

    def update(self, X: Tensor) -> None:
        """New columns: (8), (10) three times, R-KFAC T_inv=10."""
        self.M = RHO * self.M + (1 - RHO) * X @ X.T
        w, V = self.fixed
        self.estimates = [(w, V), (w[-self.r :], V[:, -self.r :]), (w[-self.r :], V[:, -self.r :])]
        w, V = torch.linalg.eigh(self.M)
        self.estimates.append((w[-self.r :], V[:, -self.r :]))
        kept = self.r + X.shape[1]
        for i, B in enumerate(self.brand):
            w, V = torch.linalg.eigh(B)
            w, V = w[-self.r :], V[:, -self.r :]
            self.brand[i] = RHO * (V * w) @ V.T + (1 - RHO) * X @ X.T
            w, V = torch.linalg.eigh(self.brand[i])
            self.estimates.append((w[-kept:], V[:, -kept:]))

    def inverses(self) -> list[Tensor]:
        """The reference's and every algorithm's, dense, by "min" continuation."""
        w, V = torch.linalg.eigh(self.M)
        inverses = [(V / (w + PHI * w[-1])) @ V.T]
        for w, V in self.estimates:
            lam, tau = PHI * w[-1], 0 * w[0] if len(w) == len(V) else w[0]
            inverse = (V * (1 / (w + lam) - 1 / (lam + tau))) @ V.T
            inverse.diagonal().add_(1 / (lam + tau))
            inverses.append(inverse)
        return inverses


def naive_errors(a: NaiveStudy, g: NaiveStudy, A: Tensor, G: Tensor) -> list[float]:
    """The four metrics of every algorithm."""
    J = G @ A.T
    (A_ref, *of_a), (G_ref, *of_g) = a.inverses(), g.inverses()
    S_ref, errors = G_ref @ J @ A_ref, []
    for A_inv, G_inv in zip(of_a, of_g, strict=True):
        S = G_inv @ J @ A_inv
        for x, y in ((A_inv, A_ref), (G_inv, G_ref), (S, S_ref)):
            errors.append(float(torch.linalg.norm(x - y) / torch.linalg.norm(y)))
        errors.append(1 - float((S * S_ref).sum() / (torch.linalg.norm(S) * torch.linalg.norm(S_ref))))
    return errors
