"""Propositions 3.1, 3.2, 4.1, 4.2, inequality (19) and footnote 11: each a function that returns both sides.

All of them are statements on dense matrices (d, d), so d should be small; `compress` turns wide columns into
short ones without loss. `trajectory` runs the paper's exact processes (8)-(10) on given columns, plainly and
independently of `kfacerr.processes`; every proposition is then a short function of a trajectory and an index.

| paper | function |
|---|---|
| (11), Proposition 3.1 | `optimality` |
| (12), (13), Proposition 3.2 | `expansion`, `expansion_terms` |
| overwriting is better at i + 1, §3.3 | `overwriting` |
| M_B instead of B, §3.3 | `untruncated` |
| (14)-(16), Proposition 4.1 | `no_update_terms`, `brand_terms`, `ea_sum` |
| (17), Proposition 4.2 | `no_update_supremum` |
| (18), Proposition 4.2 | `brand_term_bound` |
| (19) | `triangle` |
| B-update against no update at k = 1, §4.1 | `brand_or_nothing` |
| footnote 11 | `correction`, `blocks` |
| all of the above that can be said of a stream of columns | `claims` |
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .array import check_columns, eigh_descending, eps, namespace, upper_factor
from .claims import Claim, Identity, Inequality, Psd, frobenius, in_every_norm, norms
from .exceptions import InputError
from .process import check_rho
from .stream import Array

__all__ = [
    "Trajectory",
    "blocks",
    "brand_or_nothing",
    "brand_term_bound",
    "brand_terms",
    "claims",
    "compress",
    "correction",
    "ea_sum",
    "expansion",
    "expansion_terms",
    "no_update_supremum",
    "no_update_terms",
    "optimal",
    "optimality",
    "overwriting",
    "trajectory",
    "triangle",
    "untruncated",
]


# ---------------------------------------------------------------------------------------- the processes


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The processes (8)-(10) on one stream of columns, dense and exact; index k = 0, 1, ... is the iteration.

    Attributes:
        columns: X_k (d, n_k), the paper's M_k.
        r: truncation rank.
        rho: EA decay.
        overwritten: the iterations i at which B_i was overwritten by M_R,i (§3.3); empty for pure B-KFAC.
        M: (d, d) each, the EA factor (8).
        M_R: (d, d) each, the optimal rank-r truncation (9) of M_k.
        M_B: (d, d) each, the B-KFAC estimate (10), of rank at most r + n_k.
        B: (d, d) each, the optimal rank-r truncation (10) of M_B,k, or M_R,k where overwritten.
        size: lambda_max(M_k), which rounding errors are proportional to.
        unit: round-off of the dtype.
    """

    columns: tuple[Array, ...]
    r: int
    rho: float
    overwritten: frozenset[int]
    M: tuple[Array, ...]
    M_R: tuple[Array, ...]
    M_B: tuple[Array, ...]
    B: tuple[Array, ...]
    size: tuple[float, ...]
    unit: float

    def __len__(self) -> int:
        return len(self.M)

    @property
    def d(self) -> int:
        return self.M[0].shape[0]

    def gram(self, k: int) -> Array:
        """X_k X_k^T (d, d), the increment of (8)."""
        return _gram(self.columns[k])


