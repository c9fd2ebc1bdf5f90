"""What `studies.bench.speed` times: by task, ways to the same end in float32.

update       of an estimate of the EA factor: the Brand update (10) of a running `Brand` process, truncation
             and upkeep of orthonormality included, the same flops as plain products (U^T A, A^T A, Y V_r),
             Algorithm 3 as in a textbook (QR, two projections, all r + n columns formed), N-KFAC of r + n columns
             with its estimate, every fifth update re-based, and its own plain products, IncrementalPCA,
             decompositions and a Cholesky inverse of a dense M, and (8) itself
application  of the inverses of a layer with d inputs and d/8 outputs: Algorithm 8, Algorithm 1 l.15-18, dense
layer step   forward, backward and `step()` of a `KFAC` on such a layer, whose factors stand still: by Algorithm 8
             (G A^T is never formed), by Algorithm 1, and K-FAC with d modes
study step   one measured step of the error study (all seven algorithms, new columns, no heavy update due but
             that of T_inv=10) against naive evaluations with eigh: of everything (every process dense), and of
             the errors alone, the processes' own work not counted
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfacerr.algorithms import SEVEN
from kfacerr.array import cholesky_inverse
from kfacerr.ea import EAFactor
from kfacerr.inverse import DenseInverse, damped_inverse, precondition, precondition_linear
from kfacerr.process import Estimate, Process, Settings
from kfacerr.rsvd import evd, rsvd
from kfacerr.stream import Step, Window
from kfacerr.streaming import StreamingNystrom
from kfacerr.study import ErrorStudy
from kfacerr.torch import KFAC
from studies.bench.rounds import Prepare, Run
from studies.bench.yardsticks import PHI, RHO, NaiveStudy, TextbookProcess, naive_errors, running

__all__ = ["BASES", "OWN_THREADS", "TASKS", "UP_TO", "Draw", "Ways"]

UPDATE, APPLICATION, LAYER, STUDY = "update", "application", "layer step", "study step"
BRAND, FLOOR, QR, EA = "Brand, Gram form", "GEMM floor", "Brand, QR form", "EA update (8)"
SKETCH, SKETCH_FLOOR = "N-KFAC", "N-KFAC's GEMM floor"
NP_BRAND, NP_FLOOR = "Brand, Gram form (NumPy)", "GEMM floor (NumPy)"
IPCA, RSVD, SVD_LOWRANK, RANDOMIZED = "IncrementalPCA", "rsvd", "svd_lowrank", "randomized_svd"
EVD, CHOLESKY = "eigh", "Cholesky inverse"
LINEAR, ALGORITHM_1, DENSE = "Algorithm 8", "Algorithm 1 l.15-18", "dense inverses"
COLUMNS, L_15, K_FAC = "Algorithm 8", "Algorithm 1", "K-FAC"
OURS, NAIVE, NAIVE_ERRORS = "kfacerr", "dense, eigh", "dense, eigh, errors only"

BASES = {NP_BRAND: NP_FLOOR}
"""What a way is compared with, where that is not the first of its task."""

OWN_THREADS = frozenset({NP_BRAND, NP_FLOOR, IPCA, RANDOMIZED})
"""What runs on NumPy's BLAS, whose threads go on spinning for a while after a call, when torch's wait."""

UP_TO = {
    **{RSVD: 8192, SVD_LOWRANK: 8192, RANDOMIZED: 4096, EVD: 4096, CHOLESKY: 8192, EA: 16384},
    **{ALGORITHM_1: 16384, DENSE: 4096, L_15: 8192, K_FAC: 2048},
}
"""Largest d, on a CPU, of the ways that are not linear in it."""

OVERSAMPLING, POWER = 10, 4

Draw = Callable[[int], Tensor]
"""New columns (rows, n) on the device, by their rows."""
Ways = dict[str, Prepare]
"""By name; the input of a round are columns (d, n)."""


def _way(make: Callable[[Tensor], Run]) -> Prepare:
    return lambda X: [("", make(X))]


def _fixed(run: Run) -> Prepare:
    return lambda X: [("", run)]


def _brand(process: Process) -> Callable[[Any], Run]:
    """One more update."""
    k = itertools.count(10**3)
    return lambda X: lambda: process.update(next(k), X, None)


def _floor(process: Process, rank: int) -> Callable[[Any], Run]:
    assert process.estimate is not None
    low = process.estimate.lowrank
    U, Y, V = low.U[:, :rank] + 0, low.basis, low.mix[:, :rank] + 0  # type: ignore[index]
    return lambda A: lambda: (U.T @ A, A.T @ A, Y @ V)


def _sketches(s: int, batches: list[Tensor]) -> Ways:
    """An update of N-KFAC with its estimate, and its products: X^T Omega, X Z, F = Y T and F^T F."""
    process, k = StreamingNystrom(s=s, rho=RHO), itertools.count()
    for X in batches:
        process.update(next(k), X, None)
    omega, T = torch.randn(len(batches[0]), s).to(batches[0]), torch.randn(s, s).to(batches[0])

    def floor(X: Tensor) -> tuple[Tensor, Tensor]:
        F = omega @ T
        return X @ (X.T @ omega), F.T @ F

    def sketched(X: Tensor) -> Estimate | None:
        process.update(next(k), X, None)
        return process.estimate

    return {
        SKETCH: _way(lambda X: lambda: sketched(X)),
        SKETCH_FLOOR: _way(lambda X: lambda: floor(X)),
    }


def update(d: int, r: int, draw: Draw, *, dense: bool) -> Ways:
    """Everything that follows an EA factor."""
    batches = [draw(d) for _ in range(3)]
    process, textbook = running(r, batches), TextbookProcess(r)
    for X in batches:
        textbook.update(X)
    ways = {
        BRAND: _way(_brand(process)),
        FLOOR: _way(_floor(process, r)),
        QR: _way(lambda X: lambda: textbook.update(X)),
        **_sketches(min(r + batches[0].shape[1], d), batches),
    }
    on_host = batches[0].device.type == "cpu"
    if on_host:
        ways |= _on_numpy([X.numpy() for X in batches], r)
    if dense:
        ways |= _dense_updates(batches, r, on_host=on_host)
    return ways


def _on_numpy(batches: list[np.ndarray], r: int) -> Ways:
    from sklearn.decomposition import IncrementalPCA

    process = running(r, batches)
    model = IncrementalPCA(r).partial_fit(batches[0].T)
    brand, floor = _brand(process), _floor(process, r)
    return {
        NP_BRAND: _way(lambda X: brand(X.numpy())),
        NP_FLOOR: _way(lambda X: floor(X.numpy())),
        IPCA: _way(lambda X: lambda: model.partial_fit(X.numpy().T, check_input=False)),
    }


def _dense_updates(batches: list[Tensor], r: int, *, on_host: bool) -> Ways:
    """Of M (d, d)."""
    X = torch.cat(batches, dim=1)
    M = X @ X.T / len(batches)
    rng, average = np.random.default_rng(0), EAFactor(RHO)
    average.update(batches[0])
    damped = M + torch.eye(len(M), device=M.device)
    ways = {
        RSVD: _fixed(lambda: rsvd(M, r, oversampling=OVERSAMPLING, n_pwr_it=POWER, rng=rng)),
        EVD: _fixed(lambda: evd(M)),
        CHOLESKY: _fixed(lambda: cholesky_inverse(damped)),
        EA: _fixed(lambda: average.update(batches[0])),
        SVD_LOWRANK: _fixed(lambda: torch.svd_lowrank(M, r + OVERSAMPLING, niter=POWER)),
    }
    if on_host:
        from sklearn.utils.extmath import randomized_svd

        ways[RANDOMIZED] = _fixed(lambda: randomized_svd(M.numpy(), r, n_iter=POWER, random_state=0))
    return ways


def _hidden(d: int, r: int, draw: Draw) -> int:
    """The paper's proportion, with room for a Brand process."""
    return max(d // 8, r + draw(1).shape[1] + 1)


def application(d: int, r: int, draw: Draw, *, dense: bool) -> Ways:
    """A step from inverses that are ready."""
    hidden = _hidden(d, r, draw)
    inverses = []
    for rows in (d, hidden):
        estimate = running(r, [draw(rows) for _ in range(3)]).estimate
        assert estimate is not None
        inverses.append(damped_inverse(estimate.lowrank, phi=PHI))
        inverses[-1].apply(draw(rows))  # what it keeps is made at its first use
    of_A, of_G = inverses
    G = draw(hidden)
    J = G @ draw(d).T
    ways = {
        LINEAR: _way(lambda A: lambda: precondition_linear(G, A, of_G, of_A)),
        ALGORITHM_1: _fixed(lambda: precondition(J, of_G, of_A)),
    }
    if dense:
        full_G, full_A = DenseInverse(of_G.dense()), DenseInverse(of_A.dense())
        ways[DENSE] = _fixed(lambda: precondition(J, full_G, full_A))
    return ways


class _LayerStep:
    """One layer and its optimizer, with factors that are ready and stand still."""

    def __init__(self, way: str, d: int, r: int, draw: Draw) -> None:
        torch.manual_seed(0)
        self.x = draw(d).T.clone().requires_grad_()  # as inside a network
        (n, _), hidden, device = self.x.shape, _hidden(d, r, draw), self.x.device
        self.layer = nn.Linear(d, hidden, bias=False, device=device)
        self.weights = torch.randn(n, hidden, device=device) / hidden**0.5
        self.optimizer = KFAC(
            self.layer,
            policy={"": "K-FAC" if way == K_FAC else f"B-KFAC rank={r}"},
            linear_application=way != L_15,
            lr=1e-3,
            T_updt=lambda epoch: 10**9 if epoch else 1,
            T_brand=1,
            momentum=0.0,
        )
        for epoch, steps in ((0, 2 + -(-r // n)), (1, 1)):
            self.optimizer.epoch = epoch
            for _ in range(steps):
                for _, run in self.parts(None):
                    run()

    def parts(self, given: object) -> Iterator[tuple[str, Run]]:
        """The parts of one step."""
        self.optimizer.zero_grad()
        self.x.grad = None
        losses: list[Tensor] = []
        yield "forward", lambda: losses.append((self.layer(self.x).tanh() * self.weights).sum() / len(self.x))
        yield "backward", losses[0].backward
        yield "step()", self.optimizer.step


def layer_step(d: int, r: int, draw: Draw, *, dense: bool) -> Ways:
    """An optimizer's step of one layer."""
    names = [COLUMNS, L_15, *([K_FAC] if dense and d <= UP_TO[K_FAC] else [])]
    return {way: _LayerStep(way, d, r, draw).parts for way in names}


def study_step(d: int, r: int, draw: Draw, *, dense: bool) -> Ways:
    """One measured step on a layer with d inputs and d outputs."""
    study = ErrorStudy(SEVEN, Settings(rank=r, rho=RHO), [Window(10, 10**6)], phi=PHI)
    first = draw(d)
    naive = NaiveStudy(r, first)
    naive.update(first)
    ks = itertools.count(step=10)

    def ours(X: Tensor) -> Run:
        k = next(ks)
        while k in (0, 10) or k % 50 == 10:  # not in the window yet, or heavy updates are due
            study.push(Step(k, first, first))
            k = next(ks)
        return lambda: study.push(Step(k, X, X))

    def all_dense(X: Tensor) -> list[float]:
        for _ in range(2):  # A and G
            naive.update(X)
        return naive_errors(naive, naive, X, X)

    return {
        OURS: _way(ours),
        NAIVE: _way(lambda X: lambda: all_dense(X)),
        NAIVE_ERRORS: _way(lambda X: lambda: naive_errors(naive, naive, X, X)),
    }


TASKS: dict[str, Callable[..., Ways]] = {
    UPDATE: update,
    APPLICATION: application,
    LAYER: layer_step,
    STUDY: study_step,
}
