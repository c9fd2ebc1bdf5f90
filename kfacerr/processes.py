"""The K-factor processes: R-KFAC (9), B-KFAC (10), and Algorithms 1, 4, 5 and 7 on one factor.

`kfacerr.process` says how a process is driven; `kfacerr.ea` holds the EA factor (8). All take `Settings`.
"""

from typing import Any, ClassVar

from .array import eps, namespace, norm, square_sum
from .brand import carried, symmetric_brand
from .certificate import EVD_LOSS, FLOAT64, LOSS, Certificate
from .correction import correct
from .ea import EAFactor
from .inverse import Exact
from .lowrank import LowRank
from .process import Cost, Estimate, Process
from .rsvd import SKETCHES
from .stream import Array

__all__ = ["Brand", "BrandCorrected", "BrandRsvd", "Evd", "Periodic", "Rsvd", "certified_decomposition"]

STALE = "stale: M moved on since the decomposition, and M_k >= rho^j M_{k-j} is all that is left of the order"
NOT_PSD = "the sketch has a projection error and is none of RS and Nyström: M - M~ need not be p.s.d."
CORRECTED = "corrected (Algorithm 6): M - M~ need not be p.s.d. any more"
DROPPED = "columns between Brand updates were dropped: M holds what the estimate never saw"
WAITING = "stale: columns wait for the next Brand update"


class Periodic(Process):
    """A decomposition of M_k alone, once in T_inv iterations."""

    needs_columns = False
    memoryless = True
    schedules: ClassVar[tuple[str, ...]] = ("T_inv",)

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        """Decomposes M_k if that is due."""
        assert factor is not None
        if self.clocks["T_inv"].due(k):
            self._take(factor)
        else:
            self._certificate = STALE

    def refresh(self, k: int, factor: EAFactor) -> None:
        """Decomposes M_k."""
        self.clocks["T_inv"].due(k)
        self._take(factor)

    def _take(self, factor: EAFactor) -> None:
        self.estimate = Estimate(self.decompose(factor.M), factor.trace)
        self._certificate = self.certified(factor)

    def decompose(self, M: Array) -> LowRank:
        """The representation of M (d, d)."""
        raise NotImplementedError(f"{type(self).__name__} is a periodic process without `decompose`")

    def certified(self, factor: EAFactor) -> Certificate | str:
        """The certificate of the decomposition just taken."""
        return "this process derives none"


class Evd(Periodic):
    """K-FAC: M_k itself, of which the damped inverse, or the EVD, is taken when it is asked for."""

    def decompose(self, M: Array) -> LowRank:
        """All d modes."""
        return Exact(namespace(M).asarray(M, copy=True))

    def certified(self, factor: EAFactor) -> Certificate | str:
        """M~ = M: no error, but the rounding of M by (8) and of the EVD by which M~ may be applied."""
        M, trace = factor.M, factor.trace
        d, unit, size = M.shape[0], eps(M), norm(M)
        # Twice: a factor that only decays after a burst has rounded more often than 1/(1 - rho) times.
        products = 2 * (LOSS[0] + LOSS[1] * d**0.5) * unit * trace / (1 - factor.rho)
        rounding = products + EVD_LOSS * d * unit * size
        return Certificate(0 * trace, rounding, rounding, rounding, d)

    def due(self, k: int) -> bool:
        """Never: nothing is decomposed before an inverse is asked for."""
        return False

    def cost(self, d: int, n: int) -> Cost:
        """A Cholesky factor and the inverse from it: d^3/3 and 2 d^3/3 multiply-adds, 2 d^3 flops."""
        return Cost(2.0 * d * d * n, 2.0 * d**3, self.settings.T_inv, 3.0 * d * d, d)


class Rsvd(Periodic):
    """R-KFAC (9), Algorithm 1 l.13: the rank-r RSVD of M_k. With a T_inv beyond the run: "no update"."""

    def decompose(self, M: Array) -> LowRank:
        """The r leading modes by the sketch of the settings."""
        return _sketched(self, M)

    def certified(self, factor: EAFactor) -> Certificate | str:
        """Of the sketch just taken."""
        return _certified_sketch(self, factor)

    def cost(self, d: int, n: int) -> Cost:
        """See `_sketch_flops`."""
        s = self.settings
        return Cost(2.0 * d * d * n, _sketch_flops(self, d), s.T_inv, d * d + float(d) * s.rank, min(s.rank, d))


