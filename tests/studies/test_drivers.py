"""The drivers are the paper's (§6, §4.2, appendix D) at its own size, and keep its proportions at any other."""

import pytest
import torch
from torch import nn

from kfacerr.exceptions import InputError
from kfacerr.process import Process
from kfacerr.processes import Brand, BrandCorrected, BrandRsvd, Evd, Rsvd
from kfacerr.torch import KFAC
from kfacerr.torch.seng import SENG
from studies.drivers import (
    DRIVERS,
    KFAC_TABLE_1,
    KFAC_TABLE_2,
    PAPER_STEPS,
    TABLE_1,
    TABLE_2,
    Driver,
    find_driver,
    update_period,
)
from studies.presets import OPTIMIZER_PRESETS
from studies.training import Training, TrainingConfig
from tests.studies.test_training import assert_same_weights, tiny_dataset


def paper_config(driver: str) -> TrainingConfig:
    return OPTIMIZER_PRESETS["paper"].training_config(driver, 0, "cpu")


def paper_optimizer(driver: str) -> torch.optim.Optimizer:
    """As the paper's run has it, on a network small enough for a test: settings know nothing of the network."""
    return DRIVERS[driver].make_optimizer(nn.Sequential(nn.Linear(3, 2)), paper_config(driver), PAPER_STEPS)


def test_the_tables_drivers_exist() -> None:
    assert set(TABLE_2) | set(TABLE_1) <= set(DRIVERS)
    assert set(KFAC_TABLE_2) == set(TABLE_2) - {"sgd", "adamw", "seng"}
    assert set(KFAC_TABLE_1) >= set(TABLE_1)


# Section 6, number by number.


@pytest.mark.parametrize("driver", KFAC_TABLE_2)
def test_what_the_family_shares_is_the_papers(driver: str) -> None:
    optimizer = paper_optimizer(driver)
    assert isinstance(optimizer, KFAC)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"], group["clip"]) == (7e-4, 0.0, 0.07)
    assert optimizer.continuation == "min"
    for epoch, rank, oversampling, phi in (
        (0, 220, 10, 0.1),
        (14, 220, 10, 0.1),
        (15, 230, 10, 0.1),
        (22, 230, 11, 0.1),
        (25, 230, 11, 0.05),
        (30, 230, 12, 0.05),
        (35, 230, 12, 0.01),
        (49, 230, 12, 0.01),
    ):
        hyper = optimizer.schedules.at(epoch)
        assert (hyper.rank, hyper.oversampling, hyper.phi_lambda) == (rank, oversampling, phi)
        assert (hyper.rho, hyper.n_pwr_it, hyper.T_updt, hyper.phi_corct) == (0.95, 4, 25, 0.5)
    rates = [DRIVERS[driver].learning_rate(paper_config(driver), epoch) for epoch in (0, 2, 3, 13, 18, 27, 40)]
    assert rates == pytest.approx([0.3, 0.2, 0.1, 0.03, 0.01, 0.003, 0.001])


@pytest.mark.parametrize(
    ("driver", "algorithm", "periods"),
    [
        ("k-fac", "K-FAC", {"T_inv": 250}),
        ("r-kfac", "R-KFAC", {"T_inv": 250}),
        ("r-kfac-short", "R-KFAC", {"T_inv": 25}),
        ("b-kfac", "B-KFAC", {"T_inv": 250, "T_brand": 125}),
        ("b-kfac-c", "B-KFAC-C", {"T_inv": 250, "T_brand": 125, "T_corct": 500}),
        ("b-r-kfac", "B-R-KFAC", {"T_inv": 250, "T_brand": 25, "T_rsvd": 250}),
        ("K-FAC T_inv=50", "K-FAC", {"T_updt": 10, "T_inv": 50}),
        ("R-KFAC T_inv=50", "R-KFAC", {"T_updt": 10, "T_inv": 50}),
        ("R-KFAC T_inv=10", "R-KFAC", {"T_updt": 10, "T_inv": 10}),
        ("B-KFAC", "B-KFAC", {"T_updt": 10, "T_inv": 50, "T_brand": 10}),
        ("B-KFAC-C", "B-KFAC-C", {"T_updt": 10, "T_inv": 50, "T_brand": 10, "T_corct": 50}),
        ("B-R-KFAC", "B-R-KFAC", {"T_updt": 10, "T_inv": 50, "T_brand": 10, "T_rsvd": 50}),
    ],
)
def test_periods_are_the_papers(driver: str, algorithm: str, periods: dict[str, int]) -> None:
    optimizer = paper_optimizer(driver)
    assert isinstance(optimizer, KFAC)
    assert optimizer.algorithm == algorithm
    hyper = optimizer.schedules.at(0)
    assert {name: getattr(hyper, name) for name in periods} == periods


def test_seng_is_the_supplements() -> None:
    optimizer = paper_optimizer("seng")
    assert isinstance(optimizer, SENG)
    group = optimizer.param_groups[0]
    assert (group["damping"], group["momentum"], group["weight_decay"]) == (2.0, 0.9, 1e-2)
    assert (optimizer.update_every, optimizer.fim_col_sample_size) == (200, 128)
    config = paper_config("seng")
    assert DRIVERS["seng"].learning_rate(config, 0) == 0.05
    assert DRIVERS["seng"].learning_rate(config, 30) == pytest.approx(0.05 * 0.6**6)


