"""Damped inverses of K-factor estimates and their application: Algorithm 1 l.15-18, Algorithm 8, §3.5.

Damping: lam = phi * lambda_max of the method's own representation, taken before continuation (§6, footnote 23).
Continuation: the d - m eigenvalues a representation misses are replaced by one level tau, so that
(M~ + lam I)^-1 = U diag(1/(D + lam) - 1/(lam + tau)) U^T + 1/(lam + tau) I.
Shampoo's powers -1/2 and -1/4 of M + lam I have the same form, with these powers of D + lam and lam + tau.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import array_api_compat as compat
import numpy as np

from .array import (
    add_to_diagonal,
    check_columns,
    check_power,
    check_square,
    cholesky_inverse,
    device_array,
    eigh_descending,
    eps,
    failures,
    namespace,
    to_dtype,
)
from .checks import choice, instance, positive
from .exceptions import InputError
from .lanczos import lambda_max
from .lowrank import LowRank
from .rsvd import evd
from .stream import Array

__all__ = [
    "CONTINUATIONS",
    "ESCAPED",
    "DampedInverse",
    "DenseInverse",
    "Exact",
    "Inverse",
    "application_flops",
    "continuation_level",
    "damped_inverse",
    "exact_inverse",
    "precondition",
    "precondition_linear",
    "representation",
]


class Inverse(Protocol):
    """A damped inverse: something to apply to columns."""

    @property
    def d(self) -> int:
        """Its order."""
        ...

    def apply(self, X: Array) -> Array:
        """(d, n) -> (d, n)."""
        ...

    def dense(self) -> Array:
        """The (d, d) matrix."""
        ...


@dataclass(frozen=True, eq=False)
class DampedInverse:
    """(M~ + lam I)^-p with M~ = `lowrank` continued at level tau and p = `power`. lam and tau are 0-d arrays.

    It is U diag(weights) U^T + shift I. Where modes are missing the shift is their eigenvalue 1/(lam + tau). Where
    all d are present it is 0 and the weights are 1/(D + lam): 1/lam, added and taken off again, would cost
    eps (D + lam)/lam of a result that has no eigenvalue near 1/lam.
    """

    lowrank: LowRank
    lam: Array
    tau: Array
    power: float = 1.0

    @property
    def d(self) -> int:
        return self.lowrank.d

    @cached_property
    def _complete(self) -> Array:
        """Whether all d modes are present, a 0-d array."""
        return self.lowrank.modes == self.lowrank.d

    @cached_property
    def shift(self) -> Array:
        """0-d array."""
        level = self.lam + self.tau
        shift = 1 / level if self.power == 1 else level**-self.power
        return namespace(self.lam).where(self._complete, 0 * self.lam, shift)

    @cached_property
    def weights(self) -> Array:
        """(m,) without cancellation; 0 on modes that are absent (D = 0), whose columns of U may be zero."""
        D = self.lowrank.D
        xp = namespace(D)
        if self.power == 1:
            # One quotient after the other: the product of the denominators, a square, may leave the range.
            whole, h = 1 / (D + self.lam), (self.tau - D) / (D + self.lam) / (self.lam + self.tau)
        else:
            level = self.lam + self.tau
            whole = (D + self.lam) ** -self.power
            h = level**-self.power * xp.expm1(-self.power * xp.log1p((D - self.tau) / level))
        return xp.where(D > 0, xp.where(self._complete, whole, h), xp.zeros_like(h))

    def apply(self, X: Array) -> Array:
        """Algorithm 8 l.5 and l.7: O(d m n). With m = d one dense product, half of that once it is formed."""
        if self.lowrank.m >= self.lowrank.d:
            return self._dense @ X
        Z = self.lowrank.basis.T @ X
        Z = self.weights[:, None] * Z if self.lowrank.mix is None else self._core @ Z
        return self.lowrank.basis @ Z + self.shift * X

    @cached_property
    def _core(self) -> Array:
        """mix diag(weights) mix^T: formed once for all columns that the inverse is applied to."""
        mix = self.lowrank.mix
        assert mix is not None
        return (mix * self.weights[None, :]) @ mix.T

    @cached_property
    def _dense(self) -> Array:
        xp = namespace(self.lowrank.basis)
        identity = xp.eye(self.lowrank.d, dtype=self.shift.dtype, device=compat.device(self.shift))
        U = self.lowrank.U
        return (U * self.weights[None, :]) @ U.T + self.shift * identity

    def dense(self) -> Array:
        return self._dense


@dataclass(frozen=True, eq=False)
class DenseInverse:
    """A damped inverse held as a (d, d) matrix."""

    matrix: Array

    @property
    def d(self) -> int:
        return self.matrix.shape[0]

    def apply(self, X: Array) -> Array:
        return self.matrix @ X

    def dense(self) -> Array:
        return self.matrix


def _none(X: LowRank, trace: Array | None) -> Array:
    return namespace(X.D).zeros_like(X.D[0])


def _min(X: LowRank, trace: Array | None) -> Array:
    """§3.5: the smallest of the m modes used, numerically zero ones counting as 0."""
    return _none(X, trace) if X.m >= X.d else X.D[-1]


def _trace(X: LowRank, trace: Array | None) -> Array:
    """tau = max(0, t - sum D)/(d - m): keeps the trace t of the EA factor (design §10).

    Where D holds Rayleigh quotients of M on U, <M - U D U^T, I - U U^T> = t - sum D, so this tau is the one that
    minimises ||M - U D U^T - tau (I - U U^T)||_F over tau >= 0.

    Raises:
        InputError: there is no trace.
    """
    if trace is None:
        raise InputError("continuation 'trace' needs the trace of the EA factor")
    trace = _scalar(trace, "the trace", X.D)
    xp = namespace(X.D)
    modes = X.modes
    missing = xp.maximum(X.d - modes, xp.ones_like(modes))
    tau = (trace - X.trace()) / missing
    # What rounding leaves of t - sum D where nothing is missing is not a tail.
    noise = eps(X.D) * trace
    return xp.where((modes < X.d) & (tau > noise), tau, xp.zeros_like(tau))


CONTINUATIONS: dict[str, Callable[[LowRank, Array | None], Array]] = {
    "none": _none,
    "min": _min,
    "trace": _trace,
}

ESCAPED = "escaped"
"""A continuation that adds the process's escaped mass to all modes; only for processes that keep one."""


