"""The table of a step's error from a split with known answers."""

import pandas as pd
import pytest

from figures.ekfac import KEYS, LINKS, figure, means, report


def split() -> pd.DataFrame:
    """Two recordings, in one of which all is twice as large; "damping" makes up for others."""
    rows = []
    for recording, factor in (("one", 1.0), ("two", 2.0)):
        for algorithm in ("K-FAC", "B-KFAC"):
            for i, link in enumerate((*LINKS, "total")):
                share = {"damping": -0.5, "Kronecker": 1.5, "total": 1.0}.get(link, 0.0)
                rows.append((recording, 8, algorithm, link, factor * (i + 1), share, 0.1 * factor / (i + 1)))
    return pd.DataFrame(rows, columns=KEYS)


def test_means_are_over_the_recordings():
    mean = means(split()).set_index(["algorithm", "link"])
    assert mean.norm["B-KFAC", "staleness"] == 1.5 and mean.norm["K-FAC", "Kronecker"] == 7.5
    assert mean.share["K-FAC", "damping"] == -0.5


def test_a_report_has_a_row_an_algorithm_and_what_is_left():
    lines = [" ".join(line.split()) for line in report(means(split())).splitlines()]
    cells = "1.5 (0%) | 3 (0%) | 4.5 (-50%) | 6 (0%) | 7.5 (150%) | 9 | 0.025"
    assert f"| K-FAC | 8 | {cells} |" in lines and f"| B-KFAC | 8 | {cells} |" in lines
    assert "| 8 | 0.05 | 0.037 | 0.03 |" in lines or "| 8 | 0.05 | 0.038 | 0.03 |" in lines


def test_shares_are_stacked_on_both_sides_of_zero():
    right = figure(means(split())).axes[1]
    ends = [bar.get_x() + bar.get_width() for bar in right.patches if bar.get_width()]
    assert sorted(set(ends)) == pytest.approx([-0.5, 1.5])
