"""The paper's claims C8-C12 (design §12), judged on a performance study's epochs and times.

A verdict is computed from means, over rounds for t_epoch and over seeds for epochs; "in n of N" counts the rounds,
or the seeds, in which the claim holds on its own. Nothing is tuned: each threshold stands beside its reason.

A run that does not reach a target is counted as if it had with one epoch more than it had: the least it can need.
So means are over all runs, and an optimizer gains nothing by runs that fail.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd

from figures.optimizers import NAMES, runs_to_targets
from studies.claims import Finding
from studies.presets import OptimizerPreset

__all__ = ["CLAIMS", "Evidence", "judge"]

MUCH = 2.0  # C8, "<<": at least half the time; the paper's own Table 1 has 169 to 71.2, a factor of 2.4
FEW_PERCENT = 0.05  # C8, "within a few percent"; the paper's own Table 1 has 59.5 to 58.5, 1.7%

FAMILY = ("k-fac", "r-kfac", "r-kfac-short", "b-kfac", "b-kfac-c", "b-r-kfac")
BRAND = ("b-kfac", "b-kfac-c", "b-r-kfac")
_Times = dict[str, float]


class Evidence(NamedTuple):
    """One set of numbers to judge: means, or those of one round or one seed.

    Attributes:
        times: t_epoch by driver.
        epochs: by optimizer, the epochs to each target.
    """

    times: _Times
    epochs: dict[str, list[float]]

    def seconds(self, optimizer: str) -> list[float]:
        """To each target."""
        return [n * self.times[optimizer] for n in self.epochs[optimizer]]


class Claim(NamedTuple):
    """A claim, and what its runs are: "rounds" of timing or "seeds" of training."""

    test: Callable[[Evidence], Finding]
    runs: str


def c8(e: Evidence) -> Finding:
    """t_epoch: B-KFAC < R-KFAC T_inv=10 << K-FAC; B-R-KFAC within a few percent of R-KFAC T_inv=50 (Table 1's)."""
    brand, short, exact = e.times["B-KFAC"], e.times["R-KFAC T_inv=10"], e.times["K-FAC T_inv=50"]
    overwritten, long = e.times["B-R-KFAC"], e.times["R-KFAC T_inv=50"]
    holds = brand < short and exact > MUCH * short and abs(overwritten / long - 1) <= FEW_PERCENT
    return Finding(
        holds,
        f"B-KFAC / R-KFAC T_inv=10: {brand / short:.3f} (< 1); K-FAC / R-KFAC T_inv=10: {exact / short:.2f} "
        f"(> {MUCH:g}); B-R-KFAC / R-KFAC T_inv=50: {overwritten / long:.3f} (1 ± {FEW_PERCENT:g})",
    )


def c9(e: Evidence) -> Finding:
    """B-KFAC has the lowest t_epoch of the K-FAC family."""
    times = {name: e.times[name] for name in FAMILY}
    relative = {name: t / times["b-kfac"] for name, t in times.items() if name != "b-kfac"}
    return Finding(min(relative.values()) > 1, f"t_epoch / B-KFAC's: {_listed(relative, '.3f')}; all must be > 1")


def c10(e: Evidence) -> Finding:
    """All B- variants reach the targets in no more epochs than R-KFAC."""
    reference = e.epochs["r-kfac"]
    holds = all(n <= r for name in BRAND for n, r in zip(e.epochs[name], reference, strict=True))
    return Finding(holds, f"epochs: {_per_target({n: e.epochs[n] for n in ('r-kfac', *BRAND)}, '.1f')}")


def c11(e: Evidence) -> Finding:
    """B-KFAC and B-KFAC-C reach every target sooner than R-KFAC."""
    reference = e.seconds("r-kfac")
    names = ("b-kfac", "b-kfac-c")
    holds = all(t < r for name in names for t, r in zip(e.seconds(name), reference, strict=True))
    return Finding(holds, f"seconds: {_per_target({n: e.seconds(n) for n in ('r-kfac', *names)}, '.3g')}")


def c12(e: Evidence) -> Finding:
    """SENG has the lowest t_epoch but needs more epochs."""
    ratios = {name: e.times["seng"] / e.times[name] for name in FAMILY}
    middle = {name: e.epochs[name][1] for name in ("seng", *FAMILY)}
    holds = max(ratios.values()) < 1 and all(middle["seng"] > middle[name] for name in FAMILY)
    return Finding(
        holds,
        f"t_epoch of SENG / the others': {_listed(ratios, '.3f')}, all must be < 1; epochs to the middle target: "
        f"{_listed(middle, '.1f')}, SENG's must be the most (SGD and AdamW are not in the paper's table)",
    )


CLAIMS = {
    "C8": Claim(c8, "rounds"),
    "C9": Claim(c9, "rounds"),
    "C10": Claim(c10, "seeds"),
    "C11": Claim(c11, "seeds"),
    "C12": Claim(c12, "seeds"),
}


def judge(epochs: pd.DataFrame, timing: pd.DataFrame, preset: OptimizerPreset, dataset: str) -> str:
    """claims.md: every claim, its verdict and our numbers.

    Args:
        epochs: columns optimizer, seed, epoch, test_accuracy.
        timing: columns driver, round, t_epoch, each taken alone.
        preset: of the study.
        dataset: what was trained on, for the heading.
    """
    counted = runs_to_targets(epochs, preset.targets).fillna(preset.epochs + 1)
    seeds = {seed: _epochs(part, preset.targets) for seed, part in counted.groupby("seed")}
    means = counted.groupby("optimizer")[list(preset.targets)].mean().reset_index()
    whole = Evidence(_times(timing), _epochs(means, preset.targets))
    runs = {
        "rounds": [Evidence(_times(part), whole.epochs) for _, part in timing.groupby("round")],
        "seeds": [Evidence(whole.times, part) for part in seeds.values()],
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
    for name, claim in CLAIMS.items():
        text = " ".join((claim.test.__doc__ or "").split("\n")[0].split())
        lines += ["", f"## {name}. {text}", ""]
        finding = _safely(claim.test, whole)
        if finding is None:
            lines.append("- not measured: an optimizer has not been run or timed")
            continue
        agree = [_safely(claim.test, one) for one in runs[claim.runs]]
        count = sum(f is not None and f.holds for f in agree)
        verdict = "**holds**" if finding.holds else "**does not hold**"
        lines.append(f"- {verdict} (in {count} of {len(agree)} {claim.runs}). {finding.numbers}")
    return "\n".join(lines) + "\n"


def _times(timing: pd.DataFrame) -> _Times:
    return {str(name): float(t) for name, t in timing.groupby("driver").t_epoch.mean().items()}


def _epochs(counted: pd.DataFrame, targets: Sequence[float]) -> dict[str, list[float]]:
    return {str(row["optimizer"]): [float(row[t]) for t in targets] for _, row in counted.iterrows()}


def _safely(claim: Callable[[Evidence], Finding], evidence: Evidence) -> Finding | None:
    """None where an optimizer that the claim is about is missing."""
    try:
        return claim(evidence)
    except KeyError:
        return None


def _listed(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{NAMES[name]} {value:{form}}" for name, value in values.items())


def _per_target(values: dict[str, list[float]], form: str) -> str:
    return "; ".join(f"{NAMES[n]} " + " / ".join(f"{v:{form}}" for v in row) for n, row in values.items())