def continuation_level(X: LowRank, continuation: str, trace: Array | None = None) -> Array:
    """tau, the eigenvalue that a continuation puts where the representation has none.

    Args:
        X: the representation.
        continuation: "none", "min" or "trace".
        trace: the EA factor's trace when X was formed, for "trace".

    Returns:
        A 0-d array.

    Raises:
        InputError: unknown continuation, or no trace where one is needed.
    """
    choice(continuation, "continuation", CONTINUATIONS)
    return CONTINUATIONS[continuation](X, trace)


def check_continuation(continuation: str) -> None:
    """Refuses what is no continuation of `damped_inverse`."""
    choice(continuation, "continuation", (*CONTINUATIONS, ESCAPED))


def check_phi(phi: float) -> float:
    """Refuses what is no damping ratio; as a float."""
    return positive(phi, "damping ratio phi")


def check_applies(inverse: Inverse, d: int | None = None, X: Array = None) -> None:
    """Refuses what is no inverse, one of another order than d, or of another kind than the array X."""
    if not (hasattr(inverse, "apply") and hasattr(inverse, "dense")):
        raise InputError(f"an inverse, as of damped_inverse, is needed, got {type(inverse).__name__}")
    if d is not None and inverse.d != d:
        raise InputError(f"an inverse of order {d} is needed, got one of {inverse.d}")
    if X is not None and isinstance(inverse, DampedInverse | DenseInverse):
        namespace(X, inverse.lam if isinstance(inverse, DampedInverse) else inverse.matrix)