def trajectory(columns: Sequence[Array], *, r: int, rho: float, overwrite: Collection[int] = ()) -> Trajectory:
    """Runs (8), (9) and (10).

    The first columns may be more than the others: with X_0 a square root of any p.s.d. matrix the processes
    start there, as a window in the middle of training does.

    Args:
        columns: X_k (d, n_k), at least one.
        r: truncation rank, at least 1.
        rho: decay in (0, 1).
        overwrite: iterations i at which B_i is overwritten by M_R,i.

    Returns:
        Every M_k, M_R,k, M_B,k and B_k, dense.

    Raises:
        InputError: bad values, shapes, dtypes or backends, or NaN or Inf.
    """
    check_rho(rho)
    if r < 1:
        raise InputError(f"a truncation rank of at least 1 is needed, got {r}")
    if not columns:
        raise InputError("at least one step of columns is needed")
    namespace(*columns)
    for k, X in enumerate(columns):
        check_columns(X, columns[0].shape[0], f"columns of step {k}")

    M: list[Array] = []
    M_R: list[Array] = []
    M_B: list[Array] = []
    B: list[Array] = []
    size: list[float] = []
    for k, X in enumerate(columns):
        new = _gram(X)
        M.append(new if k == 0 else rho * M[-1] + (1 - rho) * new)
        M_B.append(new if k == 0 else rho * B[-1] + (1 - rho) * new)
        truncated, largest = _truncated(M[-1], r)
        M_R.append(truncated)
        size.append(largest)
        B.append(truncated if k in overwrite else optimal(M_B[-1], r))
    return Trajectory(
        columns=tuple(columns),
        r=r,
        rho=rho,
        overwritten=frozenset(overwrite),
        M=tuple(M),
        M_R=tuple(M_R),
        M_B=tuple(M_B),
        B=tuple(B),
        size=tuple(size),
        unit=eps(columns[0]),
    )


def optimal(M: Array, rank: int) -> Array:
    """Optimal truncation of M (d, d), symmetric p.s.d., in every unitarily invariant norm (Eckart-Young-Mirsky).

    Where eigenvalues number `rank` and `rank` + 1 are equal there are several; all are as good.
    """
    return _truncated(M, rank)[0]


def _truncated(M: Array, rank: int) -> tuple[Array, float]:
    """The optimal truncation and the largest eigenvalue."""
    w, V = eigh_descending(M, "EA factor")
    if rank >= M.shape[0]:
        return M, float(w[0])
    xp = namespace(M)
    w = xp.where(w > 0, w, xp.zeros_like(w))
    return _gram(V[:, :rank] * xp.sqrt(w[:rank])[None, :]), float(w[0])


def _gram(X: Array) -> Array:
    """X X^T (d, d), symmetric to the last bit on every backend."""
    G = X @ X.T
    return (G + G.T) / 2


def compress(columns: Sequence[Array]) -> list[Array]:
    """The same stream in coordinates of the span of all its columns: (d, n_k) -> (min(d, N), n_k), N = sum n_k.

    With Q (d, N) an orthonormal basis of the span, X_k = Q (Q^T X_k), and (8)-(10) on X_k are Q (.) Q^T of
    (8)-(10) on Q^T X_k: EVDs and truncations commute with an isometry. All singular values are the same but for
    zeros, so every claim of this module holds for one stream if and only if it does for the other. O(d N^2).
    """
    xp = namespace(*columns)
    stacked = xp.concat(list(columns), axis=1)
    if stacked.shape[1] >= stacked.shape[0]:
        return list(columns)
    R = upper_factor(stacked)
    ends = np.cumsum([X.shape[1] for X in columns])
    return [R[:, end - X.shape[1] : end] for X, end in zip(columns, ends.tolist(), strict=True)]


# ------------------------------------------------------------------------------------------ Proposition 3.1


def optimality(t: Trajectory, k: int) -> list[Inequality]:
    """(11), both parts, in every unitarily invariant norm.

    Part 1: |||M_k - M_R,k,r||| <= |||M_k - B_k|||. Part 2: |||M_k - M_R,k,r+n||| <= |||M_k - M_B,k||| with n the
    number of columns of step k itself, which is what the rank of M_B,k needs where the steps differ.
    """
    M, n = t.M[k], t.columns[k].shape[1]
    parts = (
        ("(11) part 1", M - t.M_R[k], M - t.B[k]),
        ("(11) part 2", M - optimal(M, t.r + n), M - t.M_B[k]),
    )
    return [
        inequality
        for name, small, large in parts
        for inequality in in_every_norm(name, small, large, scale=t.size[k], where=f"k={k}", unit=t.unit)
    ]


