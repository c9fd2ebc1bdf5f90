"""What came of checked claims: gathered by name, and said in words, a line a proposition.

`kfacerr.verify` checks many instances of each claim; a `Finding` is what they came to, a `Statement` says which
claims make up a proposition of the paper, and a `Verdict` prints both.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .claims import TOLERANCE, Claim, Inequality

__all__ = ["STATEMENTS", "Finding", "Statement", "Verdict", "findings"]

ATTAINED = 1e-6
"""A bound with no more than this relative slack is said to be attained."""


@dataclass(frozen=True)
class Finding:
    """What all instances of one claim came to.

    Attributes:
        claim: its name.
        instances: how many were checked.
        failures: how many do not hold.
        slack: of the tightest instance. For an inequality (large - small)/large, so that 0 is attained and 1 is
            far from it, over instances with more than rounding on the large side (infinite if there is none); for
            an identity minus its residual and for "p.s.d." the smallest eigenvalue, both relative to the scale of
            their rounding errors. Negative beyond rounding only if the claim fails.
        where: the tightest instance.
    """

    claim: str
    instances: int
    failures: int
    slack: float
    where: str

    @property
    def holds(self) -> bool:
        return self.failures == 0


@dataclass(frozen=True)
class Statement:
    """A proposition in words.

    Attributes:
        name: where it stands.
        words: what it says.
        claims: the names of the claims that it is made of.
        bound: whether they are bounds, which may be tight or not.
    """

    name: str
    words: str
    claims: tuple[str, ...]
    bound: bool = False

    def line(self, parts: Iterable[Finding]) -> str:
        """What the findings of its claims came to, in one line."""
        found = list(parts)
        instances, failures = sum(f.instances for f in found), sum(f.failures for f in found)
        worst = min(found, key=lambda f: (f.holds, f.slack))
        said = f"{self.name}: {self.words}"
        if failures:
            return f"FAILS  {said} ({failures} of {instances} checks; worst: {worst.claim}, {worst.where})"
        spare = ""
        if self.bound and worst.slack < math.inf:
            spare = ", attained" if worst.slack < ATTAINED else f", {100 * worst.slack:.2g}% to spare"
        return f"holds  {said} ({instances} checks{spare})"


STATEMENTS = (
    Statement(
        "Prop. 3.1",
        "no estimate of its rank is nearer to M than the optimal truncation",
        ("(11) part 1", "(11) part 2"),
        bound=True,
    ),
    Statement("§3.3", "M_B is at least as near to M as its truncation B", ("§3.3 M_B, not B",), bound=True),
    Statement(
        "§3.3",
        "one update after overwriting, the error is no larger than without",
        ("§3.3 overwriting",),
        bound=True,
    ),
    Statement(
        "Prop. 3.2",
        "Brand's error is the decayed sum of its truncations' errors, all p.s.d.",
        ("(12)", "(12) p.s.d.", "(13)", "(13) p.s.d."),
    ),
    Statement(
        "Prop. 4.1",
        "the error is the exponential average of the updates' own errors",
        ("(14) with (15)", "(14) with (16)"),
    ),
    Statement(
        "Prop. 4.2",
        "without updates, the error in a new batch is within its bound (17)",
        ("(17)",),
        bound=True,
    ),
    Statement(
        "Prop. 4.2", "with B-updates, it is no larger than the batch's own X X^T (18)", ("(18)",), bound=True
    ),
    Statement("(19)", "the whole error is at most the average of the updates' own", ("(19)",), bound=True),
    Statement("§4.1", "the first B-update is no worse than no update", ("§4.1 B-update or nothing",), bound=True),
    Statement("(10)", "the Brand process computes it", ("(10) by the Brand process",)),
    Statement(
        "footnote 11",
        "a correction takes just the corrected block off the squared error",
        ("footnote 11", "footnote 11 drop", "footnote 11 blocks"),
    ),
    Statement(
        "certificate",
        "M - M~ is p.s.d., and its nuclear norm is t - sum D",
        ("certificate: M - M~ p.s.d.", "certificate: nuclear norm = t - sum D"),
    ),
    Statement(
        "certificate",
        "M - M~ is within the certified bounds in the other norms",
        ("certificate: Frobenius", "certificate: spectral", "FD: M - M~ <= mu I"),
        bound=True,
    ),
    Statement(
        "certificate",
        "the damped inverse's error is within its certified bounds",
        ("certificate: inverse, spectral", "certificate: inverse, Frobenius"),
        bound=True,
    ),
    Statement(
        "whole stream",
        "random probes of M - M~ agree with B-KFAC's certificate at every update",
        (
            "whole stream: W^T (M - M~) W p.s.d.",
            "whole stream: trace by Hutchinson",
            "whole stream: spectral, from below",
            "whole stream: Frobenius, from below",
            "whole stream: nuclear, from below",
        ),
    ),
)
"""The propositions and certificates, in the paper's order."""


@dataclass(frozen=True)
class Verdict:
    """A layer's findings, and what they cover in words. Prints a line a proposition; `details()` a row a claim."""

    layer: str
    findings: list[Finding]
    coverage: list[str]

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)

    def __str__(self) -> str:
        covered = [textwrap.fill(line, 100, subsequent_indent="  ") for line in self.coverage]
        return "\n".join([f"layer {self.layer}", *covered, "", *self._lines()])

    def _lines(self) -> Iterator[str]:
        """Each statement that was checked; claims that are in none of them by their own names."""
        found = {finding.claim: finding for finding in self.findings}
        for statement in STATEMENTS:
            parts = [found.pop(name) for name in statement.claims if name in found]
            if parts:
                yield statement.line(parts)
        for name, finding in found.items():
            yield Statement("beside these", name, (name,)).line([finding])

    def details(self) -> str:
        """A row a claim: instances, failures, the tightest one and where it stands, as a table."""
        from tabulate import tabulate

        rows = [
            {
                "claim": finding.claim,
                "holds": "yes" if finding.holds else f"NO ({finding.failures} fail)",
                "instances": finding.instances,
                "slack": finding.slack,
                "tightest at": finding.where,
            }
            for finding in self.findings
        ]
        return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2g")


def findings(claims: Iterable[tuple[str, Claim]]) -> list[Finding]:
    """Gathers (place, claim) pairs by the claims' names, in the order of their first instance."""
    found: dict[str, Finding] = {}
    for place, claim in claims:
        slack = _relative_slack(claim)
        where = f"{place}: {claim.where}" if claim.where else place
        failed = int(not claim.holds())
        old = found.get(claim.name)
        if old is None:
            found[claim.name] = Finding(claim.name, 1, failed, slack, where)
            continue
        # NaN is no slack at all, and never an argument to go on.
        if not slack >= old.slack:
            old = Finding(claim.name, old.instances, old.failures, slack, where)
        found[claim.name] = Finding(old.claim, old.instances + 1, old.failures + failed, old.slack, old.where)
    return list(found.values())


def _relative_slack(claim: Claim) -> float:
    if isinstance(claim, Inequality) and claim.large > TOLERANCE * claim.unit * claim.scale:
        return claim.slack / claim.large
    if isinstance(claim, Inequality) and claim.holds():
        return math.inf
    return claim.slack / claim.scale if claim.scale > 0 else claim.slack