def _scalar(value: Any, what: str, like: Array, *, or_zero: bool = True) -> Array:
    """A positive number, or 0 where that is allowed, as a 0-d array beside `like`.

    An array of torch or CuPy is not looked at: the host would have to wait for its device.
    """
    if compat.is_array_api_obj(value) and not isinstance(value, np.ndarray | np.generic):
        namespace(value, like)
        return value
    positive(value, what, or_zero=or_zero)
    return value if isinstance(value, np.ndarray | np.generic) else device_array(float(value), like)


def damped_inverse(
    X: LowRank,
    *,
    phi: float | None = None,
    lam: Array | None = None,
    continuation: str = "min",
    trace: Array | None = None,
    level: Array | None = None,
    power: float = 1.0,
) -> DampedInverse | DenseInverse:
    """The damped, continued inverse of a representation, or a power of it.

    Args:
        X: the representation, at least one mode.
        phi: damping ratio; lam = phi * lambda_max(X).
        lam: a damping given instead (the reference's, for damping "common").
        continuation: "none", "min" (the paper's), "trace", or "escaped": (M~ + level I + lam I)^-1, as in Sketchy.
        trace: trace of the EA factor, for "trace".
        level: escaped mass, for "escaped".
        power: p in (0, 1] of (M~ + lam I)^-p; Shampoo's are 1/2 and 1/4.

    Returns:
        The inverse (d, d), as an operator; dense where X has all d modes as a matrix.

    Raises:
        InputError: phi not positive, neither or both of phi and lam given, or a power out of range.
    """
    if (phi is None) == (lam is None):
        raise InputError("give one of phi and lam")
    instance(X, "the representation", LowRank)
    check_continuation(continuation)
    if X.m == 0:
        raise InputError("the representation has no modes: no columns came in yet")
    if phi is not None:
        check_phi(phi)
    else:
        lam = _scalar(lam, "the damping lam", X.M if isinstance(X, Exact) else X.D, or_zero=False)
    check_power(power)
    if isinstance(X, Exact) and continuation != ESCAPED and power == 1:  # nothing to continue
        return X.inverse(phi=phi, lam=lam)[0]
    if lam is None:
        lam = phi * X.lambda_max
    if continuation == ESCAPED:
        if level is None:
            raise InputError("continuation 'escaped' needs an escaped mass, which only FD keeps")
        return DampedInverse(X, lam + _scalar(level, "the escaped mass", X.D), _none(X, trace), power)
    return DampedInverse(X, lam, continuation_level(X, continuation, trace), power)


def exact_inverse(
    M: Array, *, phi: float | None = None, lam: Array | None = None, power: float = 1.0
) -> tuple[DenseInverse, Array]:
    """The reference: (M + lam I)^-p with lam = phi * lambda_max(M), and lam; by Cholesky, by an EVD where p < 1.

    Args:
        M: (d, d), symmetric p.s.d.
        phi: damping ratio.
        lam: a damping given instead.
        power: p in (0, 1].

    Returns:
        The inverse, and lam as a 0-d array.

    Raises:
        InputError: M is zero (nothing to damp by), not finite, M + lam I is not positive, phi is not positive or
            the power out of range.
    """
    check_power(power)
    if (phi is None) == (lam is None):
        raise InputError("give one of phi and lam")
    check_square(M, "EA factor")
    if phi is None:
        lam = _scalar(lam, "the damping lam", M, or_zero=False)
    else:
        check_phi(phi)
        top = lambda_max(M)
        if not top > 0:
            raise InputError("the EA factor is zero, so phi * lambda_max damps nothing")
        lam = device_array(phi * top, M)
    if power != 1:
        w, V = eigh_descending(M, "EA factor")
        if not bool(w[-1] + lam > 0):
            raise InputError("matrix is not positive definite: the damping is too small")
        return DenseInverse((V * ((w + lam) ** -power)[None, :]) @ V.T), lam
    damped = namespace(M).asarray(M, copy=True)
    add_to_diagonal(damped, lam)
    return DenseInverse(cholesky_inverse(damped, overwrite=True)), lam


