"""The paper's formulas, dense and naive, in float64 NumPy: nothing here uses the package's numerics.

Everything is written the way the paper prints it, at whatever cost. Representations are pairs (U, D) with D a
vector, descending.
"""

from collections.abc import Sequence

import numpy as np

from kfacerr.stream import Step, Window

Pair = tuple[np.ndarray, np.ndarray]


# ---- processes (8)-(10) -------------------------------------------------------------------------------------


def ea_factor(columns: Sequence[np.ndarray], rho: float) -> np.ndarray:
    """(8) as the explicit sum: sum_i kappa(i) rho^(k-i) X_i X_i^T with kappa(0) = 1, else 1 - rho."""
    k = len(columns) - 1
    return sum((1 if i == 0 else 1 - rho) * rho ** (k - i) * X @ X.T for i, X in enumerate(columns))


def evd(M: np.ndarray, r: int | None = None) -> Pair:
    """The r leading eigenpairs, eigenvalues clipped at 0."""
    w, V = np.linalg.eigh((M + M.T) / 2)
    w, V = w[::-1], V[:, ::-1]
    w = np.where(w > 1e-14 * max(w[0], 0), w, 0)
    return V[:, :r], w[:r]


def dense(pair: Pair) -> np.ndarray:
    U, D = pair
    return U @ np.diag(D) @ U.T


def projected(M: np.ndarray, r: int) -> np.ndarray:
    """U_r U_r^T M U_r U_r^T, the optimal rank-r truncation as (9) and (10) write it."""
    U, _ = evd(M, r)
    return U @ U.T @ M @ U @ U.T


def rkfac(columns: Sequence[np.ndarray], rho: float, r: int) -> np.ndarray:
    """(9): M_R,k,r."""
    return projected(ea_factor(columns, rho), r)


def bkfac(columns: Sequence[np.ndarray], rho: float, r: int) -> list[np.ndarray]:
    """(10): M_B,i for all i."""
    estimates = [columns[0] @ columns[0].T]
    for X in columns[1:]:
        estimates.append(rho * projected(estimates[-1], r) + (1 - rho) * X @ X.T)
    return estimates


# ---- Algorithms 2, 3 and 6 ----------------------------------------------------------------------------------


def brand(U, D, V, A, B):
    """Algorithm 2, as printed."""
    A_perp, B_perp = A - U @ U.T @ A, B - V @ V.T @ B
    QA, RA = np.linalg.qr(A_perp)
    QB, RB = np.linalg.qr(B_perp)
    r, n = U.shape[1], A.shape[1]
    zero = np.zeros((n, r))
    left = np.block([[np.eye(r), U.T @ A], [zero, RA]])
    right = np.block([[np.eye(r), V.T @ B], [zero, RB]])
    middle = np.block([[np.diag(D), zero.T], [zero, np.eye(n)]])
    UM, DM, VMt = np.linalg.svd(left @ middle @ right.T)
    return np.hstack([U, QA]) @ UM, DM, np.hstack([V, QB]) @ VMt.T


def symmetric_brand(U, D, A) -> Pair:
    """Algorithm 3, as printed."""
    Q, R = np.linalg.qr(A - U @ U.T @ A)
    r, n = U.shape[1], A.shape[1]
    left = np.block([[np.eye(r), U.T @ A], [np.zeros((n, r)), R]])
    middle = np.block([[np.diag(D), np.zeros((r, n))], [np.zeros((n, r)), np.eye(n)]])
    UM, DM = evd(left @ middle @ left.T)
    return np.hstack([U, Q]) @ UM, DM


def correct(U, D, M, idx) -> Pair:
    """Algorithm 6 with l.7 read as U[:, idx] <- U[:, idx] V, D[idx] <- w; not sorted."""
    U, D = U.copy(), D.copy()
    w, V = np.linalg.eigh(U[:, idx].T @ M @ U[:, idx])
    U[:, idx] = U[:, idx] @ V
    D[idx] = w
    return U, D


# ---- damping, continuation, application ---------------------------------------------------------------------


def level(D: np.ndarray, d: int, continuation: str, trace: float) -> float:
    """tau of the three continuations."""
    present = D[D > 0]
    if len(present) == d or continuation == "none":
        return 0.0
    if continuation == "min":
        return 0.0 if len(D) == d else float(D.min())
    return max(0.0, trace - present.sum()) / (d - len(present))


def damped_inverse(pair: Pair, lam: float, tau: float) -> np.ndarray:
    """(U D U^T + tau (I - U U^T) + lam I)^-1 by a dense inversion."""
    U, D = pair
    U, D = U[:, D > 0], D[D > 0]
    d = U.shape[0]
    return np.linalg.inv(U @ np.diag(D) @ U.T + tau * (np.eye(d) - U @ U.T) + lam * np.eye(d))


def algorithm_1(J: np.ndarray, A: Pair, G: Pair, lam_A: float, lam_G: float) -> np.ndarray:
    """Algorithm 1 l.16-17 as printed; with continuation, call it on D - tau and lam + tau (§3.5)."""
    (V_A, D_A), (V_G, D_G) = A, G
    M = J @ V_A @ (np.diag(1 / (D_A + lam_A)) - np.eye(len(D_A)) / lam_A) @ V_A.T + J / lam_A
    return V_G @ (np.diag(1 / (D_G + lam_G)) - np.eye(len(D_G)) / lam_G) @ V_G.T @ M + M / lam_G


