"""Certified errors of K-factor estimates: what is known of E_k = M_k - M~_k without the dense factor.

Where E_k is symmetric p.s.d. its nuclear norm is its trace, t_k - sum D: exact, from two scalars. Frobenius and
spectral norms are bounded by recursions, and with them the error of the damped inverse.

**Where E is p.s.d.**

- Brand updates (10), and accumulated ones: M_k = c M_j + W W^T and M~_k = c B_j + W W^T with B_j the truncation of
  M~_j, so E_k = c (E_j + T_j), T_j = M~_j - B_j >= 0 the discarded modes. (`Certificate.after_brand`)
- RS-KFAC's RSVD, for any sketch. It holds M~ = (M Q Q^T M)^(1/2), truncated. Q Q^T <= I, so M Q Q^T M <= M^2; the
  square root is operator monotone (Loewner-Heinz), so (M Q Q^T M)^(1/2) <= M; a truncation only takes away.
- Nyström, (M Q)(Q^T M Q)^+ (M Q)^T = M^(1/2) P M^(1/2) with P the orthogonal projector on the range of M^(1/2) Q,
  and P <= I. Call it N. As N Q = M Q, RS is (N Q Q^T N)^(1/2) <= N <= M: from one sketch, Nyström is the better
  of the two in every unitarily invariant norm before truncation, and in the nuclear norm also after it.
- The exact EVD and its truncations.

Not so: Q Q^T M Q Q^T (SRE-KFAC) with a finite projection error, any estimate after a correction (Algorithm 6), and
any estimate that stood still while M moved on: then only M_k >= rho^j M_{k-j}.

**Bounds.** With s, F, N for spectral, Frobenius and nuclear norm, and <., .> >= 0 between p.s.d. matrices:

- Brand: s' = c (s + T_1), and F'^2 = c^2 (F^2 + ||T||_F^2 + 2 <E, T>) with <E, T> at most F ||T||_F, s ||T||_* and
  N ||T||_2. The triangle inequality e' = c (e + ||T||_F) is the first of the three.
- A decomposition with 0 <= M~ <= M: <M, M~> >= ||M~||_F^2, since <M - M~, M~> >= 0, so that
  ||E||_F^2 <= ||M||_F^2 - ||M~||_F^2; equal where M~ is a spectral truncation.
- In any state, s <= F <= N, F^2 <= N s, and, of d eigenvalues with given sum and sum of squares, the largest is at
  most N/d + sqrt((d - 1)/d (F^2 - N^2/d)) (Wolkowicz & Styan 1980), which is much less than F for a flat tail.

**The inverse**, or its power p in (0, 1]. f(t) = lam^-p - (t + lam)^-p is operator monotone on [0, inf) with
f(0) = 0, so for p.s.d. M and M~ at one damping |||(M~ + lam I)^-p - (M + lam I)^-p||| <= |||f(|E|)||| in every
unitarily invariant norm (Ando 1988); it is attained where M~ E = 0. See `inverse_bound`, and
`Certificate.continued` for a continuation.

**Rounding.** All this is about exact arithmetic. `rounding` bounds, on the scale eps t_k, what the computed
representation, its trace and the scalar recursions may be off by: every update adds what its products and its EVD
round, and what is there decays as M does. It is part of every bound, so that a certificate holds for the computed
estimate.

- Products: `LOSS` eps t_k. An entry of Y Y^T is off by about eps |y_i| |y_j| with a sign of its own, so that the
  Frobenius norm of the whole is eps t_k and its nuclear norm at most m^(1/2) times that.
- EVD of order m: `EVD_LOSS` m unit ||M~||_F. Each of its m Householder steps rounds by about unit ||M~||_F in a
  direction of its own: m^(1/2) unit ||M~||_F in the Frobenius norm, and m^(1/2) times that in the nuclear norm. It
  is the larger part where the spectrum decays and m is in the hundreds. Brand's EVDs are in float64 whatever the
  dtype, so that `unit` is eps only where it is float64's.

The constants are set from experience (about twice the most seen: tests/kfacerr/test_certificate.py), not from a
worst-case analysis. In float32 it is 1e-4 t_k at rho = 0.95 and r + n = 476: a certificate below that says "below
rounding". Modes that a Brand update drops by numerical rank (`kfacerr.brand`) are part of E: N holds them, being
t_k - sum D, and s and F take them from there.

**Range.** Every formula is homogeneous of degree one in M: hypotenuses, geometric means and quotients instead of
squares. A certificate holds wherever in the dtype's range M lies.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy.optimize

from .array import check_power, eps, namespace, norm
from .lowrank import LowRank
from .stream import Array

__all__ = ["Certificate", "InverseBound"]

LOSS = (24.0, 2.0)
"""The products of an update of m = r + n modes round M~ and t_k by (LOSS[0] + LOSS[1] m^(1/2)) eps t_k at most."""

EVD_LOSS = 1.0
"""An EVD of order m rounds M~ by at most EVD_LOSS m unit ||M~||_F, in the nuclear norm as all of `LOSS`."""

FLOAT64 = float(np.finfo(np.float64).eps)


class InverseBound(NamedTuple):
    """Bounds on the spectral and Frobenius norm of (M~ + lam I)^-p - (M + lam I)^-p, 0-d arrays."""

    spectral: Array
    frobenius: Array


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is known of the error E = M - M~; all 0-d arrays beside the estimate's, no device is asked.

    Attributes:
        nuclear: the nuclear norm of E, to `rounding`; an upper bound if not `exact`.
        frobenius: an upper bound on the Frobenius norm of E, rounding included.
        spectral: an upper bound on the spectral norm of E, rounding included.
        rounding: what is allowed for rounding, in the nuclear norm.
        d: the dimension of E.
        exact: E is p.s.d. and `nuclear` its trace.
    """

    nuclear: Array
    frobenius: Array
    spectral: Array
    rounding: Array
    d: int
    exact: bool = True

    @classmethod
    def of_decomposition(
        cls,
        low: LowRank,
        trace: Array,
        frobenius: Array | None = None,
        *,
        memory: float = 1.0,
        unit: float | None = None,
    ) -> "Certificate":
        """Of an estimate 0 <= M~ <= M.

        Args:
            low: M~.
            trace: tr M.
            frobenius: ||M||_F, if known.
            memory: 1/(1 - rho) where M and its trace came by (8): the number of updates whose rounding they hold.
            unit: round-off of the EVD that gave M~; by default that of its dtype.

        Returns:
            The certificate of M - M~.
        """
        xp = namespace(low.D)
        nuclear = _missing(low, trace)
        rounding = memory * _loss(low, trace) + _evd_loss(low, eps(low.D) if unit is None else unit)
        F = nuclear + rounding
        if frobenius is not None:
            # Both norms' squares are rounded on the scale of ||M||_F^2.
            tail = xp.hypot(_leg(frobenius, norm(low.D)), (8 * eps(low.D) * memory) ** 0.5 * frobenius)
            F = xp.minimum(F, tail + rounding)
        return cls(nuclear, F, F, rounding, low.d)._tightened()

    def after_brand(self, removed: Array, decay: float, low: LowRank, trace: Array) -> "Certificate":
        """E' = decay (E + T) + R after a truncation, or a shrinkage, that takes T >= 0 away, and a Brand update.

        R >= 0 are the modes dropped by numerical rank. Its trace is N' - decay (N + ||T||_*), but for rounding.

        Args:
            removed: non-zero eigenvalues of T in any order; may be empty.
            decay: rho, or its power if batches were accumulated.
            low: the estimate after the update.
            trace: tr M after the update.

        Returns:
            The certificate of E'.
        """
        xp = namespace(low.D)
        new = _loss(low, trace) + _evd_loss(low, FLOAT64)
        rounding = decay * self.rounding + new
        F, s, N = self.frobenius, self.spectral, self.nuclear + self.rounding
        held = self.nuclear
        if removed.shape[0] > 0:
            top, fro, nuc = xp.max(removed), norm(removed), xp.sum(removed)
            cross = xp.minimum(xp.minimum(_mean(F, fro), _mean(s, nuc)), _mean(N, top))
            F = xp.hypot(xp.hypot(F, fro), 2**0.5 * cross)
            s = s + top
            held = held + nuc
        nuclear = _missing(low, trace)
        dropped = nuclear - decay * held
        new = new + xp.where(dropped > new, dropped, 0 * dropped)
        return Certificate(nuclear, decay * F + new, decay * s + new, rounding, low.d, self.exact)._tightened()

    def _tightened(self) -> "Certificate":
        """Each norm bounded by the others too."""
        xp = namespace(self.nuclear)
        d, N = self.d, self.nuclear + self.rounding
        s = xp.minimum(xp.minimum(self.spectral, self.frobenius), N)
        F = xp.minimum(self.frobenius, xp.maximum(_mean(N, s), s))  # the mean of equals may round below them
        if self.exact:
            # The bound falls with the sum of the eigenvalues where that is at least F, so the least sum counts.
            least = xp.maximum(self.nuclear - self.rounding, F)
            spread = xp.hypot(_leg(F, least / d**0.5), 2 * eps(F) ** 0.5 * F)
            s = xp.minimum(s, least / d + ((d - 1) / d) ** 0.5 * spread + self.rounding)
            F = xp.minimum(F, xp.maximum(_mean(N, s), s))
        return replace(self, frobenius=F, spectral=s)

    def relative(self, trace: Array) -> Array:
        """||E||_* / tr M, between 0 and 1 for an exact certificate; 0 for M = 0."""
        xp = namespace(self.nuclear)
        return xp.where(trace > 0, self.nuclear / xp.where(trace > 0, trace, 1 + 0 * trace), 0 * trace)

    def continued(self, tau: Array, low: LowRank) -> "Certificate":
        """Of M~ + tau (I - U U^T): E_tau = E - tau P with P = I - U U^T of rank d - m.

        It is a difference of two p.s.d. matrices, not p.s.d., so its nuclear norm is only bounded.

        - -tau P <= E_tau <= E, so the spectral norm is at most max(s, tau).
        - ||E_tau||_F^2 = ||E||_F^2 - 2 tau <E, P> + tau^2 (d - m), and <E, P> = tr E - tr(U^T E U) >= N - K with
          K >= tr(U^T E U): m s, or m^(1/2) F. Where D are Rayleigh quotients K = 0, but Brand's are not.
        """
        xp = namespace(self.nuclear)
        m = low.modes
        missing = self.d - m
        inside = xp.minimum(m * self.spectral, xp.sqrt(m) * self.frobenius)
        outside = xp.maximum(self.nuclear - self.rounding - inside, 0 * inside)
        if not self.exact:
            outside = 0 * outside
        # P is as far from a projector as U is from orthonormal: 300 eps seen, on modes 1e-9 of the largest.
        rounding = self.rounding + 1024 * eps(self.nuclear) * m * tau
        whole = xp.hypot(self.frobenius, xp.sqrt(missing) * tau)
        less = xp.hypot(_leg(whole, 2**0.5 * _mean(tau, outside)), 2 * eps(whole) ** 0.5 * whole)
        return Certificate(
            self.nuclear + tau * missing,
            xp.where(outside > 0, less, whole) + rounding,
            xp.maximum(self.spectral, tau) + rounding,
            rounding,
            self.d,
            exact=False,
        )._tightened()

    def inverse_bound(self, lam: Array, power: float = 1.0) -> InverseBound:
        """Of (M~ + lam I)^-p - (M + lam I)^-p, both with one lam > 0 and computed exactly.

        With x_i = t_i/lam for the eigenvalues t_i of |E|, the norms of f(|E|) are lam^-p times those of g(x_i),
        g(x) = 1 - (1 + x)^-p. Spectral: g(s/lam), attained.

        Frobenius: the sum of h(x_i), h = g^2. Given sum x_i = nu and x_i <= sigma: h(x)/x grows up to x_p
        (`_turn`), which is 1 for p = 1, and h is concave beyond. So the least concave function above h on
        [0, sigma] is the chord from 0 to u = min(sigma, x_p), of slope h(u)/u, and h itself from u on, and by
        Jensen the maximum is at most d times its value at nu/d: sharp, with eigenvalues u and 0 (nu <= u d; sharp
        where nu/u is an integer) or all equal (nu > u d). Given sum x_i^2 = phi^2: h is concave as a function of
        x^2, with derivative g g'/x, so the maximum is d h(phi/d^(1/2)): sharp, all equal. The smaller is taken.
        docs/mathematics/certificates.md has the proofs.

        Args:
            lam: the damping.
            power: p, in (0, 1]: 1 for K-FAC, 1/2 or 1/4 for Shampoo.

        Returns:
            Both bounds.

        Raises:
            InputError: a power out of range.
        """
        spectral, frobenius = self._damped(lam, power)
        return InverseBound(spectral / lam**power, frobenius / lam**power)

    def _damped(self, lam: Array, power: float) -> InverseBound:
        """`inverse_bound` times lam^p: numbers without a dimension."""
        check_power(power)
        xp = namespace(self.nuclear)
        root, mean, turn = self.d**0.5, (self.nuclear + self.rounding) / self.d, _turn(power)

        def g(t: Array) -> Array:
            return t / (lam + t) if power == 1 else -xp.expm1(-power * xp.log1p(t / lam))

        u = xp.minimum(self.spectral, turn * lam)
        slope = g(u) / xp.sqrt(xp.where(u > 0, u, lam))  # to be taken times t^(1/2)
        chord = xp.sqrt(xp.minimum(mean, turn * lam)) * slope
        by_trace = root * xp.where(mean > turn * lam, g(mean), chord)
        return InverseBound(g(self.spectral), xp.minimum(by_trace, root * g(self.frobenius / root)))

    def relative_inverse_bound(
        self, low: LowRank, lam: Array, tau: Array | None = None, power: float = 1.0
    ) -> Array:
        """A bound on metric 1 of §4.2, ||(M~ + lam I)^-p - R||_F / ||R||_F with R = (M + lam I)^-p.

        By the triangle inequality ||R||_F >= ||(M~ + lam I)^-p||_F - b with b the absolute bound, of this
        certificate or of the continued one. Infinite where b leaves nothing.

        Args:
            low: M~ without its continuation.
            lam: the damping.
            tau: level of the continuation, None for none.
            power: p, in (0, 1].

        Returns:
            0-d array.

        Raises:
            InputError: a power out of range.
        """
        xp = namespace(self.nuclear)
        level = 0 * self.nuclear if tau is None else tau
        present = xp.where(low.D > 0, (lam / (low.D + lam)) ** power, 0 * low.D)
        held = xp.hypot(norm(present), xp.sqrt(low.d - low.modes) * (lam / (level + lam)) ** power)
        bound = (self if tau is None else self.continued(tau, low))._damped(lam, power).frobenius
        left = held - bound
        return xp.where(left > 0, bound / xp.where(left > 0, left, 1 + 0 * left), float("inf") + 0 * left)


