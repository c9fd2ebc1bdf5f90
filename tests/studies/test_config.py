"""What is run is the paper's (§4.2, §6, appendix D) at its own size, and keeps its proportions at any other."""

import dataclasses
import math
from typing import Any

import pytest

from kfacerr.algorithms import SEVEN
from kfacerr.exceptions import InputError
from studies.config import (
    PAPER_STEPS,
    TABLE_1,
    Schedules,
    TrainingConfig,
    cosine_learning_rate,
    family,
    seng_learning_rate,
    table_2,
    update_period,
)

PAPER = Schedules()

# Schedules (§6), number by number.


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        *((0, 0.3), (1, 0.3), (2, 0.2), (3, 0.1), (12, 0.1), (13, 0.03), (17, 0.03)),
        *((18, 0.01), (26, 0.01), (27, 0.003), (39, 0.003), (40, 0.001), (49, 0.001)),
    ],
)
def test_the_papers_learning_rate_drops_at_its_epochs(epoch: int, rate: float) -> None:
    assert PAPER.learning_rate(epoch) == rate


@pytest.mark.parametrize(("epoch", "phi"), [(0, 0.1), (24, 0.1), (25, 0.05), (34, 0.05), (35, 0.01), (49, 0.01)])
def test_the_papers_damping_ratio_drops_at_its_epochs(epoch: int, phi: float) -> None:
    assert PAPER.phi(epoch) == phi


@pytest.mark.parametrize(
    ("epoch", "rank", "oversampling"),
    [(0, 220, 10), (14, 220, 10), (15, 230, 10), (21, 230, 10), (22, 230, 11), (29, 230, 11), (30, 230, 12)],
)
def test_the_papers_rank_and_oversampling_grow_at_their_epochs(epoch: int, rank: int, oversampling: int) -> None:
    assert (PAPER.rank(epoch), PAPER.oversampling(epoch)) == (rank, oversampling)


def test_schedules_are_read_at_the_papers_epoch_and_ranks_are_scaled() -> None:
    schedules = Schedules(epochs=10, rank_scale=1 / 8)
    assert [schedules.paper_epoch(epoch) for epoch in (0, 3, 9)] == [0, 15, 45]
    assert [schedules.rank(epoch) for epoch in (0, 3)] == [28, 29]
    assert schedules.learning_rate(3) == 0.03
    config = TrainingConfig(32, 10, rank_scale=1 / 8)
    assert config.schedules == schedules
    assert dataclasses.replace(config, schedule_epochs=20).schedules == Schedules(20, 1 / 8)


def test_the_cosine_starts_at_its_peak_halves_midway_and_ends_at_0() -> None:
    rates = [cosine_learning_rate(epoch, 10, 0.4) for epoch in (0, 5, 10)]
    assert rates == pytest.approx([0.4, 0.2, 0.0], abs=1e-15)


def test_sengs_rate_is_the_supplements() -> None:
    assert seng_learning_rate(0, 0.05) == 0.05
    assert seng_learning_rate(30, 0.05) == pytest.approx(0.05 * 0.6**6)
    assert seng_learning_rate(80, 0.05) == 0


# Drivers and their periods.

PAPERS_PERIODS = [
    (0, "K-FAC", {"T_inv": 250}),
    (0, "R-KFAC", {"T_inv": 250}),
    (0, "R-KFAC T_inv=25", {"T_inv": 25}),
    (0, "B-KFAC", {"T_inv": 250, "T_brand": 125}),
    (0, "B-KFAC-C", {"T_inv": 250, "T_brand": 125, "T_corct": 500}),
    (0, "B-R-KFAC", {"T_inv": 250, "T_brand": 25, "T_rsvd": 250}),
    (10, "K-FAC T_inv=50", {"T_inv": 50}),
    (10, "R-KFAC T_inv=50", {"T_inv": 50}),
    (10, "R-KFAC T_inv=10", {"T_inv": 10}),
    (10, "R-KFAC T_inv=300", {"T_inv": 300}),
    (10, "B-KFAC", {"T_inv": 50, "T_brand": 10}),
    (10, "B-KFAC-C", {"T_inv": 50, "T_brand": 10, "T_corct": 50}),
    (10, "B-R-KFAC", {"T_inv": 50, "T_brand": 10, "T_rsvd": 50}),
]


@pytest.mark.parametrize(("T_updt", "driver", "periods"), PAPERS_PERIODS)
def test_periods_are_the_papers(T_updt: int, driver: str, periods: dict[str, int]) -> None:
    """T_updt = 0: §6's; 10: §4.2's, which are not scaled."""
    config = TrainingConfig(256, 50, driver=driver, T_updt=T_updt)
    found = config.periods(PAPER_STEPS)
    assert found["T_updt"] == (T_updt or 25)
    assert {name: found[name] for name in periods} == periods
    if T_updt:
        assert config.periods(44) == found


@pytest.mark.parametrize(("steps", "period"), [(195, 25), (156, 20), (312, 40), (44, 6), (3, 1), (1, 1)])
def test_the_update_period_keeps_its_share_of_an_epoch(steps: int, period: int) -> None:
    assert update_period(steps) == period


@pytest.mark.parametrize("steps", [1, 3, 44, 156, 195, 1000])
def test_all_periods_keep_their_ratios_exactly(steps: int) -> None:
    u = update_period(steps)
    scaled = TrainingConfig(8, 1, driver="B-KFAC-C").periods(steps)
    assert scaled == {"T_updt": u, "T_inv": 10 * u, "T_brand": 5 * u, "T_rsvd": 10 * u, "T_corct": 20 * u}
    assert TrainingConfig(8, 1, driver="B-R-KFAC").periods(steps)["T_brand"] == u
    assert TrainingConfig(8, 1, driver="SENG").seng_period(steps) == 8 * u


def test_tables_name_the_drivers_as_the_algorithms_and_table_2_the_period_that_runs() -> None:
    assert set(TABLE_1) == set(SEVEN) - {"R-KFAC T_inv=300"}
    kfac = ("K-FAC", "R-KFAC", "R-KFAC T_inv=25", "B-KFAC", "B-KFAC-C", "B-R-KFAC")
    assert table_2(PAPER_STEPS) == ("SENG", *kfac, "SGD", "AdamW")
    assert table_2(156)[3] == "R-KFAC T_inv=20"
    for name in (*TABLE_1, *table_2(156)):
        algorithm = family(name)
        assert str(algorithm) == name if algorithm else name in ("SENG", "SGD", "AdamW")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam", "no driver is called 'adam': it is none of AdamW, SENG, SGD; algorithm 'adam'"),
        ("FD", "no driver is called 'FD': it is none of AdamW, SENG, SGD, K-FAC, R-KFAC"),
        ("R-KFAC T_inv=0", "T_inv must be a whole number of at least 1"),
    ],
)
def test_an_unknown_driver_is_named_among_those_there_are(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        family(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"width": math.nan}, "width must be positive"),
        ({"seed": -1}, "seed must not be negative"),
        ({"T_updt": -1}, "T_updt must not be negative"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingConfig(**({"batch_size": 8, "epochs": 1} | settings))
