"""The paper's claims (design §12), judged: C1-C7 on a study's errors, C8-C12 on epochs and times of optimizers.

A verdict is computed from means: the mean curve over seeds in every window, the means over rounds of timing and
over seeds of training. "in n of N" counts the runs in which the claim holds by itself. Nothing is tuned: each
threshold stands beside its reason.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from figures.tables import PAPER_T_UPDT, PAPER_TABLE_2, paper_name, runs_to_targets
from kfacerr.algorithms import SEVEN, Algorithm
from kfacerr.metrics import METRICS
from kfacerr.study import by_window
from studies.presets import OptimizerPreset

__all__ = ["CLAIMS", "OPTIMIZER_CLAIMS", "Curves", "Evidence", "findings", "judge", "judge_optimizers"]

BLOCK = 10  # T_updt of every preset: curves are averages over the iterations between two updates
PERIOD = 50  # of the heavier updates
MILD = 4.65 / 1.51  # C1: the largest ratio that the paper's Table 1 itself calls "mildly larger"
FLAT = 1.5  # C3: end over start of a curve called flat (its inverse for falling ones)
SIGNIFICANT = 0.01  # C6: p-value of an F-test
MUCH = 2.0  # C8, "<<": at least half the time; the paper's own Table 1 has 169 to 71.2, a factor of 2.4
FEW_PERCENT = 0.05  # C8, "within a few percent"; the paper's own Table 1 has 59.5 to 58.5, 1.7%

NUMBERS = {metric: f"({i + 1})" for i, metric in enumerate(METRICS)}


class Verdict(NamedTuple):
    """Whether a claim holds on one set of numbers, and those numbers."""

    holds: bool
    numbers: str


# ----------------------------------------------------------------------------------------- C1-C7, of the errors


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
    def complete(self) -> bool:
        """Whether an interrupted run left enough of a window, and of the algorithms, to judge."""
        least = 3 * PERIOD // BLOCK
        present = {name for name, _ in self._curves}
        return present >= set(SEVEN) and min(map(len, self._curves.values())) >= least

    def average(self, algorithm: str, metric: str) -> float:
        """Over the window."""
        return float(self[algorithm, metric].mean())


def _ratios(curves: Curves, one: str, other: str) -> dict[str, float]:
    return {m: curves.average(one, m) / curves.average(other, m) for m in METRICS}


def _by_metric(values: dict[str, float]) -> str:
    return ", ".join(f"{NUMBERS[m]} {v:.2f}" for m, v in values.items())


def c1(c: Curves) -> Verdict:
    """R-KFAC T_inv=50 is only mildly worse than K-FAC T_inv=50."""
    ratios = _ratios(c, "R-KFAC T_inv=50", "K-FAC T_inv=50")
    return Verdict(max(ratios.values()) <= MILD, f"R-KFAC/K-FAC: {_by_metric(ratios)}; mild is <= {MILD:.2f}")


def c2(c: Curves) -> Verdict:
    """B-R-KFAC beats R-KFAC T_inv=50 in all four metrics."""
    ratios = _ratios(c, "B-R-KFAC", "R-KFAC T_inv=50")
    return Verdict(max(ratios.values()) < 1, f"B-R/R: {_by_metric(ratios)}")


def c3(c: Curves) -> Verdict:
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
    return Verdict(bool(holds), "; ".join(numbers))


def c4(c: Curves) -> Verdict:
    """B-R-KFAC beats B-KFAC at every iteration."""
    share = {m: float(np.mean(c["B-R-KFAC", m] < c["B-KFAC", m])) for m in METRICS}
    return Verdict(min(share.values()) == 1, f"share of blocks: {_by_metric(share)}")


def c5(c: Curves) -> Verdict:
    """B-KFAC-C lies between B-R-KFAC and B-KFAC."""
    holds, numbers = True, []
    for metric in METRICS:
        low, middle, high = (c.average(a, metric) for a in ("B-R-KFAC", "B-KFAC-C", "B-KFAC"))
        holds &= low <= middle <= high
        numbers.append(f"{NUMBERS[metric]} {low:.3g} / {middle:.3g} / {high:.3g}")
    return Verdict(bool(holds), "B-R / B-C / B: " + "; ".join(numbers))


def c6(c: Curves) -> Verdict:
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
    return Verdict(holds, "p: " + ", ".join(f"{name} {p:.1g}" for name, p in p_values.items()))


def c7(c: Curves) -> Verdict:
    """B-R-KFAC beats K-FAC T_inv=50 in three of four metrics."""
    ratios = _ratios(c, "B-R-KFAC", "K-FAC T_inv=50")
    return Verdict(sum(r < 1 for r in ratios.values()) >= 3, f"B-R/K-FAC: {_by_metric(ratios)}")


CLAIMS: dict[str, Callable[[Curves], Verdict]] = {
    f"C{i}": claim for i, claim in enumerate((c1, c2, c3, c4, c5, c6, c7), 1)
}


class _Judged(NamedTuple):
    """A claim on one variant and window: the mean curve's verdict and each run's; None if incomplete."""

    variant: str
    window: str
    verdict: Verdict | None
    runs: list[Verdict | None]


def _judged(errors: pd.DataFrame) -> dict[str, list[_Judged]]:
    """Every claim under the paper's settings, at equal rank and with `trace`, in every window."""
    result: dict[str, list[_Judged]] = {name: [] for name in CLAIMS}
    for variant, frame in _variants(errors).items():
        for label, window in by_window(frame):
            mean = Curves(window.groupby(["algorithm", "metric", "k"]).value.mean().reset_index())
            runs = [Curves(run) for _, run in window.groupby("seed")]
            for name, claim in CLAIMS.items():
                verdict, *each = (claim(curves) if curves.complete else None for curves in (mean, *runs))
                result[name].append(_Judged(variant, label, verdict, each))
    return result