@cache
def _turn(power: float) -> float:
    """x_p > 0, up to where g(x)^2/x grows, g(x) = 1 - (1 + x)^-p: the root of (1 + x)^(p + 1) - (1 + x) = 2 p x.

    The left side less the right is convex, 0 at 0 and falls there; at x = 4 it is positive for all p in (0, 1].
    """

    def excess(x: float) -> float:
        return (1 + x) * math.expm1(power * math.log1p(x)) - 2 * power * x

    inflection = ((2 * power + 1) / (power + 1)) ** (1 / power) - 1  # of g^2, which is convex up to there
    return float(scipy.optimize.brentq(excess, inflection, 4.0, xtol=1e-14))


def _mean(a: Array, b: Array) -> Array:
    """The geometric mean, (a b)^(1/2)."""
    xp = namespace(a)
    return xp.sqrt(a) * xp.sqrt(b)


def _leg(c: Array, b: Array) -> Array:
    """(c^2 - b^2)^(1/2), the other leg of a right triangle with hypotenuse c; 0 for b > c."""
    xp = namespace(c)
    return _mean(xp.maximum(c - b, 0 * c), c + b)


def _missing(low: LowRank, trace: Array) -> Array:
    """max(0, tr M - sum D)."""
    return namespace(low.D).maximum(trace - low.trace(), 0 * trace)


def _loss(low: LowRank, trace: Array) -> Array:
    """What the products of one update may round, in the nuclear norm."""
    return (LOSS[0] + LOSS[1] * low.m**0.5) * eps(low.D) * trace


def _evd_loss(low: LowRank, unit: float) -> Array:
    """What the EVD of one update may round, in the nuclear norm."""
    return EVD_LOSS * low.m * unit * norm(low.D)
