"""Do the paper's propositions, and the certificates, hold on a recording of your own training?

Two kinds of check, both on the K-factors A and G of a layer:

- **Stretches.** A few runs of consecutive updates get every claim of `kfacerr.propositions` (Propositions 3.1-4.2,
  (19), footnote 11) and every certificate against dense matrices, at any d: `propositions.compress` turns the
  columns into short ones by an isometry, which changes no claim. It is exact; nothing is estimated.
  A stretch in the middle starts from the B-KFAC estimate there, M_0 = U D U^T, as a column
  block of its own: a p.s.d. matrix like others.
  Where the matrices would have more than `ROWS` rows, a random choice of each update's columns stands for all:
  a claim on any columns is a claim on those, and a violation found is one.
- **The whole stream.** B-KFAC's certificate at every update, from `PROBES` Gaussian columns W whose products M_k W
  follow (8) without M_k. E = M - M~ is then known on W. What is checked: W^T E W is p.s.d.; E's Nyström
  approximation from E W, which is below E if E >= 0, exceeds no bound (both one-sided: a violation found is a
  violation, one may be missed); and Hutchinson's estimate of tr E is as near to the certified nuclear norm as
  Laurent & Massart's (2000) bound for chi-squares says, all of them at once but for a chance of `ALARM`.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from . import propositions
from .algorithms import Algorithm
from .array import upper_factor
from .certificate import Certificate
from .checks import instance, whole
from .claims import EPS, TOLERANCE, Claim, Identity, Inequality, Psd, norms
from .correction import correct
from .exceptions import InputError
from .factor import KFactor
from .inverse import check_phi
from .lowrank import LowRank
from .process import Process, Settings
from .recording import LayerRecording
from .verdict import Verdict, findings

__all__ = ["certificate_claims", "verify_layer"]

PROBES = 16

ROWS = 200
"""Rows of a dense check's matrices at most, unless the rank asks for more: its cost is cubic in them."""

ALARM = 1e-6
"""The chance of a false alarm in a layer's whole-stream trace checks."""


# ------------------------------------------------------------------------------------------- certificates


def certificate_claims(process: Process, M: np.ndarray, phi: float, where: str) -> Iterator[Claim]:
    """What a process's certificate says of M (d, d), float64; nothing if there is none."""
    known, held = process.certificate, process.estimate
    if known is None or held is None:
        return
    E = M - _dense(held.lowrank)
    top, d = float(np.linalg.norm(M, 2)), len(M)
    nuclear, rounding = float(known.nuclear), float(known.rounding)
    scale = _scale(float(np.trace(M)), rounding)
    actual = norms(E)
    yield Psd("certificate: M - M~ p.s.d.", E, scale, where)
    yield Identity("certificate: nuclear norm = t - sum D", actual["nuclear"], nuclear, scale, where)
    yield Inequality("certificate: Frobenius", actual["Frobenius"], float(known.frobenius), scale, where)
    yield Inequality("certificate: spectral", actual["spectral"], float(known.spectral), scale, where)
    if held.level is not None:
        yield Inequality("FD: M - M~ <= mu I", actual["spectral"], float(held.level), scale, where)
    if top == 0:
        return
    lam = phi * top
    eye = np.eye(d)
    difference = np.linalg.inv(M - E + lam * eye) - np.linalg.inv(M + lam * eye)
    bound = known.inverse_bound(held.trace * 0 + lam)
    inverse = norms(difference)
    scale = d**0.5 * (1 + top / lam) / lam
    yield Inequality("certificate: inverse, spectral", inverse["spectral"], float(bound.spectral), scale, where)
    yield Inequality("certificate: inverse, Frobenius", inverse["Frobenius"], float(bound.frobenius), scale, where)


def _scale(trace: float, rounding: float) -> float:
    """`holds` allows TOLERANCE eps scale: what the certificate says of rounding, and the check's own beside it.

    The check forms M and M~ by products, which round by 2 d^(1/2) eps t at most: TOLERANCE eps t at d = 1000.
    """
    return trace + rounding / (TOLERANCE * EPS)