# ---- the metrics of §4.2 ------------------------------------------------------------------------------------


def frobenius(X: np.ndarray) -> np.longdouble:
    return np.sqrt(np.sum(np.asarray(X, dtype=np.longdouble) ** 2))


def relative_error(X: np.ndarray, reference: np.ndarray) -> float:
    """Metrics (1)-(3) in extended precision; 0 between two zeros."""
    X, reference = np.asarray(X, dtype=np.longdouble), np.asarray(reference, dtype=np.longdouble)
    if not X.any() and not reference.any():
        return 0.0
    return float(frobenius(X - reference) / frobenius(reference))


def angle_error(S: np.ndarray, reference: np.ndarray) -> float:
    """Metric (4) as printed, 1 - cos, in extended precision; 0 between two zeros."""
    S, reference = np.asarray(S, dtype=np.longdouble), np.asarray(reference, dtype=np.longdouble)
    if not S.any() and not reference.any():
        return 0.0
    return float(1 - np.sum(S * reference) / (frobenius(S) * frobenius(reference)))


# ---- a whole study ------------------------------------------------------------------------------------------


class _Side:
    """One factor and one algorithm by the paper's schedule, all dense."""

    def __init__(self, algorithm: str, period: int, rank: int, rho: float) -> None:
        self.algorithm, self.period, self.rank, self.rho = algorithm, period, rank, rho
        self.M: np.ndarray | None = None
        self.columns: list[np.ndarray] = []
        self.estimate: Pair | None = None
        self.trace = 0.0
        self.done: set[int] = set()  # intervals of the current window whose heavy update is done

    def _heavy(self, k: int, start: int) -> bool:
        interval = (k - start) // self.period
        new = interval not in self.done
        self.done.add(interval)
        return new

    def _hold(self, estimate: Pair) -> None:
        self.estimate, self.trace = estimate, float(np.trace(self.M))

    def step(self, k: int, X: np.ndarray, update: bool, window: Window | None) -> None:
        if window is None or k == window.start:
            self.done = set()
        start = 0 if window is None else window.start
        heavy = (update or (window is not None and k == window.start)) and self._heavy(k, start)
        before = self.M
        if update:
            self.columns.append(X)
            self.M = ea_factor(self.columns, self.rho)
        if self.algorithm in ("K-FAC", "R-KFAC"):
            if heavy:
                self._hold(evd(self.M, None if self.algorithm == "K-FAC" else self.rank))
        elif not update:
            if heavy and self.algorithm == "B-R-KFAC":
                self._hold(evd(self.M, self.rank))
        elif self.estimate is None and (before is None or self.algorithm == "B-KFAC"):
            self._hold(evd(X @ X.T, X.shape[1]))
        else:
            held = evd(before, self.rank) if heavy and self.algorithm == "B-R-KFAC" else self.estimate
            U, D = held[0][:, : self.rank], held[1][: self.rank]
            M = self.rho * dense((U, D)) + (1 - self.rho) * X @ X.T
            self._hold(evd(M, len(D) + X.shape[1]))


def replay_reference(
    steps: Sequence[Step],
    windows: Sequence[Window],
    algorithms: dict[str, tuple[str, int]],
    *,
    rank: int,
    rho: float,
    phi: float,
    continuation: str = "min",
    damping: str = "own",
) -> dict[tuple[str, int, str], float]:
    """(algorithm, k, metric) -> value for deterministic algorithms, with exact truncation for an RSVD.

    Args:
        algorithms: name -> (base, period of its heavy update).
    """
    values: dict[tuple[str, int, str], float] = {}
    for name, (base, period) in algorithms.items():
        sides = {"A": _Side(base, period, rank, rho), "G": _Side(base, period, rank, rho)}
        for step in steps:
            window = next((w for w in windows if w.start <= step.k < w.start + w.length), None)
            ratio = phi if step.phi is None else step.phi
            exact, cheap = {}, {}
            for which, X in (("A", np.asarray(step.A, float)), ("G", np.asarray(step.G, float))):
                side = sides[which]
                side.step(step.k, X, step.update, window)
                if window is None:
                    continue
                d = X.shape[0]
                lam_ref = ratio * np.linalg.eigvalsh(side.M)[-1]
                exact[which] = np.linalg.inv(side.M + lam_ref * np.eye(d))
                lam = lam_ref if damping == "common" else ratio * side.estimate[1][0]
                tau = level(side.estimate[1], d, continuation, side.trace)
                cheap[which] = damped_inverse(side.estimate, lam, tau)
            if window is None:
                continue
            J = np.asarray(step.G, float) @ np.asarray(step.A, float).T
            S, S_ref = cheap["G"] @ J @ cheap["A"], exact["G"] @ J @ exact["A"]
            values[name, step.k, "inverse_A"] = relative_error(cheap["A"], exact["A"])
            values[name, step.k, "inverse_G"] = relative_error(cheap["G"], exact["G"])
            values[name, step.k, "step_norm"] = relative_error(S, S_ref)
            values[name, step.k, "step_angle"] = angle_error(S, S_ref)
    return values