def untruncated(t: Trajectory, k: int) -> list[Inequality]:
    """§3.3 "Why use M_B, not B": |||M_k - M_B,k||| <= |||M_k - B_k|||, since M_B,k - B_k is p.s.d.

    Not where B_k was overwritten: then B_k is the better of the two as often as not.
    """
    small, large = t.M[k] - t.M_B[k], t.M[k] - t.B[k]
    return in_every_norm("§3.3 M_B, not B", small, large, scale=t.size[k], where=f"k={k}", unit=t.unit)


# ------------------------------------------------------------------------------------------ Proposition 3.2


def expansion(t: Trajectory, i: int, q: int) -> Identity:
    """(12) if B_i was overwritten, (13) if not, for q >= 1:

    M_{i+q} - M_B,{i+q} = rho^q (M_i - B_i) + sum_{j=1}^{q-1} rho^{q-j} (M_B,{i+j} - B_{i+j}).

    The initial condition is B_i, not M_B,i as (S.9) and the line before it have it: (10) gives
    M_{k+1} - M_B,{k+1} = rho (M_k - B_k) = rho (M_k - M_B,k) + rho (M_B,k - B_k) for every k; apply the first
    form once, at k = i, and the second for k > i.
    """
    left = t.M[i + q] - t.M_B[i + q]
    right = t.rho**q * (t.M[i] - t.B[i])
    for j in range(1, q):
        right = right + t.rho ** (q - j) * (t.M_B[i + j] - t.B[i + j])
    name = "(12)" if i in t.overwritten else "(13)"
    return Identity(name, left, right, t.d**0.5 * t.size[i + q], f"i={i}, q={q}", t.unit)


def expansion_terms(t: Trajectory, i: int, q: int) -> list[Psd]:
    """Proposition 3.2: both sides' parentheses in (12) or (13) are symmetric p.s.d."""
    name = "(12) p.s.d." if i in t.overwritten else "(13) p.s.d."
    terms = [Psd(name, t.M[i + q] - t.M_B[i + q], t.size[i + q], f"E, i={i}, q={q}", t.unit)]
    terms.append(Psd(name, t.M[i] - t.B[i], t.size[i], f"initial error, i={i}", t.unit))
    for k in range(i + 1, i + q):
        terms.append(Psd(name, t.M_B[k] - t.B[k], t.size[k], f"truncation error, k={k}", t.unit))
    return terms


def overwriting(pure: Trajectory, over: Trajectory, i: int, q: int = 1) -> list[Inequality]:
    """§3.3: |||E^{R@i}_{i+q}||| <= |||E^{pure}_{i+q}||| in every norm. True for q = 1; for q >= 2 it may fail."""
    small = over.M[i + q] - over.M_B[i + q]
    large = pure.M[i + q] - pure.M_B[i + q]
    where, name = f"i={i}, q={q}", "§3.3 overwriting"
    return in_every_norm(name, small, large, scale=pure.size[i + q], where=where, unit=pure.unit)


# --------------------------------------------------------------------------------- Propositions 4.1 and 4.2


def no_update_terms(t: Trajectory, k: int) -> list[Array]:
    """(15): E_0, ..., E_k of the estimate M_R,0 that is never updated."""
    return [t.M[0] - t.M_R[0]] + [t.gram(j) - t.M_R[0] for j in range(1, k + 1)]


def brand_terms(t: Trajectory, k: int) -> list[Array]:
    """(16): E_0, ..., E_k of B-updates, k >= 1. Of pure B-KFAC, or overwritten at 0, which changes nothing.

    At k = 0, (14) and (16) contradict each other: E_0 = M_0 - M_R,0, but E_k = 0.
    """
    inner = [(t.M_B[j] - t.B[j]) / (1 - t.rho) for j in range(1, k)]
    return [t.M[0] - t.M_R[0], *inner, 0.0 * t.M[0]]


def _weights(rho: float, k: int) -> list[float]:
    """kappa(i) rho^(k-i) for i = 0..k; they sum to 1."""
    return [rho**k] + [(1 - rho) * rho ** (k - i) for i in range(1, k + 1)]