# Smaller runs.


@pytest.mark.parametrize(("steps", "period"), [(195, 25), (156, 20), (312, 40), (44, 6), (3, 1), (1, 1)])
def test_the_update_period_keeps_its_share_of_an_epoch(steps: int, period: int) -> None:
    assert update_period(steps) == period


@pytest.mark.parametrize("steps", [1, 3, 44, 156, 195, 1000])
def test_all_periods_keep_their_ratios_exactly(steps: int) -> None:
    u = update_period(steps)
    scaled = KFAC_TABLE_2["b-kfac-c"].scaled(steps)
    assert (scaled.T_updt, scaled.T_inv, scaled.T_brand, scaled.T_corct) == (u, 10 * u, 5 * u, 20 * u)
    assert DRIVERS["b-kfac-c"].cycle(steps) == 20 * u
    assert DRIVERS["seng"].cycle(steps) == 8 * u


def test_table_1s_periods_are_not_scaled() -> None:
    """The error study's presets all have T_updt = 10."""
    optimizer = DRIVERS["B-KFAC"].make_optimizer(nn.Sequential(nn.Linear(3, 2)), paper_config("B-KFAC"), 44)
    assert isinstance(optimizer, KFAC)
    assert optimizer.schedules.at(0).T_updt == 10


def test_schedules_are_read_at_the_papers_epoch_and_ranks_are_scaled() -> None:
    config = TrainingConfig(32, 10, driver="r-kfac", learning_rate=0.1, rank_scale=1 / 8, schedule_epochs=10)
    assert [config.paper_epoch(epoch) for epoch in (0, 3, 9)] == [0, 15, 45]
    assert DRIVERS["r-kfac"].learning_rate(config, 3) == pytest.approx(0.03 / 3)
    optimizer = DRIVERS["r-kfac"].make_optimizer(nn.Sequential(nn.Linear(3, 2)), config, 44)
    assert isinstance(optimizer, KFAC)
    assert [optimizer.schedules.at(epoch).rank for epoch in (0, 3)] == [28, 29]


def test_learning_rates_scale_with_the_root_of_the_batch() -> None:
    preset = OPTIMIZER_PRESETS["cifar10-small"]
    assert preset.training_config("sgd", 0, "cpu").learning_rate == pytest.approx(0.1 / 2)
    assert preset.training_config("k-fac", 0, "cpu").learning_rate == pytest.approx(0.3 / 2)
    assert preset.training_config("adamw", 0, "cpu").learning_rate == 1e-3


# On the paper's network, small.


def small_training(driver: str, **settings: object) -> Training:
    own = dict(find_driver(driver).settings)
    options = {"batch_size": 8, "epochs": 4, "width": 1 / 16, "rank_scale": 1 / 40, "device": "cpu"}
    return Training(TrainingConfig(**(options | own | settings), driver=driver), tiny_dataset())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("driver", "on_fc0"),
    [
        ("k-fac", Evd),
        ("r-kfac", Rsvd),
        ("b-kfac", Brand),
        ("b-kfac-c", BrandCorrected),
        ("b-r-kfac", BrandRsvd),
    ],
)
def test_brand_is_on_the_first_fc_layer_and_rsvd_elsewhere(driver: str, on_fc0: type[Process]) -> None:
    training = small_training(driver)
    training.step()
    optimizer = training.optimizer
    assert isinstance(optimizer, KFAC)
    others = Evd if driver == "k-fac" else Rsvd
    for name, layer in optimizer.layers.items():
        for factor in layer.factors.values():
            assert type(factor.process) is (on_fc0 if name == "fc0" else others)
    assert len(optimizer.layers) == 15  # 13 convolutions, 2 FC layers


def test_equal_rank_gives_r_kfac_the_rank_of_the_brand_variants_on_the_first_fc_layer() -> None:
    optimizer = small_training("r-kfac", equal_rank=True).optimizer
    assert isinstance(optimizer, KFAC)
    assert optimizer.policy == {"fc0": f"R-KFAC rank={round(220 / 40) + 8}"}
    brand = small_training("b-kfac", equal_rank=True).optimizer
    assert isinstance(brand, KFAC) and not brand.policy


@pytest.mark.parametrize("driver", ["adamw", "seng", "b-kfac-c", "b-r-kfac"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(driver: str) -> None:
    whole, first, second = (small_training(driver) for _ in range(3))
    for _ in range(5):
        whole.step()
    for _ in range(2):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.step()
    assert_same_weights(whole, second)


def test_a_checkpoint_from_before_a_setting_existed_is_of_its_default() -> None:
    first, second, other = small_training("sgd"), small_training("sgd"), small_training("sgd", rank_scale=0.5)
    state = first.state_dict()
    del state["identity"]["continuation"]
    second.load_state_dict(state)
    with pytest.raises(InputError, match=r"a run with rank_scale = 0\.025, not 0\.5"):
        other.load_state_dict(state)


def test_an_unknown_driver_is_named_among_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no driver is called 'adam'; there are: .*adamw, b-kfac"):
        find_driver("adam")


def test_a_driver_of_ones_own_has_defaults() -> None:
    own = Driver(lambda model, *_: torch.optim.Adam(model.parameters()), lambda *_: 0.1)
    assert dict(own.settings) == {} and own.cycle(195) == 250
