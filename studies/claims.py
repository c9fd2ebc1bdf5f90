"""The paper's claims C1-C7 (design §12), judged on a study's errors: by the paper's settings, at equal rank, and
with the `trace` continuation.

A verdict is computed from the mean curve over seeds in every window; "in n of N" counts the runs (seed and
window) in which the claim holds on its own. Nothing is tuned: each threshold stands beside its reason.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from kfacerr.algorithms import SEVEN
from kfacerr.metrics import METRICS
from kfacerr.study import by_window

__all__ = ["CLAIMS", "judge"]

BLOCK = 10  # T_updt of every preset: curves are averages over the iterations between two updates
PERIOD = 50  # of the heavier updates
MILD = 4.65 / 1.51  # C1: the largest ratio that the paper's Table 1 itself calls "mildly larger"
FLAT = 1.5  # C3: end over start of a curve called flat (its inverse for falling ones)
SIGNIFICANT = 0.01  # C6: p-value of an F-test

NUMBERS = {metric: f"({i + 1})" for i, metric in enumerate(METRICS)}


class Finding(NamedTuple):
    """Whether a claim holds on one set of curves, and the numbers that say so."""

    holds: bool
    numbers: str


class Curves:
    """Errors in blocks of T_updt: `curves[algorithm, metric]` is an array over blocks."""

    def __init__(self, frame: pd.DataFrame) -> None:
        block = (frame.k - frame.k.min()) // BLOCK
        parts = frame.groupby(["algorithm", "metric"])
        self._curves: dict[tuple[str, str], np.ndarray] = {
            (str(name), str(metric)): part.value.groupby(block[part.index]).mean().to_numpy()
            for (name, metric), part in parts
        }

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        return self._curves[key]

    @property
    def blocks(self) -> int:
        """Length of the shortest curve."""
        return min(map(len, self._curves.values()), default=0)

    @property
    def algorithms(self) -> set[str]:
        return {name for name, _ in self._curves}

    def average(self, algorithm: str, metric: str) -> float:
        return float(self[algorithm, metric].mean())


def _ratios(curves: Curves, one: str, other: str) -> dict[str, float]:
    return {m: curves.average(one, m) / curves.average(other, m) for m in METRICS}


def _listed(values: dict[str, float], form: str = ".2f") -> str:
    return ", ".join(f"{NUMBERS[m]} {v:{form}}" for m, v in values.items())


def c1(c: Curves) -> Finding:
    """R-KFAC T_inv=50 is only mildly worse than K-FAC T_inv=50."""
    ratios = _ratios(c, "R-KFAC T_inv=50", "K-FAC T_inv=50")
    return Finding(max(ratios.values()) <= MILD, f"R-KFAC/K-FAC: {_listed(ratios)}; mild is <= {MILD:.2f}")


def c2(c: Curves) -> Finding:
    """B-R-KFAC beats R-KFAC T_inv=50 in all four metrics."""
    ratios = _ratios(c, "B-R-KFAC", "R-KFAC T_inv=50")
    return Finding(max(ratios.values()) < 1, f"B-R/R: {_listed(ratios)}")


def c3(c: Curves) -> Finding:
    """R-KFAC T_inv=300 grows and overtakes the flat B-KFAC in the step metrics."""
    blocks = PERIOD // BLOCK
    holds, numbers = True, []
    for metric in METRICS[2:]:
        no_update, brand = c["R-KFAC T_inv=300", metric], c["B-KFAC", metric]
        growth = no_update[-blocks:].mean() / no_update[:blocks].mean()
        drift = brand[-blocks:].mean() / brand[:blocks].mean()
        ahead = no_update[-blocks:].mean() / brand[-blocks:].mean()
        start = no_update[0] / brand[0]
        holds &= growth > FLAT and 1 / FLAT < drift < FLAT and start < 1 < ahead
        numbers.append(
            f"{NUMBERS[metric]} R-KFAC T_inv=300 grows x{growth:.2f}, B-KFAC x{drift:.2f}, "
            f"their ratio goes from {start:.2f} to {ahead:.2f}"
        )
    return Finding(bool(holds), "; ".join(numbers))


def c4(c: Curves) -> Finding:
    """B-R-KFAC beats B-KFAC at every iteration."""
    share = {m: float(np.mean(c["B-R-KFAC", m] < c["B-KFAC", m])) for m in METRICS}
    return Finding(min(share.values()) == 1, f"share of blocks: {_listed(share)}")


def c5(c: Curves) -> Finding:
    """B-KFAC-C lies between B-R-KFAC and B-KFAC."""
    holds, numbers = True, []
    for metric in METRICS:
        low, middle, high = (c.average(a, metric) for a in ("B-R-KFAC", "B-KFAC-C", "B-KFAC"))
        holds &= low <= middle <= high
        numbers.append(f"{NUMBERS[metric]} {low:.3g} / {middle:.3g} / {high:.3g}")
    return Finding(bool(holds), "B-R / B-C / B: " + "; ".join(numbers))


def c6(c: Curves) -> Finding:
    """All but B-KFAC and R-KFAC T_inv=300 are periodic with 50.

    Metric (2), log scale, linear trend removed: one-way analysis of variance over the position in the period.
    R-KFAC T_inv=10 is left out: nothing it does has a period of 50.
    """
    p_values = {}
    for name in SEVEN:
        if name == "R-KFAC T_inv=10":
            continue
        curve = np.log(np.maximum(c[name, "inverse_G"], np.finfo(float).tiny))
        t = np.arange(len(curve))
        residual = curve - np.polyval(np.polyfit(t, curve, 1), t)
        groups = [residual[t % (PERIOD // BLOCK) == phase] for phase in range(PERIOD // BLOCK)]
        p_values[name] = float(stats.f_oneway(*groups).pvalue)
    periodic = {name for name, p in p_values.items() if p < SIGNIFICANT}
    holds = periodic == set(p_values) - {"B-KFAC", "R-KFAC T_inv=300"}
    return Finding(holds, "p: " + ", ".join(f"{name} {p:.1g}" for name, p in p_values.items()))


def c7(c: Curves) -> Finding:
    """B-R-KFAC beats K-FAC T_inv=50 in three of four metrics."""
    ratios = _ratios(c, "B-R-KFAC", "K-FAC T_inv=50")
    return Finding(sum(r < 1 for r in ratios.values()) >= 3, f"B-R/K-FAC: {_listed(ratios)}")


CLAIMS: dict[str, Callable[[Curves], Finding]] = {
    "C1": c1,
    "C2": c2,
    "C3": c3,
    "C4": c4,
    "C5": c5,
    "C6": c6,
    "C7": c7,
}


def judge(errors: pd.DataFrame, dataset: str, setting: str = "") -> str:
    """claims.md: every claim under the paper's settings, at equal rank and with `trace`, with our numbers.

    Args:
        errors: tidy table with columns algorithm, k, metric, value, epoch, continuation, seed and optionally
            window; R-KFAC also at rank r + n for the equal-rank comparison.
        dataset: what was trained on, for the heading.
        setting: a line on the layer and its ranks.
    """
    seeds = errors.seed.nunique()
    lines = [
        f"# The paper's claims on {dataset}, {seeds} seed{'s' if seeds > 1 else ''}",
        "",
        *([f"{setting}.", ""] if setting else []),
        "Curves are averages over the 10 iterations between two updates; metrics (1)-(4) are those of §4.2.",
        "A verdict is that of the mean curve over seeds; n of N counts the runs (seed, window) that agree.",
    ]
    windows = [
        (f"{variant}, {label}", _over_seeds(window), [Curves(run) for _, run in window.groupby("seed")])
        for variant, frame in _variants(errors).items()
        for label, window in by_window(frame)
    ]
    for name, claim in CLAIMS.items():
        text = " ".join((claim.__doc__ or "").split("\n")[0].split())
        lines += ["", f"## {name}. {text}", ""]
        for where, mean, runs in windows:
            finding = _safely(claim, mean)
            if finding is None:
                lines.append(f"- {where}: the window is not complete")
                continue
            agree = [_safely(claim, run) for run in runs]
            count = sum(f is not None and f.holds for f in agree)
            verdict = "**holds**" if finding.holds else "**does not hold**"
            lines.append(f"- {where}: {verdict} (in {count} of {len(agree)}). {finding.numbers}")
    return "\n".join(lines) + "\n"


def _variants(errors: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The paper's settings; R-KFAC at the rank the B- variants apply; the `trace` continuation."""
    base = errors[errors.continuation == "min"]
    equal = base.assign(algorithm=base.algorithm.str.replace(r" rank=\d+$", "", regex=True))
    has_own = equal.algorithm.isin(set(equal.algorithm[equal.algorithm != base.algorithm]))
    variants = {
        "paper's settings": base[base.algorithm.isin(SEVEN)],
        "equal rank": equal[(equal.algorithm != base.algorithm) | ~has_own],
        "`trace` continuation": errors[(errors.continuation == "trace") & errors.algorithm.isin(SEVEN)],
    }
    if not has_own.any():
        del variants["equal rank"]  # own trajectories have none
    return variants


def _over_seeds(window: pd.DataFrame) -> Curves:
    return Curves(window.groupby(["algorithm", "metric", "k"]).value.mean().reset_index())


def _safely(claim: Callable[[Curves], Finding], curves: Curves) -> Finding | None:
    """None where an interrupted run left too little of a window, or of the algorithms, to judge."""
    complete = curves.blocks >= 3 * PERIOD // BLOCK and curves.algorithms >= set(SEVEN)
    return claim(curves) if complete else None