class Brand(Process):
    """B-KFAC (10), Algorithm 4: truncate to rank r, then the symmetric Brand update with the new columns.

    Never forms a (d, d) array. The estimate has rank r + n: truncation happens just before the next update. An
    update comes once in T_brand iterations; the columns in between are dropped, as in the paper. With `accumulate`
    they are kept, and the next update takes all of them with the weights of (8): the estimate then has rank r + n
    times the number of batches.
    """

    needs_factor = False
    schedules: ClassVar[tuple[str, ...]] = ("T_brand",)

    _waiting: tuple[float, Array] | None = None  # (c, W): M is to become c M_B + W W^T

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        """A Brand update with X_k, if it is due."""
        self._absorb(k, X)

    def _absorb(self, k: int, X: Array) -> bool:
        """Takes X_k; whether there was a Brand update, and not only columns kept or dropped."""
        due = self.clocks["T_brand"].due(k)
        if self.estimate is None:
            self._start(X)
            return True
        if not (due or self.settings.accumulate):
            self._waiting, self._certificate = None, DROPPED
            return False
        decay = rho = self.settings.rho
        W, weight = X, (1 - rho) ** 0.5
        if self._waiting is not None:
            earlier, columns = self._waiting
            decay, W, weight = rho * earlier, namespace(X).concat([rho**0.5 * columns, weight * X], axis=1), 1.0
        if not due:
            self._waiting = decay, weight * W
            return False
        self._waiting = None
        whole = self.estimate.lowrank
        B, augmented = carried(whole, self.settings.rank, W, weight)  # l.3-4
        D, removed = self._reduced(B.D, whole.D, decay)
        trace = decay * self.estimate.trace + weight**2 * square_sum(W)
        low = symmetric_brand(LowRank(B.U, D), augmented.Y[:, B.m :], augmented, decay=decay)  # l.6-7
        self.estimate = Estimate(low, trace)
        if isinstance(self._certificate, Certificate):
            self._certificate = self._certificate.after_brand(removed, decay, low, trace)
        return True

    def _start(self, X: Array) -> None:
        """M_B,0 = X_0 X_0^T: the exact thin factorisation of the first columns."""
        self.estimate = Estimate(symmetric_brand(None, X), square_sum(X))
        low, trace = self.estimate.lowrank, self.estimate.trace
        self._certificate = Certificate.of_decomposition(low, trace, unit=FLOAT64)

    def _reduced(self, kept: Array, D: Array, decay: float) -> tuple[Array, Array]:
        """The eigenvalues that the Brand update starts from, and those of what is taken away from M~, M~ - B >= 0.

        Args:
            kept: the leading ones, of the modes that are carried on.
            D: all of M~.
            decay: what the next update weighs M~ by.
        """
        return kept, D[kept.shape[0] :]

    def _certified(self) -> Certificate | str:
        return self._certificate if self._waiting is None else WAITING

    def cost(self, d: int, n: int) -> Cost:
        """Three products with d x (r + n) matrices and the EVD of order r + n (`kfacerr.brand`)."""
        r, m = min(self.settings.rank, d), min(self.settings.rank + n, d)
        update = 2.0 * d * m * (r + n) + 9.0 * m**3
        return Cost(update, 0.0, self.settings.T_brand, 2.0 * d * m, m)

    def state_dict(self) -> dict[str, Any]:
        """Also the columns that wait."""
        waiting = self._waiting and {"decay": self._waiting[0], "columns": self._waiting[1]}
        return {**super().state_dict(), "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        held = state["waiting"]
        self._waiting = held and (held["decay"], held["columns"])


class BrandRsvd(Brand):
    """B-R-KFAC, Algorithm 5: B_{k-1} is overwritten by the RSVD of M_{k-1} once in T_RSVD iterations.

    As l.7 takes a Brand update after it, it waits for one where T_brand is longer.
    """

    needs_factor = True
    memoryless = True
    schedules: ClassVar[tuple[str, ...]] = ("T_brand", "T_rsvd")

    def begin(self, k: int, factor: EAFactor | None) -> None:
        """Overwrites B_{k-1}, if that is due."""
        assert factor is not None
        if self.clocks["T_brand"].coming(k) and self.clocks["T_rsvd"].due(k) and factor.M is not None:
            self._overwrite(factor)

    def refresh(self, k: int, factor: EAFactor) -> None:
        """The RSVD of M_k."""
        self.clocks["T_rsvd"].due(k)
        self._overwrite(factor)

    def _overwrite(self, factor: EAFactor) -> None:
        self._waiting = None  # M holds those columns
        self.estimate = Estimate(_sketched(self, factor.M), factor.trace)
        self._certificate = _certified_sketch(self, factor)

    def cost(self, d: int, n: int) -> Cost:
        """Brand's, (8), and the RSVD."""
        brand = super().cost(d, n)
        return brand._replace(
            update=brand.update + 2.0 * d * d * n,
            heavy=_sketch_flops(self, d),
            period=self.settings.T_rsvd,
            numbers=brand.numbers + float(d) * d,
        )


class BrandCorrected(Brand):
    """B-KFAC-C, Algorithm 7: once in T_corct iterations the estimate is corrected on random modes (Alg. 6).

    Only after a Brand update, which the correction follows in Algorithm 7.
    """

    needs_factor = True
    schedules: ClassVar[tuple[str, ...]] = ("T_brand", "T_corct")

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        """A Brand update, and a correction if it is due."""
        if not (self._absorb(k, X) and self.clocks["T_corct"].due(k)):
            return
        assert factor is not None and self.estimate is not None
        modes = self.estimate.lowrank.m
        count = min(round(self.settings.phi_corct * self.settings.rank), modes)  # n_crc
        if count == 0:  # nothing is corrected, and what was certain stays so
            return
        idx = self.rng.choice(modes, size=count, replace=False)
        self.estimate = Estimate(correct(self.estimate.lowrank, factor.M, idx), self.estimate.trace)
        self._certificate = CORRECTED

    def cost(self, d: int, n: int) -> Cost:
        """Brand's, (8), and a correction: one product of M with n_crc columns."""
        brand, count = super().cost(d, n), self.settings.phi_corct * self.settings.rank
        return brand._replace(
            update=brand.update + 2.0 * d * d * n,
            heavy=2.0 * d * d * count + 4.0 * d * count**2,
            period=self.settings.T_corct,
            numbers=brand.numbers + float(d) * d,
        )


# ------------------------------------------------------------------------------------------------ sketches


def _sketched(process: Process, M: Array) -> LowRank:
    """The rank-r decomposition of M (d, d) by the sketch that the process's settings name."""
    s = process.settings
    method = SKETCHES[s.sketch]
    return method(M, s.rank, oversampling=s.oversampling, n_pwr_it=s.n_pwr_it, rng=process.rng)


def _certified_sketch(process: Process, factor: EAFactor) -> Certificate | str:
    """The certificate of the sketch that the process holds."""
    assert process.estimate is not None
    low, s = process.estimate.lowrank, process.settings
    exact = s.rank + s.oversampling >= low.d
    return NOT_PSD if s.sketch == "sre" and not exact else certified_decomposition(low, factor)


def certified_decomposition(low: LowRank, factor: EAFactor) -> Certificate:
    """Of 0 <= low <= M."""
    return Certificate.of_decomposition(low, factor.trace, norm(factor.M), memory=1 / (1 - factor.rho))


def _sketch_flops(process: Process, d: int) -> float:
    """q + 2 products of M with r + r_o columns, and as many QRs of 4 d (r + r_o)^2 flops."""
    s = process.settings
    columns = min(s.rank + s.oversampling, d)
    return min((s.n_pwr_it + 2) * (2.0 * d * d * columns + 4.0 * d * columns**2), 9.0 * d**3)