def ea_sum(t: Trajectory, k: int, *, brand: bool) -> Identity:
    """(14): M_k - M~_k = sum_i kappa(i) rho^(k-i) E_i, for B-updates (k >= 1) or for no update."""
    terms = brand_terms(t, k) if brand else no_update_terms(t, k)
    left = t.M[k] - (t.M_B[k] if brand else t.M_R[0])
    right = 0.0 * left
    for weight, E in zip(_weights(t.rho, k), terms, strict=True):
        right = right + weight * E
    kind = "(16)" if brand else "(15)"
    return Identity(f"(14) with {kind}", left, right, t.d**0.5 * _size_with_start(t, k), f"k={k}", t.unit)


def no_update_supremum(t: Trajectory, j: int) -> Inequality:
    """(17) as a bound: ||X_j X_j^T - M_R,0||_F <= sqrt(||X_j X_j^T||_F^2 + ||M_R,0||_F^2), j >= 1.

    ||P - Q||_F^2 = ||P||_F^2 + ||Q||_F^2 - 2 <P, Q>, and for P, Q p.s.d. <P, Q> = ||P^(1/2) Q^(1/2)||_F^2 >= 0
    with equality if and only if P Q = 0: the bound is attained exactly when the columns are orthogonal to the
    range of M_R,0, and is a supremum where there is room for that, rank(X_j) + rank(M_R,0) <= d.
    """
    P, Q = t.gram(j), t.M_R[0]
    p, q = frobenius(P), frobenius(Q)
    return Inequality("(17)", frobenius(P - Q), float(np.hypot(p, q)), p + q, f"j={j}", t.unit)


def brand_term_bound(t: Trajectory, j: int) -> list[Inequality]:
    """(18): ||E_j||_F <= ||X_j X_j^T||_F for B-updates, j >= 1; stated here in every unitarily invariant norm.

    M_B,j = rho B_{j-1} + (1 - rho) X_j X_j^T, and rho B_{j-1} (not M_B,{j-1}, (S.29)-(S.30)) has rank r, so the
    optimal truncation B_j is at least as good: |||M_B,j - B_j||| <= (1 - rho) |||X_j X_j^T|||.
    """
    small = (t.M_B[j] - t.B[j]) / (1 - t.rho)
    scale = t.size[j] / (1 - t.rho)
    return in_every_norm("(18)", small, t.gram(j), scale=scale, where=f"j={j}", unit=t.unit)


def brand_or_nothing(t: Trajectory, k: int = 1) -> list[Inequality]:
    """§4.1: |||M_k - M_B,k||| <= |||M_k - M_R,0|||, B-updates against no update, in every norm.

    Not in the paper. True for k = 1; later it may fail, from k = 3 in all norms at once (footnote 15).

    Proof for k = 1. Let P project on the range of M_R,0 and S = I - P. The error of the B-update is rho E_0 with
    E_0 = M_0 - M_R,0 = S E_0 S >= 0, and that of no update, rho E_0 + (1 - rho) (X_1 X_1^T - M_R,0), has the
    pinched block rho E_0 + (1 - rho) S X_1 X_1^T S >= rho E_0. Compressions do not increase a norm, and norms are
    monotone on p.s.d. matrices.
    """
    small, large = t.M[k] - t.M_B[k], t.M[k] - t.M_R[0]
    scale, where = _size_with_start(t, k), f"k={k}"
    return in_every_norm("§4.1 B-update or nothing", small, large, scale=scale, where=where, unit=t.unit)


def triangle(t: Trajectory, k: int, *, brand: bool) -> Inequality:
    """(19): ||M_k - M~_k||_F <= rho^k ||E_0||_F + (1 - rho) sum_{j=1}^k rho^(k-j) ||E_j||_F.

    For B-updates (k >= 1) or for no update. Attained if and only if all E_j are non-negative multiples of one.
    """
    terms = brand_terms(t, k) if brand else no_update_terms(t, k)
    small = frobenius(t.M[k] - (t.M_B[k] if brand else t.M_R[0]))
    large = sum(w * frobenius(E) for w, E in zip(_weights(t.rho, k), terms, strict=True))
    kind = "B-updates" if brand else "no update"
    return Inequality("(19)", small, large, t.d**0.5 * _size_with_start(t, k), f"{kind}, k={k}", t.unit)