def _dense(low: LowRank) -> np.ndarray:
    return np.asarray((low.U * low.D[None, :]) @ low.U.T)


def stretch_claims(columns: Sequence[np.ndarray], settings: Settings, *, phi: float) -> Iterator[Claim]:
    """All claims on one stretch of columns (d, n), float64."""
    columns = propositions.compress([_narrow(X) for X in columns])
    rank, rho = settings.rank, settings.rho
    yield from propositions.claims(columns, r=rank, rho=rho)
    factor = KFactor("stretch", {name: Algorithm.parse(name).process(settings, "A") for name in CERTIFIED}, rho)
    brand = factor.processes["B-KFAC"]
    for k, X in enumerate(columns):
        before = None if brand.estimate is None else brand.estimate.lowrank
        factor.push(k, X)
        for name, process in factor.processes.items():
            yield from certificate_claims(process, factor.average.M, phi, f"{name}, k={k}")
        yield brand_claim(brand, before, factor.admit(X), f"k={k}")
        if k == 0:
            continue
        assert brand.estimate is not None
        low = brand.estimate.lowrank
        idx = np.random.default_rng([settings.seed, k]).choice(
            low.m, size=(min(rank, low.m) + 1) // 2, replace=False
        )
        after = correct(low, factor.average.M, idx)
        yield from propositions.correction(factor.average.M, _dense(low), _dense(after), low.U[:, idx])


CERTIFIED = (
    "B-KFAC",
    "B-R-KFAC T_rsvd=2",
    "B-R-KFAC T_rsvd=2 sketch=nystrom",
    "R-KFAC T_inv=1",
    "K-FAC T_inv=1",
    "FD",
    "N-KFAC",
    "N-KFAC T_base=1",
    "W-KFAC T_inv=1",
)
"""The algorithms whose certificates are checked on a stretch."""


def brand_claim(brand: Process, before: LowRank | None, X: np.ndarray, where: str) -> Claim:
    """(10): the process's estimate after X is rho B + (1 - rho) X X^T, B the leading modes of that `before`.

    One step at a time: where eigenvalues r and r + 1 are near, two sound runs of (10) part for good.
    """
    held, known = brand.estimate, brand.certificate
    assert held is not None and known is not None
    rank, rho = brand.settings.rank, brand.settings.rho
    expected = X @ X.T
    if before is not None:
        expected = rho * _dense(before.truncate(rank)) + (1 - rho) * expected
    scale = _scale(float(held.trace), float(known.rounding))
    return Identity("(10) by the Brand process", _dense(held.lowrank), expected, scale, where)