def _variants(errors: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The paper's settings; R-KFAC at the rank the B- variants apply; the `trace` continuation: as the seven."""
    algorithms = {name: Algorithm.parse(name) for name in errors.algorithm.unique()}
    at_rank = {name: _seventh(a, rank=None) for name, a in algorithms.items() if a.get("rank") is not None}
    trace = {
        name: _seventh(a, continuation=None) for name, a in algorithms.items() if a.get("continuation") == "trace"
    }
    plain: dict[str, str | None] = {name: name for name in SEVEN}
    chosen: dict[str, dict[str, str | None]] = {
        "paper's settings": plain,
        "equal rank": {**plain, **dict.fromkeys(filter(None, at_rank.values())), **at_rank},
        "`trace` continuation": trace,
    }
    if not any(at_rank.values()):
        del chosen["equal rank"]  # own trajectories have none
    variants = {}
    for variant, renamed in chosen.items():
        part = errors[errors.algorithm.isin([name for name, seventh in renamed.items() if seventh])]
        variants[variant] = part.assign(algorithm=part.algorithm.map(renamed))
    return variants


def _seventh(algorithm: Algorithm, **without: None) -> str | None:
    """Which of the seven it is without a setting; None if it is none of them."""
    name = str(algorithm.with_settings(**without))
    return name if name in SEVEN else None


def judge(errors: pd.DataFrame, dataset: str, setting: str = "") -> str:
    """claims.md: every claim under the paper's settings, at equal rank and with `trace`, with our numbers.

    Args:
        errors: tidy table with columns algorithm, k, metric, value, epoch, seed and optionally window; R-KFAC also
            at rank r + n for the equal-rank comparison, and all also with the continuation "trace".
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
    for name, windows in _judged(errors).items():
        lines += _heading(name, CLAIMS[name])
        for variant, window, verdict, runs in windows:
            lines.append(f"- {variant}, {window}: {_line(verdict, runs, '', 'the window is not complete')}")
    return "\n".join(lines) + "\n"


def findings(errors: pd.DataFrame, out: Path) -> str:
    """What was found, in five lines: the claims by variant, the smallest errors, and where the figures are."""
    judged = _judged(errors)
    lines = []
    for variant in ("paper's settings", "equal rank", "`trace` continuation"):
        said: dict[str, list[str]] = {"true": [], "true in some windows": [], "false": []}
        for name, windows in judged.items():
            holds = {w.verdict.holds for w in windows if w.variant == variant and w.verdict is not None}
            if holds:
                where = "true in some windows" if len(holds) == 2 else "true" if holds == {True} else "false"
                said[where].append(name)
        found = "; ".join(f"{where}: {', '.join(names)}" for where, names in said.items() if names)
        lines.append(f"Claims, {variant}, {found or 'not measured'}.")
    label, last = by_window(errors[errors.algorithm.isin(SEVEN)])[-1]
    mean = last.groupby(["metric", "algorithm"]).value.mean()
    best = (f"{NUMBERS[m]} {mean[m].idxmin()} {mean[m].min():.2g}" for m in METRICS)
    lines.append(f"Smallest mean errors at {label}, paper's settings: {', '.join(best)}.")
    lines.append(f"Figures 1 and 2, the variants, the spectra, Table 1, what each claim says: {out}/*.png, *.md.")
    return "\n".join(lines)


# ------------------------------------------------------------------------- C8-C12, of epochs and times (Table 2)

FAMILY = tuple(name for name in PAPER_TABLE_2 if name != "SENG")
BRAND = ("B-KFAC", "B-KFAC-C", "B-R-KFAC")


class Evidence(NamedTuple):
    """One set of numbers to judge: means, or those of one round or one seed. Names are the paper's.

    Attributes:
        table_1: t_epoch of Table 1's algorithms.
        times: t_epoch of Table 2's.
        epochs: by optimizer, the epochs to each target.
    """

    table_1: dict[str, float]
    times: dict[str, float]
    epochs: dict[str, list[float]]

    def seconds(self, optimizer: str) -> list[float]:
        """To each target."""
        return [n * self.times[optimizer] for n in self.epochs[optimizer]]


class OptimizerClaim(NamedTuple):
    """A claim, and what its runs are: "rounds" of timing or "seeds" of training."""

    test: Callable[[Evidence], Verdict]
    runs: str


def c8(e: Evidence) -> Verdict:
    """t_epoch: B-KFAC < R-KFAC T_inv=10 << K-FAC; B-R-KFAC within a few percent of R-KFAC T_inv=50 (Table 1's)."""
    brand, short, exact = e.table_1["B-KFAC"], e.table_1["R-KFAC T_inv=10"], e.table_1["K-FAC T_inv=50"]
    overwritten, long = e.table_1["B-R-KFAC"], e.table_1["R-KFAC T_inv=50"]
    holds = brand < short and exact > MUCH * short and abs(overwritten / long - 1) <= FEW_PERCENT
    return Verdict(
        holds,
        f"B-KFAC / R-KFAC T_inv=10: {brand / short:.3f} (< 1); K-FAC / R-KFAC T_inv=10: {exact / short:.2f} "
        f"(> {MUCH:g}); B-R-KFAC / R-KFAC T_inv=50: {overwritten / long:.3f} (1 ± {FEW_PERCENT:g})",
    )


def c9(e: Evidence) -> Verdict:
    """B-KFAC has the lowest t_epoch of the K-FAC family."""
    relative = {name: e.times[name] / e.times["B-KFAC"] for name in FAMILY if name != "B-KFAC"}
    return Verdict(min(relative.values()) > 1, f"t_epoch / B-KFAC's: {_listed(relative, '.3f')}; all must be > 1")


def c10(e: Evidence) -> Verdict:
    """All B- variants reach the targets in no more epochs than R-KFAC."""
    reference = e.epochs["R-KFAC"]
    holds = all(n <= r for name in BRAND for n, r in zip(e.epochs[name], reference, strict=True))
    return Verdict(holds, f"epochs: {_per_target({n: e.epochs[n] for n in ('R-KFAC', *BRAND)}, '.1f')}")


def c11(e: Evidence) -> Verdict:
    """B-KFAC and B-KFAC-C reach every target sooner than R-KFAC."""
    reference = e.seconds("R-KFAC")
    names = ("B-KFAC", "B-KFAC-C")
    holds = all(t < r for name in names for t, r in zip(e.seconds(name), reference, strict=True))
    return Verdict(holds, f"seconds: {_per_target({n: e.seconds(n) for n in ('R-KFAC', *names)}, '.3g')}")


def c12(e: Evidence) -> Verdict:
    """SENG has the lowest t_epoch but needs more epochs."""
    ratios = {name: e.times["SENG"] / e.times[name] for name in FAMILY}
    middle = {name: e.epochs[name][1] for name in ("SENG", *FAMILY)}
    holds = max(ratios.values()) < 1 and all(middle["SENG"] > middle[name] for name in FAMILY)
    return Verdict(
        holds,
        f"t_epoch of SENG / the others': {_listed(ratios, '.3f')}, all must be < 1; epochs to the middle target: "
        f"{_listed(middle, '.1f')}, SENG's must be the most (SGD and AdamW are not in the paper's table)",
    )


OPTIMIZER_CLAIMS = {
    "C8": OptimizerClaim(c8, "rounds"),
    "C9": OptimizerClaim(c9, "rounds"),
    "C10": OptimizerClaim(c10, "seeds"),
    "C11": OptimizerClaim(c11, "seeds"),
    "C12": OptimizerClaim(c12, "seeds"),
}


def judge_optimizers(
    epochs: pd.DataFrame, timing: pd.DataFrame, preset: OptimizerPreset, T_updt: int, dataset: str
) -> str:
    """claims.md: every claim, its verdict and our numbers.

    A run that does not reach a target is counted as if it had with one epoch more than it had: the least it can
    need. So means are over all runs, and an optimizer gains nothing by runs that fail.

    Args:
        epochs: columns optimizer, seed, epoch, test_accuracy.
        timing: columns table, driver, round, t_epoch, each taken alone.
        preset: of the study.
        T_updt: of the run, see `paper_name`.
        dataset: what was trained on, for the heading.
    """
    counted = runs_to_targets(epochs, preset.targets).fillna(preset.epochs + 1)
    counted = counted.assign(optimizer=[paper_name(name, T_updt) for name in counted.optimizer])
    timing = timing.assign(driver=[paper_name(name, T_updt) for name in timing.driver])
    seeds = [_epochs(part, preset.targets) for _, part in counted.groupby("seed")]
    whole = Evidence(_times(timing, 1), _times(timing, 2), _epochs(counted, preset.targets))
    rounds = [part for _, part in timing.groupby("round")]
    runs = {
        "rounds": [whole._replace(table_1=_times(part, 1), times=_times(part, 2)) for part in rounds],
        "seeds": [whole._replace(epochs=part) for part in seeds],
    }
    settings = [f"`{preset.continuation}` continuation"]
    settings.append("R-KFAC at the rank r + n of the B- variants" if preset.equal_rank else "the paper's ranks")
    lines = [
        f"# The paper's claims C8-C12 on {dataset}, {len(seeds)} seed{'s' if len(seeds) != 1 else ''}",
        "",
        f"Preset {preset.name}, {', '.join(settings)}; targets {', '.join(f'{t:.2%}' for t in preset.targets)}. "
        "A verdict is that of the means; n of N counts the rounds of timing, or the seeds, that agree. A run that "
        f"misses a target counts as {preset.epochs + 1} epochs.",
    ]
    if T_updt != PAPER_T_UPDT:
        lines.append(f"R-KFAC T_inv={PAPER_T_UPDT} stands for T_inv = T_updt, which is {T_updt} here.")
    missing = "not measured: an optimizer has not been run or timed"
    for name, (claim, kind) in OPTIMIZER_CLAIMS.items():
        verdict, *each = (_safely(claim, one) for one in (whole, *runs[kind]))
        lines += [*_heading(name, claim), f"- {_line(verdict, each, f' {kind}', missing)}"]
    return "\n".join(lines) + "\n"


def _times(timing: pd.DataFrame, table: int) -> dict[str, float]:
    part = timing[timing.table == table]
    return {str(name): float(t) for name, t in part.groupby("driver").t_epoch.mean().items()}


def _epochs(counted: pd.DataFrame, targets: Sequence[float]) -> dict[str, list[float]]:
    means = counted.groupby("optimizer")[list(targets)].mean()
    return {str(name): [float(row[t]) for t in targets] for name, row in means.iterrows()}


def _safely(claim: Callable[[Evidence], Verdict], evidence: Evidence) -> Verdict | None:
    """None where an optimizer that the claim is about is missing."""
    try:
        return claim(evidence)
    except KeyError:
        return None


def _listed(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


def _per_target(values: dict[str, list[float]], form: str) -> str:
    return "; ".join(f"{n} " + " / ".join(f"{v:{form}}" for v in row) for n, row in values.items())


# ---------------------------------------------------------------------------------------------------- claims.md


def _heading(name: str, claim: Callable[..., Verdict]) -> list[str]:
    text = " ".join((claim.__doc__ or "").split("\n")[0].split())
    return ["", f"## {name}. {text}", ""]


def _line(verdict: Verdict | None, runs: Sequence[Verdict | None], kind: str, missing: str) -> str:
    if verdict is None:
        return missing
    said = "**holds**" if verdict.holds else "**does not hold**"
    agree = sum(run is not None and run.holds for run in runs)
    return f"{said} (in {agree} of {len(runs)}{kind}). {verdict.numbers}"
