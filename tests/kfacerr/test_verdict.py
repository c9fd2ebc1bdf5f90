"""Findings gather the instances of each claim; a verdict says them in words."""

import numpy as np

from kfacerr.claims import Identity, Inequality, Psd
from kfacerr.verdict import Finding, Verdict, findings


def test_findings_keep_the_tightest_instance_and_every_failure():
    claims = [
        ("a", Inequality("x", 1.0, 2.0, 1.0, "one")),
        ("b", Inequality("x", 1.0, 1.5, 1.0, "two")),
        ("c", Inequality("x", 9.0, 1.0, 4.0, "three")),
        ("d", Identity("y", 1.0, 1.0, 1.0)),
        ("e", Psd("z", np.eye(2), 1.0, "four")),
        ("f", Inequality("w", float("nan"), 1.0, 1.0)),
        ("g", Inequality("0 <= 0", 0.0, 1e-16, 1.0)),
        ("h", Inequality("0 <= 0", 1.0, 4.0, 1.0)),
    ]
    x, y, z, w, nothing = findings(claims)
    assert (x.instances, x.failures, x.slack, x.where, x.holds) == (3, 1, -8.0, "c: three", False)
    assert nothing.slack == 0.75 and nothing.where == "h" and nothing.instances == 2, "rounding is not tight"
    assert y.holds and y.slack == 0 and y.where == "d"
    assert z.holds and z.slack == 1 and z.where == "e: four"
    assert not w.holds, "NaN holds nothing"


def _said(*found: Finding) -> list[str]:
    return str(Verdict("fc", list(found), ["A: everything"])).splitlines()


def test_a_proposition_is_a_line_in_words_with_its_tightest_bound():
    lines = _said(Finding("(11) part 1", 3, 0, 0.25, "a"), Finding("(11) part 2", 4, 0, 0.5, "b"))
    assert lines[:2] == ["layer fc", "A: everything"]
    (line,) = lines[3:]
    assert line.startswith("holds  Prop. 3.1: no estimate") and line.endswith("(7 checks, 25% to spare)")
    assert _said(Finding("(18)", 2, 0, -1e-16, "a"))[-1].endswith("(2 checks, attained)")
    assert _said(Finding("(18)", 2, 0, float("inf"), "a"))[-1].endswith("(2 checks)"), "0 <= 0 says nothing"
    assert _said(Finding("(12)", 2, 0, -1e-16, "a"))[-1].endswith("(2 checks)"), "an identity has nothing to spare"


def test_a_failure_names_the_claim_and_its_worst_instance():
    line = _said(Finding("(13)", 9, 0, -3.0, "a"), Finding("(12)", 5, 2, -0.1, "A, k=3"))[-1]
    assert line.startswith("FAILS  Prop. 3.2") and line.endswith("(2 of 14 checks; worst: (12), A, k=3)")


def test_a_claim_without_words_is_not_hidden():
    assert (
        _said(Finding("my own", 1, 1, -1.0, "here"))[-1]
        == "FAILS  beside these: my own (1 of 1 checks; worst: my own, here)"
    )
