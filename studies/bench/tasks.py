"""What `studies.bench.speed` times: by task, ways to the same end in float32, and their flops.

    update       of an estimate of the EA factor: the Brand update (10) of a running `Brand` process, truncation
                 and upkeep of orthonormality included, the same flops as plain products (U^T A, A^T A, Y V_r),
                 Algorithm 3 as in a textbook (QR, two projections, all r + n columns formed), IncrementalPCA,
                 decompositions of a dense M, and (8) itself
    application  of the inverses of a layer with d inputs and d/8 outputs: Algorithm 8, Algorithm 1 l.15-18, dense
    layer step   forward, backward and `step()` of a `KFAC` on such a layer, whose factors stand still: Algorithm 8
                 with a FactoredLinear (G A^T is never formed) and by hooks, Algorithm 1, and K-FAC with d modes
    study step   one measured step of the error study (all seven algorithms, new columns, no heavy update due but
                 that of T_inv=10) against naive evaluations with eigh: of everything (every process dense), and of
                 the errors alone, the processes' own work not counted
    rates        a large square product, and the EVD of a small (r + n) matrix in float64, on the device and host

Flops are the algorithm's, not the program's: a product of (a, b) with (b, c) has 2abc, a Cholesky inverse d^3, a
thin QR of k columns with its Q 4dk^2, an EVD with all vectors about 9d^3.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from kfacerr.algorithms import SEVEN
from kfacerr.array import cholesky_inverse, eigh_descending, namespace, to_numpy
from kfacerr.ea import EAFactor
from kfacerr.inverse import DenseInverse, damped_inverse, precondition, precondition_linear
from kfacerr.lowrank import LowRank
from kfacerr.process import Estimate, Process, Settings
from kfacerr.rsvd import evd, rsvd
from kfacerr.stream import Array, Step, Window
from kfacerr.study import ErrorStudy
from kfacerr.torch import KFAC, FactorInfo, factored
from studies.bench.rounds import Prepare, Run
from studies.bench.yardsticks import PHI, RHO, NaiveStudy, TextbookProcess, columns, naive_errors, running

__all__ = ["BASES", "OWN_THREADS", "TASKS", "UP_TO", "Place", "Way", "Ways"]

UPDATE, APPLICATION, LAYER, STUDY = "update", "application", "layer step", "study step"
RATES = "rates"
BRAND, FLOOR, QR, EA = "Brand, Gram form", "GEMM floor", "Brand, QR form", "EA update (8)"
NP_BRAND, NP_FLOOR = "Brand, Gram form (NumPy)", "GEMM floor (NumPy)"
IPCA, RSVD, SVD_LOWRANK, RANDOMIZED = "IncrementalPCA", "rsvd", "svd_lowrank", "randomized_svd"
EVD, CHOLESKY = "eigh", "Cholesky inverse"
LINEAR, ALGORITHM_1, DENSE = "Algorithm 8", "Algorithm 1 l.15-18", "dense inverses"
DROP_IN, HOOKS, L_15, K_FAC = "Algorithm 8, drop-in", "Algorithm 8, hooks", "Algorithm 1", "K-FAC"
OURS, NAIVE, NAIVE_ERRORS = "kfacerr", "dense, eigh", "dense, eigh, errors only"
GEMM, SMALL, SMALL_HOST = "GEMM", "small EVD", "small EVD on the host"

BASES = {NP_BRAND: NP_FLOOR}
"""What a way is compared with, where that is not the first of its task."""

OWN_THREADS = frozenset({NP_BRAND, NP_FLOOR, IPCA, RANDOMIZED})
"""What runs on NumPy's BLAS, whose threads go on spinning for a while after a call, when torch's wait."""

UP_TO = {RSVD: 8192, SVD_LOWRANK: 8192, RANDOMIZED: 4096, EVD: 4096, CHOLESKY: 8192, EA: 16384} | {
    **{ALGORITHM_1: 16384, DENSE: 4096, L_15: 8192, K_FAC: 2048}
}
"""Largest d, on a CPU, of the ways that are not linear in it."""

OVERSAMPLING, POWER = 10, 4


class Place(NamedTuple):
    """Where a task is run.

    Attributes:
        put: takes a host array to the library and device in question.
        device: of torch; the same for both libraries.
        torch: whether the library is torch.
    """

    put: Callable[[np.ndarray], Array]
    device: torch.device
    torch: bool


class Way(NamedTuple):
    """One way.

    Attributes:
        prepare: see `studies.bench.rounds`; the round's input are columns (d, n) on the host.
        flops: of one run, where they are known.
    """

    prepare: Prepare
    flops: float = 0.0


Ways = dict[str, Way]


def _way(make: Callable[[Any], Run], flops: float = 0.0) -> Way:
    return Way(lambda X: [("", make(X))], flops)


def _fixed(run: Run, flops: float = 0.0) -> Way:
    return Way(lambda X: [("", run)], flops)


def _brand(process: Process) -> Callable[[Any], Run]:
    """One more update."""
    k = itertools.count(10**3)
    return lambda X: lambda: process.update(next(k), X, None)


def _floor(process: Process, rank: int) -> Callable[[Any], Run]:
    assert process.estimate is not None
    low = process.estimate.lowrank
    U, Y, V = low.U[:, :rank] + 0, low.basis, low.mix[:, :rank] + 0  # type: ignore[index]
    return lambda A: lambda: (U.T @ A, A.T @ A, Y @ V)


def update(d: int, r: int, n: int, place: Place, rng: np.random.Generator, *, dense: bool) -> Ways:
    """Everything that follows an EA factor."""
    put = place.put
    host = [columns(d, n, rng) for _ in range(3)]
    batches = [put(x) for x in host]
    process, m = running(r, batches), r + n
    brand, floor = _brand(process), _floor(process, r)
    flops = 2.0 * d * m * m
    ways = {BRAND: _way(lambda X: brand(put(X)), flops + 9 * m**3), FLOOR: _way(lambda X: floor(put(X)), flops)}
    if place.torch:
        textbook = TextbookProcess(r)
        for X in batches:
            textbook.update(X)

        def qr(X: Any) -> Run:
            x = put(X)
            return lambda: textbook.update(x)

        ways[QR] = _way(qr)
    if place.device.type == "cpu":
        ways |= _on_numpy(host, r)
    if dense:
        ways |= _dense_updates(batches, r, place)
    return ways


def _on_numpy(host: list[np.ndarray], r: int) -> Ways:
    from sklearn.decomposition import IncrementalPCA

    process = running(r, host)
    model = IncrementalPCA(r).partial_fit(host[0].T)
    return {
        NP_BRAND: _way(_brand(process)),
        NP_FLOOR: _way(_floor(process, r)),
        IPCA: _way(lambda X: lambda: model.partial_fit(X.T, check_input=False)),
    }


def _dense_updates(batches: list[Array], r: int, place: Place) -> Ways:
    """Of M (d, d)."""
    X = namespace(*batches).concat(batches, axis=1)
    M = X @ X.T / len(batches)
    d, n = batches[0].shape
    k, draw = r + OVERSAMPLING, np.random.default_rng(0)
    average = EAFactor(RHO)
    average.update(batches[0])
    damped = M + namespace(M).eye(d, dtype=M.dtype, device=M.device)
    ways = {
        RSVD: _fixed(
            lambda: rsvd(M, r, oversampling=OVERSAMPLING, n_pwr_it=POWER, rng=draw),
            (POWER + 2) * (2.0 * d**2 * k + 4.0 * d * k**2),
        ),
        EVD: _fixed(lambda: evd(M), 9.0 * d**3),
        CHOLESKY: _fixed(lambda: cholesky_inverse(damped), float(d) ** 3),
        EA: _fixed(lambda: average.update(batches[0]), 2.0 * d**2 * n),
    }
    if place.torch:
        ways[SVD_LOWRANK] = _fixed(lambda: torch.svd_lowrank(M, r + OVERSAMPLING, niter=POWER))
    if place.device.type == "cpu":
        from sklearn.utils.extmath import randomized_svd

        ways[RANDOMIZED] = _fixed(lambda: randomized_svd(M.numpy(), r, n_iter=POWER, random_state=0))
    return ways


def application(d: int, r: int, n: int, place: Place, rng: np.random.Generator, *, dense: bool) -> Ways:
    """A step from inverses that are ready."""
    put, hidden = place.put, max(d // 8, r + n + 1)
    inverses = []
    for rows in (d, hidden):
        estimate = running(r, [put(columns(rows, n, rng)) for _ in range(3)]).estimate
        assert estimate is not None
        inverse = damped_inverse(estimate.lowrank, phi=PHI)
        inverse.apply(put(columns(rows, 1, rng)))  # what it keeps is made at its first use
        inverses.append(inverse)
    of_A, of_G = inverses
    G = put(columns(hidden, n, rng))

    def linear(X: Any) -> Run:
        A = put(X)
        return lambda: precondition_linear(G, A, of_G, of_A)

    ways = {LINEAR: _way(linear, 4.0 * (d + hidden) * (r + n) * n)}
    J = G @ put(columns(d, n, rng)).T
    ways[ALGORITHM_1] = _fixed(lambda: precondition(J, of_G, of_A))
    if dense:
        full_G, full_A = DenseInverse(of_G.dense()), DenseInverse(of_A.dense())
        ways[DENSE] = _fixed(lambda: precondition(J, full_G, full_A))
    return ways


class _Full(Process):
    """An estimate with all d modes, as K-FAC's EVD gives; which ones does not matter to the time."""

    needs_factor = False

    def __init__(self, info: FactorInfo) -> None:
        super().__init__()

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        """Once."""
        if self.estimate is None:
            D = torch.linspace(1, 0.1, len(X), dtype=X.dtype, device=X.device)
            self.estimate = Estimate(LowRank(torch.eye(len(X), dtype=X.dtype, device=X.device), D), D.sum())


