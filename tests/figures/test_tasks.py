"""Tables of the study of tasks, from tables that are written by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from figures.tasks import correlations, summary

EPOCHS = 4


def trials() -> pd.DataFrame:
    """AdamW falls to 1, "slow" to 0.5 at four times the time a step, "wild" diverges in one seed of three."""
    rows = []
    for name, scale in (("AdamW", 1.0), ("slow", 0.5), ("wild", 2.0)):
        for lr in (0.1, 0.3, 1.0):
            rows += [(name, lr, 0, "tune", e, scale * lr, 1.0, 0.5) for e in range(1, EPOCHS + 1)]
        for seed in (1, 2, 3):
            ends = 2 if name == "wild" and seed == 3 else EPOCHS
            for epoch in range(1, ends + 1):
                loss = math.inf if ends < EPOCHS and epoch == ends else scale * seed / 2 * EPOCHS / epoch
                rows.append((name, 0.1, seed, "final", epoch, loss, 1.0, 0.5))
    columns = ["optimizer", "lr", "seed", "stage", "epoch", "train_loss", "test_loss", "test_accuracy"]
    return pd.DataFrame(rows, columns=columns).assign(task="one")


def times() -> pd.DataFrame:
    rows = [("one", name, r, 100, ms) for name, ms in (("AdamW", 10.0), ("slow", 40.0)) for r in range(3)]
    return pd.DataFrame(rows, columns=["task", "optimizer", "round", "steps", "ms_per_step"])


def test_the_least_median_loss_of_the_finals_comes_first() -> None:
    table = summary(trials())
    assert list(table.optimizer) == ["slow", "AdamW", "wild"]
    assert list(table.train_loss) == [0.5, 1.0, 2.0], "a seed that diverged is the greatest of three"
    assert list(table.train_high) == [0.75, 1.5, math.inf] and list(table.train_low) == [0.25, 0.5, 1.0]
    assert (table.rates == 3).all() and table.edge.all() and (table.lr == 0.1).all()


def test_in_equal_time_only_epochs_that_have_ended_count() -> None:
    """AdamW's run takes a second, in which "slow" has done one epoch of four, with twice the loss of AdamW."""
    table = summary(trials(), times()).set_index("optimizer")
    assert table.seconds["AdamW"] == pytest.approx(1.0) and table.seconds["slow"] == pytest.approx(4.0)
    assert table.loss_in_time["AdamW"] == 1.0 and table.loss_in_time["slow"] == 2.0
    assert table.seconds_to["AdamW"] == pytest.approx(1.0)
    assert table.seconds_to["slow"] == pytest.approx(2.0), "0.5 * 4 / 2 = 1 after two epochs"
    assert math.isnan(table.seconds["wild"]), "that was not timed"


def errors(values: np.ndarray, losses: np.ndarray) -> pd.DataFrame:
    frame = pd.DataFrame({"mean": values, "train_loss": losses, "seed": range(len(values))})
    return frame.assign(task="one", optimizer="R-KFAC", lr=np.where(frame.seed < 10, 0.1, 0.3), metric="step_norm")


def test_a_monotone_relation_has_rank_correlation_one_and_a_random_one_a_large_p() -> None:
    rng = np.random.default_rng(0)
    finals = pd.DataFrame({"task": ["one"], "optimizer": ["R-KFAC"], "lr": [0.1]})
    x = rng.random(20)
    table = correlations(errors(x, np.exp(5 * x)), finals).set_index("runs")
    assert list(table.n) == [20, 10] and table.spearman.to_numpy() == pytest.approx([1.0, 1.0])
    assert (table.p < 0.001).all()
    table = correlations(errors(x, rng.random(20)), finals).set_index("runs")
    assert abs(table.spearman["all"]) < 0.5 and table.p["all"] > 0.05


def test_p_is_that_of_all_permutations_where_there_are_few() -> None:
    """Of 4! = 24 orders two have |rho| = 1."""
    finals = pd.DataFrame({"task": [], "optimizer": [], "lr": []})
    (row,) = correlations(errors(np.arange(4.0), np.arange(4.0)), finals).itertuples()
    assert (row.runs, row.n, row.spearman) == ("all", 4, pytest.approx(1.0))
    assert row.p == pytest.approx(2 / 24)


def test_what_diverged_is_left_out_and_of_too_few_or_constants_nothing_is_said() -> None:
    finals = pd.DataFrame({"task": [], "optimizer": [], "lr": []})
    few = errors(np.arange(5.0), np.array([1.0, 2.0, 3.0, math.inf, math.inf]))
    (row,) = correlations(few, finals).itertuples()
    assert row.n == 3 and math.isnan(row.spearman) and math.isnan(row.p)
    (row,) = correlations(errors(np.ones(9), np.arange(9.0)), finals).itertuples()
    assert row.n == 9 and math.isnan(row.spearman)


def test_runs_that_are_the_same_to_the_bit_count_once() -> None:
    finals = pd.DataFrame({"task": [], "optimizer": [], "lr": []})
    one = errors(np.arange(9.0), np.arange(9.0))
    (row,) = correlations(pd.concat([one, one.assign(optimizer="B-KFAC")], ignore_index=True), finals).itertuples()
    assert row.n == 9