class Exact(LowRank):
    """A symmetric p.s.d. M (d, d) as it stands: all d modes, which an EVD computes only if they are asked for.

    Its damped inverse needs none of them, and no continuation.
    """

    M: Array

    def __init__(self, M: Array) -> None:
        """Keeps M itself: copy it where it is updated in place."""
        vars(self).update(M=M, mix=None)  # past the frozen dataclass

    @cached_property
    def _evd(self) -> LowRank:
        return evd(self.M)

    @property
    def basis(self) -> Array:
        return self._evd.basis

    @property
    def D(self) -> Array:
        return self._evd.D

    @property
    def d(self) -> int:
        return self.M.shape[0]

    @property
    def m(self) -> int:
        return self.d

    @cached_property
    def lambda_max(self) -> Array:
        return device_array(lambda_max(self.M), self.M)

    def dense(self) -> Array:
        return self.M

    def state_dict(self) -> dict[str, Array]:
        return {"M": self.M}

    def inverse(self, *, phi: float | None = None, lam: Array | None = None) -> tuple[DenseInverse, Array]:
        """`exact_inverse` of M, in float64 if it fails in M's precision; the last one is kept."""
        held = vars(self).get("_held")
        if held is None or not (phi == held[0] if lam is None else lam is held[2]):
            held = vars(self)["_held"] = (phi, *self._inverted(phi, lam))
        return held[1:]

    def _inverted(self, phi: float | None, lam: Array | None) -> tuple[DenseInverse, Array]:
        M = self.M
        try:
            return exact_inverse(M, phi=phi, lam=lam)
        except failures():
            float64 = namespace(M).float64
            if M.dtype == float64:
                raise
            given = lam if lam is None else to_dtype(lam, float64)
            inverse, lam = exact_inverse(to_dtype(M, float64), phi=phi, lam=given)
            return DenseInverse(to_dtype(inverse.matrix, M.dtype)), to_dtype(lam, M.dtype)


def representation(state: dict[str, Array]) -> LowRank:
    """What a `state_dict` of a `LowRank`, or of an `Exact`, was taken of."""
    return Exact(**state) if "M" in state else LowRank(**state)


def precondition(J: Array, inverse_G: Inverse, inverse_A: Inverse) -> Array:
    """Algorithm 1 l.15-18: S = Gamma^-1 J A^-1 for J = Mat(g) (d_G, d_A); quadratic in d."""
    check_columns(J, what="J")
    check_applies(inverse_G, J.shape[0], J)
    check_applies(inverse_A, J.shape[1], J)
    return inverse_G.apply(inverse_A.apply(J.T).T)


def precondition_linear(G: Array, A: Array, inverse_G: Inverse, inverse_A: Inverse) -> tuple[Array, Array]:
    """Algorithm 8: the factors P (d_G, n), Q (d_A, n) of S = P Q^T = Gamma^-1 G A^T A^-1; linear in d."""
    for X, inverse, what in ((G, inverse_G, "G"), (A, inverse_A, "A")):
        check_columns(X, what=what)
        check_applies(inverse, X.shape[0], X)
    if G.shape[1] != A.shape[1]:
        raise InputError(f"A and G need as many columns, got {A.shape[1]} and {G.shape[1]}")
    return inverse_G.apply(G), inverse_A.apply(A)


def application_flops(d_A: int, d_G: int, n: int, m_A: int, m_G: int) -> tuple[float, float]:
    """Flops of Algorithm 1 l.15-18, and of Algorithm 8 with n columns, with inverses of m_A and m_G modes.

    A side with all its d modes is one dense product; else two with d x m matrices (`DampedInverse.apply`). That
    Algorithm 8 forms S = P Q^T costs what forming the gradient G A^T does, which it saves.
    """

    def side(d: int, m: int, columns: int) -> float:
        return 2.0 * d * columns * (d if m >= d else 2 * m)

    return side(d_A, m_A, d_G) + side(d_G, m_G, d_A), side(d_A, m_A, n) + side(d_G, m_G, n)