class _LayerStep:
    """One layer and its optimizer, with factors that are ready and stand still."""

    def __init__(self, way: str, d: int, r: int, n: int, device: torch.device) -> None:
        torch.manual_seed(0)
        hidden = max(d // 8, r + n + 1)
        self.layer = nn.Linear(d, hidden, bias=False, device=device)
        if way == DROP_IN:
            factored(self.layer)
        self.x = torch.randn(n, d, device=device, requires_grad=True)  # as inside a network
        self.weights = torch.randn(n, hidden, device=device) / hidden**0.5
        self.optimizer = KFAC(
            self.layer,
            policy={"": _Full if way == K_FAC else f"B-KFAC rank={r}"},
            linear_application=way == HOOKS,
            lr=1e-3,
            T_updt=lambda epoch: 10**9 if epoch else 1,
            T_brand=1,
        )
        for epoch, steps in ((0, 1 if way == K_FAC else 2 + -(-r // n)), (1, 1)):
            self.optimizer.epoch = epoch
            for _ in range(steps):
                for _, run in self.parts(None):
                    run()

    def parts(self, given: Any) -> Iterator[tuple[str, Run]]:
        """The parts of one step."""
        self.optimizer.zero_grad()
        self.x.grad = None
        losses: list[torch.Tensor] = []
        yield "forward", lambda: losses.append((self.layer(self.x).tanh() * self.weights).sum() / len(self.x))
        yield "backward", losses[0].backward
        yield "step()", self.optimizer.step


def layer_step(d: int, r: int, n: int, place: Place, rng: np.random.Generator, *, dense: bool) -> Ways:
    """An optimizer's step of one layer."""
    names = [DROP_IN, HOOKS, L_15, *([K_FAC] if dense and d <= UP_TO[K_FAC] else [])]
    return {way: Way(_LayerStep(way, d, r, n, place.device).parts) for way in names}


def study_step(d: int, r: int, n: int, place: Place, rng: np.random.Generator, *, dense: bool) -> Ways:
    """One measured step on a layer with d inputs and d outputs."""
    study = ErrorStudy(SEVEN, Settings(rank=r, rho=RHO), [Window(10, 10**6)], phi=PHI)
    first = place.put(columns(d, n, rng))
    naive = NaiveStudy(r, first)
    naive.update(first)
    ks = itertools.count(step=10)

    def ours(X: Any) -> Run:
        k = next(ks)
        while k in (0, 10) or k % 50 == 10:  # not in the window yet, or heavy updates are due
            study.push(Step(k, first, first))
            k = next(ks)
        step = Step(k, *[place.put(X)] * 2)
        return lambda: study.push(step)

    def all_dense(X: Any) -> Run:
        x = place.put(X)

        def run() -> list[float]:
            for _ in range(2):  # A and G
                naive.update(x)
            return naive_errors(naive, naive, x, x)

        return run

    def errors_only(X: Any) -> Run:
        x = place.put(X)
        return lambda: naive_errors(naive, naive, x, x)

    return {OURS: _way(ours), NAIVE: _way(all_dense), NAIVE_ERRORS: _way(errors_only)}


def rates(d: int, r: int, n: int, place: Place, rng: np.random.Generator, *, dense: bool) -> Ways:
    """What the others' rates are compared with."""
    side, m, put = min(8192, d), r + n, place.put
    X = put(rng.standard_normal((side, side), dtype=np.float32))
    small = rng.standard_normal((m, 2 * m))
    K = put(small @ small.T)  # in float64, as Brand's
    there_and_back = lambda: [put(np.ascontiguousarray(x)) for x in eigh_descending(to_numpy(K))]  # noqa: E731
    return {
        GEMM: _fixed(lambda: X @ X, 2.0 * side**3),
        SMALL: _fixed(lambda: eigh_descending(K), 9.0 * m**3),
        SMALL_HOST: _fixed(there_and_back, 9.0 * m**3),
    }


TASKS: dict[str, Callable[..., Ways]] = {
    UPDATE: update,
    APPLICATION: application,
    LAYER: layer_step,
    STUDY: study_step,
    RATES: rates,
}