def _size_with_start(t: Trajectory, k: int) -> float:
    """Rounding scale of what holds M_R,0 undecayed beside M_k."""
    return t.size[k] + t.size[0]


# ----------------------------------------------------------------------------------------------- footnote 11


def blocks(E: Array, U: Array) -> tuple[float, float, float, float]:
    """Squared Frobenius norms of U^T E U, U_perp^T E U, U^T E U_perp and U_perp^T E U_perp.

    They add up to ||E||_F^2. E is (d, d), U (d, m) with orthonormal columns; U_perp U_perp^T = I - U U^T stands
    in for U_perp.
    """
    EU, UE = E @ U, U.T @ E
    inner = U.T @ EU
    left = EU - U @ inner
    right = UE - inner @ U.T
    outer = E - EU @ U.T - U @ right
    return tuple(frobenius(block) ** 2 for block in (inner, left, right, outer))  # type: ignore[return-value]


def correction(M: Array, before: Array, after: Array, U: Array) -> list[Claim]:
    """Footnote 11 on one correction (Algorithm 6) in the span of U (d, n_crc), orthonormal columns of M~'s basis.

    Claims that ||E||_F does not grow, that its square drops by exactly ||U^T E U||_F^2, and the matrix identity
    behind both, E' = E - P E P with P = U U^T.

    Proof. Let M~ = U D U^T + W C W^T with [U, W] orthonormal columns. The correction puts U^T M U in the place
    of D, and D = U^T M~ U, so M~' - M~ = U (U^T M U - U^T M~ U) U^T = P E P. Its blocks with U_perp on either side
    are zero because U_perp^T U = 0: three of the four blocks of E stay as they are, and U^T E' U = 0. The four
    blocks are orthogonal in the Frobenius inner product, hence the drop.

    Args:
        M: (d, d) EA factor.
        before: (d, d) the estimate.
        after: (d, d) the corrected estimate.
        U: (d, n_crc) the chosen columns of `before`'s eigenvectors.

    Returns:
        The three claims, each with both sides.
    """
    unit = eps(M)
    E, E_after = M - before, M - after
    size = max(norms(M)["spectral"], norms(before)["spectral"])
    scale = M.shape[0] ** 0.5 * size
    b, a = frobenius(E), frobenius(E_after)
    removed = U @ (U.T @ E @ U) @ U.T
    return [
        Inequality("footnote 11", a, b, scale, "||E||_F", unit),
        Identity("footnote 11 drop", b**2 - a**2, blocks(E, U)[0], 2 * scale * max(b, a, unit * scale), "", unit),
        Identity("footnote 11 blocks", E_after, E - removed, scale, "E' = E - P E P", unit),
    ]


# ------------------------------------------------------------------------------------------------ all at once


def claims(columns: Sequence[Array], *, r: int, rho: float) -> Iterator[Claim]:
    """Every claim above that (8)-(10) make on this stream, for every index; O(steps^2) of them.

    Footnote 11 is not among them: it speaks of a correction, see `correction`.
    """
    pure = trajectory(columns, r=r, rho=rho)
    steps = len(pure)
    for k in range(steps):
        yield from optimality(pure, k)
        yield from untruncated(pure, k)
        yield ea_sum(pure, k, brand=False)
        yield triangle(pure, k, brand=False)
        if k >= 1:
            yield ea_sum(pure, k, brand=True)
            yield triangle(pure, k, brand=True)
            yield no_update_supremum(pure, k)
            yield from brand_term_bound(pure, k)
        if k == 1:
            yield from brand_or_nothing(pure)
    for i in range(steps - 1):
        over = trajectory(columns, r=r, rho=rho, overwrite={i})
        yield from overwriting(pure, over, i)
        for t in (pure, over):
            yield from expansion_terms(t, i, steps - 1 - i)
            for q in range(1, steps - i):
                yield expansion(t, i, q)
                if q < steps - 1 - i:
                    yield expansion_terms(t, i, q)[0]