def _chosen(X: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(d, min(n, count)) of the columns of X, at random and in their order."""
    n = X.shape[1]
    return X if n <= count else X[:, np.sort(rng.choice(n, size=count, replace=False))]


def _narrow(X: np.ndarray) -> np.ndarray:
    """(d, min(n, d)) with the same X X^T, on which alone everything depends."""
    return upper_factor(X.T).T if X.shape[1] > X.shape[0] else X


# -------------------------------------------------------------------------------------------- whole stream


class _Probes:
    """M_k W by (8) for Gaussian W (d, PROBES): all that is asked of M_k over the whole stream."""

    def __init__(self, d: int, rho: float, seed: int) -> None:
        self.W = np.random.default_rng(seed).standard_normal((d, PROBES))
        self.rho = rho
        self.MW: np.ndarray | None = None

    def update(self, X: np.ndarray) -> None:
        new = X @ (X.T @ self.W)
        self.MW = new if self.MW is None else self.rho * self.MW + (1 - self.rho) * new

    def claims(self, low: LowRank, known: Certificate, trace: float, checks: int) -> Iterator[Claim]:
        """`checks`: over how many instances the chance of a false alarm is spread."""
        assert self.MW is not None
        W, q = self.W, PROBES
        EW = self.MW - low.apply(W)
        G = W.T @ EW
        G = (G + G.T) / 2
        rounding = float(known.rounding)
        scale = max(trace, rounding / (TOLERANCE * EPS))
        # W is no isometry: E <= rounding I shows as rounding W^T W.
        grown = float(np.linalg.norm(W, 2)) ** 2
        yield Psd("whole stream: W^T (M - M~) W p.s.d.", G, grown * scale)

        F, s, N = float(known.frobenius), float(known.spectral), float(known.nuclear)
        x = math.log(2 * checks / ALARM)
        deviation = 2 * F * math.sqrt(x / q) + 2 * s * x / q
        yield Inequality("whole stream: trace by Hutchinson", abs(np.trace(G) / q - N), deviation, scale)

        w, V = np.linalg.eigh(G)
        floor = max(1e-4 * float(w[-1]), grown * rounding)
        if floor <= 0:
            return
        lower = np.linalg.svd((EW @ V) / np.sqrt(np.maximum(w, floor)), compute_uv=False) ** 2
        # E W is off by rounding ||W||; the columns here, of length at most ||E||^(1/2), by that / floor^(1/2).
        off = 2 * math.sqrt(float(lower[0]) * grown / floor) * rounding
        yield Inequality("whole stream: spectral, from below", float(lower[0]), s + off, scale)
        yield Inequality(
            "whole stream: Frobenius, from below", float(np.linalg.norm(lower)), F + q**0.5 * off, scale
        )
        yield Inequality("whole stream: nuclear, from below", float(lower.sum()), N + rounding + q * off, scale)


class _Side:
    """One K-factor of a layer on its way through the recording: B-KFAC and the probes follow it without M.

    Args:
        name: "A" or "G".
        d: its dimension.
        settings: of the processes; the sketches are rough ones, of two more columns and no power iteration.
        phi: damping ratio of the inverse certificates.
        widths: columns of an update on the whole stream, and on a stretch.
        starts: the updates that stretches start with.
        length: updates in each.
    """

    def __init__(
        self,
        name: str,
        d: int,
        settings: Settings,
        phi: float,
        widths: tuple[int, int],
        starts: list[int],
        length: int,
    ) -> None:
        self.name, self.settings, self.phi = name, settings, phi
        self.whole, self.dense = widths
        self.starts, self.length = starts, length
        self.rng = np.random.default_rng([settings.seed, 1])
        self.factor = KFactor(name, {"B-KFAC": Algorithm.parse("B-KFAC").process(settings, name)}, settings.rho)
        self.probes = _Probes(d, settings.rho, settings.seed)
        self.open: list[tuple[int, int, list[np.ndarray]]] = []  # first iteration, end, columns

    def push(self, i: int, k: int, X: np.ndarray, checks: int) -> Iterator[tuple[str, Claim]]:
        """The i-th update, at iteration k."""
        X = _narrow(_chosen(self.factor.admit(X.astype(np.float64)), self.whole, self.rng))
        brand = self.factor.processes["B-KFAC"]
        if i in self.starts:
            low = (
                None
                if brand.estimate is None
                else brand.estimate.lowrank.truncate(self.settings.rank + self.dense)
            )
            root = [] if low is None else [low.U * np.sqrt(low.D)[None, :]]
            self.open.append((k, i + self.length, root))
        self.factor.push(i, X)
        self.probes.update(X)
        assert brand.estimate is not None and brand.certificate is not None
        trace = float(brand.estimate.trace)
        for claim in self.probes.claims(brand.estimate.lowrank, brand.certificate, trace, checks):
            yield f"{self.name}, iteration {k}", claim
        yield from self._stretches(i, _chosen(X, self.dense, self.rng))

    def _stretches(self, i: int, X: np.ndarray) -> Iterator[tuple[str, Claim]]:
        """Gives X to the open stretches, and what those claim that end with it."""
        still = []
        for start, end, columns in self.open:
            columns.append(X)
            if i + 1 < end:
                still.append((start, end, columns))
                continue
            for claim in stretch_claims(columns, self.settings, phi=self.phi):
                yield f"{self.name}, stretch from {start}", claim
        self.open = still


# ---------------------------------------------------------------------------------------------- a layer


def verify_layer(
    layer: LayerRecording,
    *,
    rank: int | None = None,
    rho: float = 0.95,
    phi: float = 0.1,
    stretches: int = 3,
    length: int | None = None,
    seed: int = 0,
) -> Verdict:
    """Checks everything on one layer, reading it once.

    Args:
        layer: of an open recording.
        rank: truncation rank r of both factors; by default min(n, d/4) of each, and at most ROWS/4.
        rho: EA decay.
        phi: damping ratio of the inverse certificates.
        stretches: how many runs of updates get the dense checks, spread over the recording.
        length: updates in each; by default 2 to 5, by size.
        seed: of sketches, corrections and probes.

    Returns:
        What was checked, and what was found.

    Raises:
        InputError: values out of range, fewer than two updates, or bad columns; names file, layer and iteration.
    """
    where = f"{instance(layer, 'layer', LayerRecording).path}: layer {layer.name!r}"
    check_phi(phi)
    updates = np.flatnonzero(layer.update)
    if len(updates) < 2:
        raise InputError(f"{where}: at least two updates of the EA factors are needed, there are {len(updates)}")
    for name, value in (("rank", rank), ("stretches", stretches), ("length", length)):
        if value is not None or name == "stretches":
            whole(value, name, 1)
    sides = []
    for name, d in (("A", layer.d_A), ("G", layer.d_G)):
        r = rank or max(1, min(layer.n, d // 4, ROWS // 4))
        steps = min(length or max(2, min(5, (ROWS - r) // min(layer.n, d) - 1)), len(updates))
        widths = _widths(d, layer.n, r, steps)
        starts = sorted({round(x) for x in np.linspace(0, len(updates) - steps, stretches)})
        settings = Settings(rank=r, rho=rho, oversampling=2, n_pwr_it=0, seed=seed)
        sides.append(_Side(name, d, settings, phi, widths, starts, steps))
    found = findings(_claims(layer, sides, len(updates), where))
    coverage = [
        f"{side.name} (d={side.probes.W.shape[0]}, r={side.settings.rank}): all claims, densely and exactly, on "
        + ", ".join(_span(layer, updates, start, side.length) for start in side.starts)
        + _share(side.dense, layer.n)
        + f"; B-KFAC's certificate at all {len(updates)} updates by {PROBES} random probes"
        + _share(side.whole, layer.n)
        for side in sides
    ]
    return Verdict(layer.name, found, coverage)


def _claims(
    layer: LayerRecording, sides: Sequence[_Side], updates: int, where: str
) -> Iterator[tuple[str, Claim]]:
    """Those of all updates, in their order."""
    for i, step in enumerate(step for step in layer.steps() if step.update):
        for side, X in zip(sides, (step.A, step.G), strict=True):
            try:
                yield from side.push(i, step.k, X, 2 * updates)
            except InputError as error:
                raise InputError(f"{where}, iteration {step.k}: {side.name}: {error}") from None


def _widths(d: int, n: int, rank: int, steps: int) -> tuple[int, int]:
    """How many of an update's n columns the whole stream takes, and a stretch.

    A stretch's matrices have min(d, r + (steps + 1) width) rows. The whole stream takes all columns while Brand
    updates are cheaper than a dense EVD.
    """
    if d <= ROWS:
        return n, n
    few = min(n, max(ROWS // 8, (ROWS - rank) // (steps + 1)))
    return n if rank + n < d else min(n, max(few, ROWS // 4)), few


def _share(count: int, n: int) -> str:
    return "" if count == n else f", on {count} of the {n} columns of each, drawn at random"


def _span(layer: LayerRecording, updates: np.ndarray, start: int, length: int) -> str:
    return f"iterations {layer.k[updates[start]]}-{layer.k[updates[start + length - 1]]} ({length} updates)"
