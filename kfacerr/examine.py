"""What a K-factor that exists already is like, and what cheap and low-precision inverses of it cost.

Up to `EXACT_UP_TO` rows a factor is decomposed in float64, and errors are those of §4.2: metric (1) of the inverse
truncated to r, metrics (3) and (4) of a step of the layer. Of larger factors there is no exact inverse: the
leading r + 10 modes come from an RSVD (Algorithm 1 l.13), lambda_max and lambda_min from Lanczos, and the
certificate alone speaks of the inverse. That takes an array of d^2 float32, or float64 where that is stored, and
some of d (r + 20).

**A factor that is not quite p.s.d.** Sums in float32 or bfloat16 leave eigenvalues down to some -e. The
certificate then is about |M| = (M^2)^(1/2) >= 0, of which both the truncated EVD and the RSVD of M are
underestimates: M Q Q^T M <= M^2, and the square root is operator monotone. Its trace is at most tr M + 2 d e. At
lam > e the inverse of |M| + lam I is never larger than that of M + lam I, and differs from it on an eigenvalue -s
only, by 2 s/(lam + s) of the latter's 1/(lam - s): the bound on metric (1) grows by 2 e/lam, for powers p <= 1 no
less, as 1 - x^p <= 1 - x for x in [0, 1].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .array import add_to_diagonal, eigh_descending, failures, norm
from .certificate import Certificate
from .damping import Damping, Scale
from .exceptions import InputError
from .inverse import (
    CONTINUATIONS,
    Inverse,
    continuation_level,
    damped_inverse,
    exact_inverse,
    precondition,
)
from .lanczos import lambda_max
from .lowrank import LowRank, null_level, without_null
from .metrics import angle_error, inverse_error, norm_error
from .report import EXACT_UP_TO
from .rsvd import evd, rsvd
from .stored import EPS, StoredArray, StoredFactor

__all__ = [
    "PRECISIONS",
    "SHARE",
    "SIDES",
    "Examined",
    "FactorAudit",
    "examine",
    "layer_steps",
    "model_gradient",
    "step_errors",
]

SHARE = 0.99
"""Of the trace, that `rank_99` modes hold."""

PRECISIONS = ("float32", "bfloat16")
"""Where an EVD of the factor is compared with float64's: bfloat16 is the factor's, the EVD then is in float32."""

COSTLY = 0.01
"""An EVD that is off by more than this gets a finding."""

SIDES = (("G", "A"), ("L", "R"))
"""What stands on the left and on the right of a gradient."""

NAN = float("nan")


@dataclass(frozen=True)
class FactorAudit:
    """What `examine` found; NaN where it could not be had.

    Attributes:
        layer: its layer.
        side: "A", "G", "L", "R", ...
        d: dimension.
        dtype: that it is stored in.
        count: that its sum was divided by; NaN where a mean was stored.
        trace: tr M.
        stable_rank: tr M / lambda_max.
        lambda_max: largest eigenvalue.
        lambda_min: smallest.
        negative: how many eigenvalues are negative; of a large factor unknown.
        asymmetry: ||M - M^T||_F / ||M||_F as stored; what follows is of the symmetric part.
        nonfinite: entries that are NaN or Inf; of such a factor nothing else is known.
        rank_99: leading modes that hold 99% of the trace.
        above: eigenvalues above the damping; of a large factor, of those that were computed.
        phi: damping ratio, lam / lambda_max.
        power: p, of the (M + lam I)^-p that errors are of.
        lam: damping.
        condition: of M + lam I.
        rank: r.
        beyond: the share of the trace beyond the r leading modes; of a large factor an upper bound.
        errors: by continuation, metric (1) of the inverse truncated to r.
        bounds: by continuation, what the certificate knows of it.
        precision: by `PRECISIONS`, metric (1) of the inverse from an EVD there, at the same lam.
        basis: of eigenvectors Q stored beside M, the share of ||M||_F off the diagonal of Q^T M Q.
        findings: what a reader should know, a sentence each.
    """

    layer: str
    side: str
    d: int
    dtype: str
    phi: float
    rank: int
    power: float = 1.0
    count: float = NAN
    trace: float = NAN
    stable_rank: float = NAN
    lambda_max: float = NAN
    lambda_min: float = NAN
    negative: float = NAN
    asymmetry: float = NAN
    nonfinite: int = 0
    rank_99: float = NAN
    above: float = NAN
    lam: float = NAN
    condition: float = NAN
    beyond: float = NAN
    errors: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    precision: Mapping[str, float] = field(default_factory=dict)
    basis: float = NAN
    findings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Examined:
    """A factor's audit and what a layer's step needs of it.

    Attributes:
        audit: what was found.
        spectrum: eigenvalues, descending; of a large factor the leading ones.
        low: all its modes, None of a large factor or one that cannot be inverted.
        reference: the exact damped inverse, None likewise.
        inverses: the truncated ones, by continuation.
    """

    audit: FactorAudit
    spectrum: np.ndarray
    low: LowRank | None = None
    reference: Inverse | None = None
    inverses: Mapping[str, Inverse] = field(default_factory=dict)


def examine(
    factor: StoredFactor, *, rank: int, phi: float = 0.1, damping: Damping | None = None, power: float = 1.0
) -> Examined:
    """Reads a factor and says what it is like.

    Args:
        factor: where it is.
        rank: r, of truncations.
        phi: damping ratio; lam = phi lambda_max.
        damping: a lam of one factor in its place.
        power: p in (0, 1], to measure errors of (M + lam I)^-p.

    Returns:
        What was found. A factor that is not finite, zero or not positive is a finding, no error.
    """
    d, dtype = factor.array.shape[0], factor.array.dtype
    damping = Damping("phi", phi) if damping is None else damping
    phi = damping.value if damping.kind == "phi" else NAN
    audit = FactorAudit(factor.layer, factor.side, d, dtype, phi, min(rank, d), power)
    M = factor.array.read()
    wide = d <= EXACT_UP_TO or dtype == "float64"
    M = np.array(M, dtype=np.float64 if wide else np.float32, order="C")
    count, told = _mean_of(factor.count)
    bad = sum(int(np.count_nonzero(~np.isfinite(row))) for row in M)
    if bad:
        told += (f"{bad} of its {d * d} entries are NaN or Inf: nothing else can be said of it",)
        return Examined(replace(audit, nonfinite=bad, count=count, findings=told), np.empty(0))
    unit = _unit(M)
    M *= 1 / unit  # a power of two: no square of an entry leaves the range
    asymmetry = _symmetrised(M)
    audit = replace(audit, count=count, asymmetry=asymmetry, findings=(*told, *_asymmetric(asymmetry, dtype)))
    size = unit if math.isnan(count) else unit / count
    held = replace(damping, value=damping.value / size) if damping.kind == "lam" else damping
    examined = (_exact if d <= EXACT_UP_TO else _partial)(M, audit, held)
    if factor.basis is not None and d <= EXACT_UP_TO:
        examined = replace(examined, audit=_with_basis(examined.audit, M, factor.basis.read().astype(np.float64)))
    sized = {name: size * getattr(examined.audit, name) for name in ("trace", "lambda_max", "lambda_min", "lam")}
    return replace(examined, audit=replace(examined.audit, **sized), spectrum=size * examined.spectrum)


def _mean_of(count: float | None) -> tuple[float, tuple[str, ...]]:
    """What to divide a sum by; NaN for nothing."""
    if count is None:
        return NAN, ()
    if math.isnan(count):
        return NAN, ("no count is stored with it, so that its sum stands for the mean",)
    if not (0 < count < math.inf):
        return NAN, (f"its count is {count:g}, so that the sum stands for the mean",)
    return count, ()


def _unit(M: np.ndarray) -> float:
    """A power of two of the size of the largest entry."""
    largest = max(float(np.abs(row).max()) for row in M)
    return math.ldexp(1.0, max(math.frexp(largest)[1], -1020)) if largest > 0 else 1.0


def _symmetrised(M: np.ndarray, tile: int = 1024) -> float:
    """Makes M its symmetric part in place, and returns ||M - M^T||_F / ||M||_F of what it was."""
    size, apart = float(norm(M)), 0.0
    for a in range(0, len(M), tile):
        for b in range(a, len(M), tile):
            upper, lower = M[a : a + tile, b : b + tile], M[b : b + tile, a : a + tile].T
            apart = math.hypot(apart, (1.0 if a == b else 2**0.5) * float(norm(upper - lower)))
            mean = (upper + lower) / 2
            M[a : a + tile, b : b + tile] = mean
            M[b : b + tile, a : a + tile] = mean.T
    return apart / size if size > 0 else 0.0


def _asymmetric(asymmetry: float, dtype: str) -> tuple[str, ...]:
    if asymmetry <= 100 * EPS[dtype]:
        return ()
    return (f"asymmetric, ||M - M^T|| = {asymmetry:.2g} ||M||: what follows is of its symmetric part",)


def _exact(M: np.ndarray, audit: FactorAudit, damping: Damping) -> Examined:
    """With all eigenvalues, in float64."""
    w, V = eigh_descending(M, "factor")
    audit = _spectral(audit, w, damping, float(w.sum()), float(w[0]), float(w[-1]))
    audit = replace(audit, negative=int((w < 0).sum()))
    if not audit.lam + min(audit.lambda_min, 0.0) > 0:
        return Examined(audit, w)
    low = LowRank(V, without_null(w, EPS["float64"], len(w)))
    lam, trace = np.asarray(audit.lam), np.asarray(audit.trace)
    options: dict[str, Any] = {"lam": lam, "power": audit.power}
    reference, _ = exact_inverse(M, **options)
    cut = low.truncate(audit.rank)
    inverses = {name: damped_inverse(cut, **options, continuation=name, trace=trace) for name in CONTINUATIONS}
    errors = {name: inverse_error(inverse, reference) for name, inverse in inverses.items()}
    precision = {name: _precision(M, name, options, reference) for name in PRECISIONS}
    told = [
        f"an EVD in {name} " + (f"is off by {error:.2g} in the inverse" if error < math.inf else "fails")
        for name, error in precision.items()
        if not error <= COSTLY
    ]
    bounds = _bounds(audit, cut, norm(w), float(np.abs(w).sum()))
    findings = (*audit.findings, *told)
    audit = replace(audit, errors=errors, bounds=bounds, precision=precision, findings=findings)
    return Examined(audit, w, low, reference, inverses)


def _partial(M: np.ndarray, audit: FactorAudit, damping: Damping) -> Examined:
    """With the leading modes and the two ends of the spectrum; M is used up."""
    trace, top, size = float(np.trace(M, dtype=np.float64)), lambda_max(M), norm(M)
    low = rsvd(M, audit.rank + 10, oversampling=10, n_pwr_it=4, rng=np.random.default_rng(0))
    np.negative(M, out=M)  # top I - M has its largest eigenvalue where M has its smallest
    add_to_diagonal(M, np.asarray(top, dtype=M.dtype))
    bottom = top - lambda_max(M)
    w = low.D.astype(np.float64)
    audit = _spectral(audit, w, damping, trace, top, bottom)
    size_of = f"{M.nbytes / 2**30:.1f} GiB"
    told = f"d > {EXACT_UP_TO}: {low.m} leading modes by an RSVD in {size_of}, and bounds in place of errors"
    audit = replace(audit, findings=(*audit.findings, told))
    if audit.lam + min(bottom, 0.0) > 0:
        absolute = trace + 2 * audit.d * max(0.0, -bottom)
        audit = replace(audit, bounds=_bounds(audit, low.truncate(audit.rank), size, absolute))
    return Examined(audit, w)


def _spectral(
    audit: FactorAudit, w: np.ndarray, damping: Damping, trace: float, top: float, bottom: float
) -> FactorAudit:
    """What the eigenvalues w (m,), descending, say; all of them or the leading ones."""
    audit = replace(audit, trace=trace, lambda_max=top, lambda_min=bottom)
    if not top > 0:
        told = "it is zero" if top == 0 == bottom else "it has no positive eigenvalue"
        return replace(audit, findings=(*audit.findings, f"{told}: there is nothing to damp by"))
    lam = damping.level(Scale(audit.d, top, trace))
    audit = replace(audit, lam=lam, phi=audit.phi if damping.kind == "phi" else lam / top)
    held = np.cumsum(np.maximum(w, 0))
    whole = held[-1] if len(w) == audit.d else trace
    enough = np.flatnonzero(held >= SHARE * whole)
    return replace(
        audit,
        stable_rank=trace / top,
        rank_99=float(enough[0] + 1) if enough.size else NAN,
        above=float((w > lam).sum()),
        condition=(top + lam) / (bottom + lam) if bottom + lam > 0 else math.inf,
        beyond=max(0.0, 1 - float(held[min(audit.rank, len(w)) - 1]) / whole),
        findings=(*audit.findings, *_negative(audit, top, bottom, lam)),
    )


def _negative(audit: FactorAudit, top: float, bottom: float, lam: float) -> list[str]:
    """What is to be said of eigenvalues below zero, and of a damping that rounding drowns."""
    rounding = null_level(audit.d) * EPS[audit.dtype]
    told = []
    if -bottom > rounding * top:
        told.append(
            f"an eigenvalue of {bottom / top:.2g} lambda_max, beyond the rounding of {audit.dtype}: not p.s.d."
        )
    if bottom + lam <= 0:
        told.append(f"M + lam I is indefinite at phi = {audit.phi:.3g}: a larger damping is needed")
    elif audit.phi < rounding:
        told.append(f"phi = {audit.phi:.3g} is below the rounding of {audit.dtype}, {rounding:.2g}")
    return told


def _bounds(audit: FactorAudit, cut: LowRank, size: np.ndarray, absolute: float) -> dict[str, float]:
    """The certificate of |M| by continuation, see the module; `size` is ||M||_F, `absolute` at least tr |M|."""
    lam, trace = (np.asarray(value, dtype=cut.D.dtype) for value in (audit.lam, absolute))
    certificate = Certificate.of_decomposition(cut, trace, np.asarray(size, dtype=cut.D.dtype))
    negative = 2 * max(0.0, -audit.lambda_min) / audit.lam
    result = {}
    for name in CONTINUATIONS:
        tau = continuation_level(cut, name, np.asarray(audit.trace, dtype=cut.D.dtype))
        bound = certificate.relative_inverse_bound(cut, lam, None if name == "none" else tau, audit.power)
        result[name] = float(bound) + negative
    return result


def _precision(M: np.ndarray, name: str, options: Mapping[str, Any], reference: Inverse) -> float:
    """Metric (1) of (V diag(w) V^T + lam I)^-p with the EVD of M, or of M in bfloat16, in float32."""
    try:
        low = evd(_rounded(M.astype(np.float32), name))
    except failures():
        return math.inf
    wide = LowRank(low.U.astype(np.float64), low.D.astype(np.float64))
    return inverse_error(damped_inverse(wide, **options, continuation="none"), reference)


def _rounded(M: np.ndarray, name: str) -> np.ndarray:
    """float32 entries, rounded to the nearest bfloat16, ties to even."""
    if name == "float32":
        return M
    bits = M.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _with_basis(audit: FactorAudit, M: np.ndarray, Q: np.ndarray) -> FactorAudit:
    """How far from an eigenbasis of M the stored Q is."""
    if not np.isfinite(Q).all():
        return replace(audit, findings=(*audit.findings, "its stored eigenvectors hold NaN or Inf"))
    C, loss = Q.T @ (M @ Q), float(np.abs(Q.T @ Q - np.eye(len(Q))).max())
    size = float(norm(M))
    off = float(norm(C - np.diag(np.diagonal(C)))) / size if size > 0 else NAN
    told = [f"its stored eigenvectors are not orthonormal, max |Q^T Q - I| = {loss:.2g}"] * (loss > COSTLY)
    told += [f"its stored eigenvectors leave {off:.2g} ||M|| off the diagonal"] * (off > COSTLY)
    return replace(audit, basis=off, findings=(*audit.findings, *told))


def model_gradient(left: Examined, right: Examined, rng: np.random.Generator) -> np.ndarray:
    """A gradient as K-FAC's own model has it: J = G^(1/2) Z A^(1/2) with Z Gaussian, E vec J vec J^T = A x G.

    Args:
        left: of the factor G, or L.
        right: of the factor A, or R.
        rng: of Z.

    Returns:
        (d_G, d_A).
    """
    roots = [LowRank(side.low.U, side.low.D**0.5) for side in (left, right) if side.low is not None]
    Z = rng.standard_normal((left.audit.d, right.audit.d))
    return roots[0].apply(roots[1].apply(Z.T).T)


def step_errors(left: Examined, right: Examined, J: np.ndarray) -> dict[str, tuple[float, float]]:
    """Metrics (3) and (4) of the step G^-1 J A^-1, by continuation.

    Args:
        left: of the factor G, or L.
        right: of the factor A, or R.
        J: (d_G, d_A), a gradient.

    Returns:
        Norm and angle errors.

    Raises:
        InputError: a shape that does not fit.
    """
    shape = (left.audit.d, right.audit.d)
    if J.shape != shape:
        raise InputError(f"layer {left.audit.layer!r}: a gradient {shape} is needed, got {J.shape}")
    if left.reference is None or right.reference is None:
        return {}
    S = precondition(J, left.reference, right.reference)
    steps = {name: precondition(J, left.inverses[name], right.inverses[name]) for name in CONTINUATIONS}
    return {name: (norm_error(step, S), angle_error(step, S)) for name, step in steps.items()}


def layer_steps(
    examined: Mapping[str, Examined], given: StoredArray | None
) -> tuple[list[tuple[str, str, float, float]], np.ndarray | None]:
    """The steps of a layer with both factors, on a gradient of K-FAC's model and on a given one.

    Args:
        examined: its factors, by side.
        given: a `StoredArray` (d_G, d_A), or None.

    Returns:
        Rows of gradient ("model", "given"), continuation, norm and angle error; and the given gradient, else the
        model's, in the eigenbases of both, None without all modes of both.

    Raises:
        InputError: a gradient is given that does not fit.
    """
    sides = next((pair for pair in SIDES if all(side in examined for side in pair)), None)
    if sides is None:
        if given is not None:
            raise InputError(f"layer {next(iter(examined.values())).audit.layer!r}: a gradient needs both factors")
        return [], None
    left, right = (examined[side] for side in sides)
    gradients = {}
    if left.low is not None and right.low is not None:
        gradients["model"] = model_gradient(left, right, np.random.default_rng(0))
    if given is not None:
        gradients["given"] = given.read().astype(np.float64)
    rows = [
        (gradient, name, *errors)
        for gradient, J in gradients.items()
        for name, errors in step_errors(left, right, J).items()
    ]
    if left.low is None or right.low is None:
        return rows, None
    J = gradients.get("given", gradients["model"])
    return rows, left.low.project(right.low.project(J.T).T)
