"""The tables of the comparison of sketches, from errors with known answers."""

import pandas as pd
import pytest

from figures.sketches import equal, means, report
from kfacerr.metrics import METRICS

SPENT = {
    "B-KFAC rank=4": (12, 4, 100.0, 50.0),
    "N-KFAC s=12": (12, 12, 200.0, 80.0),
    "N-KFAC s=6": (6, 6, 99.0, 49.0),
}


def errors() -> pd.DataFrame:
    rows = []
    for name, (rank, columns, memory, flops) in SPENT.items():
        for draw, off in ((0, 0.9), (1, 1.1)) if name[0] == "N" else ((0, 1.0),):
            for epoch in (8, 15):
                value = off * (2.0 if name[0] == "B" else 0.5) * epoch
                rows.append(
                    (
                        "real",
                        "float64",
                        name,
                        name.split()[0],
                        rank,
                        columns,
                        memory,
                        flops,
                        "min",
                        draw,
                        epoch,
                        *[value] * 4,
                    )
                )
    spent = ["rank", "columns", "memory", "flops"]
    return pd.DataFrame(
        rows,
        columns=["recording", "dtype", "algorithm", "role", *spent, "continuation", "draw", "epoch", *METRICS],
    )


def test_means_are_over_windows_and_draws_and_the_spread_is_a_draws():
    table = means(errors()).set_index("algorithm")
    assert table.inverse_A.to_dict() == pytest.approx(
        {"B-KFAC rank=4": 23.0, "N-KFAC s=12": 5.75, "N-KFAC s=6": 5.75}
    )
    assert table.spread.to_dict() == pytest.approx({"B-KFAC rank=4": 0.0, "N-KFAC s=12": 0.1, "N-KFAC s=6": 0.1})


def test_what_is_equal_spends_no_more_and_nearly_as_much():
    """Nothing carries 4 columns, and 6 modes are no rank of 12."""
    found = {kind: (brand.algorithm, sketch.algorithm) for kind, brand, sketch in equal(means(errors()))}
    small = ("B-KFAC rank=4", "N-KFAC s=6")
    assert found == {"rank": ("B-KFAC rank=4", "N-KFAC s=12"), "memory": small, "flops": small}
    text = report(means(errors()))
    assert text.count("|     4 |     4 |     4 |     4 |") == 3
