"""The drivers make the optimizers of §6 and appendix D, with Brand where the paper has it."""

import dataclasses

import pytest
import torch
from torch import nn

from kfacerr.exceptions import InputError
from kfacerr.process import Process
from kfacerr.processes import Brand, BrandCorrected, BrandRsvd, Evd, Rsvd
from kfacerr.torch import KFAC, SENG
from studies.config import PAPER_STEPS, TABLE_1, TrainingConfig, table_2
from studies.drivers import Driver, Updates, find_driver
from studies.presets import OPTIMIZER_PRESETS
from studies.training import Training
from tests.studies.helpers import assert_same_weights, tiny_dataset

FAMILY = table_2(PAPER_STEPS)[1:7]


def paper_config(driver: str, T_updt: int = 0) -> TrainingConfig:
    return OPTIMIZER_PRESETS["paper"].training_config(driver, 0, "cpu", T_updt=T_updt)


def paper_optimizer(driver: str, T_updt: int = 0) -> torch.optim.Optimizer:
    """As the paper's run has it, on a network small enough for a test: settings know nothing of the network."""
    config = paper_config(driver, T_updt)
    return find_driver(driver).make_optimizer(nn.Sequential(nn.Linear(3, 2)), config, PAPER_STEPS)


@pytest.mark.parametrize("driver", FAMILY)
def test_what_the_family_shares_is_the_papers(driver: str) -> None:
    optimizer = paper_optimizer(driver)
    assert isinstance(optimizer, KFAC)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"], group["clip"]) == (7e-4, 0.0, 0.07)
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
        hyper = optimizer.schedules.at(epoch, 0)
        settings = hyper.settings
        assert (settings.rank, settings.oversampling, hyper.phi_lambda) == (rank, oversampling, phi)
        assert (settings.rho, settings.n_pwr_it, hyper.T_updt, settings.phi_corct) == (0.95, 4, 25, 0.5)
        assert settings.continuation == "min"
    rate = find_driver(driver).learning_rate
    rates = [rate(paper_config(driver), epoch) for epoch in (0, 2, 3, 13, 18, 27, 40)]
    assert rates == pytest.approx([0.3, 0.2, 0.1, 0.03, 0.01, 0.003, 0.001])


@pytest.mark.parametrize(
    ("driver", "T_updt"), [*((name, 0) for name in FAMILY), *((name, 10) for name in TABLE_1)]
)
def test_the_optimizer_has_the_periods_of_its_driver(driver: str, T_updt: int) -> None:
    optimizer = paper_optimizer(driver, T_updt)
    assert isinstance(optimizer, KFAC)
    assert driver.split()[0] == optimizer.algorithm
    hyper = optimizer.schedules.at(0, 0)
    periods = paper_config(driver, T_updt).periods(PAPER_STEPS)
    assert hyper.T_updt == periods.pop("T_updt")
    assert {name: getattr(hyper.settings, name) for name in periods} == periods


def test_settings_in_a_name_stand() -> None:
    optimizer = paper_optimizer("B-KFAC T_brand=50 rank=61 continuation=trace")
    assert isinstance(optimizer, KFAC)
    settings = optimizer.schedules.at(20, 0).settings
    assert (settings.T_brand, settings.rank, settings.continuation) == (50, 61, "trace")
    assert settings.T_inv == 250


@pytest.mark.parametrize(
    "driver", ["N-KFAC s=5 T_base=50", "N-KFAC rank=3 continuation=trace", "N-KFAC", "W-KFAC"]
)
def test_beyond_the_paper_settings_in_a_name_are_the_measured_layers(driver: str) -> None:
    """N-KFAC's rank in a name truncates, and is no schedule's; it needs a policy."""
    net = nn.Sequential()
    net.add_module("fc0", nn.Linear(40, 30))
    net.add_module("fc1", nn.Linear(30, 10))
    optimizer = find_driver(driver).make_optimizer(net, paper_config(driver), PAPER_STEPS)
    assert isinstance(optimizer, KFAC)
    named = optimizer.layers["fc0"].policy
    assert (named, optimizer.layers["fc1"].policy) == (driver, driver.split()[0])
    settings = optimizer.schedules.at(0, 0).settings
    assert settings.rank == 220
    assert settings.continuation == ("trace" if "trace" in driver else "min")


def test_seng_is_the_supplements() -> None:
    optimizer = paper_optimizer("SENG")
    assert isinstance(optimizer, SENG)
    group = optimizer.param_groups[0]
    assert (group["damping"], group["momentum"], group["weight_decay"]) == (2.0, 0.9, 1e-2)
    assert (optimizer.update_every, optimizer.fim_col_sample_size) == (200, 128)
    config = paper_config("SENG")
    assert find_driver("SENG").learning_rate(config, 0) == 0.05
    assert find_driver("SENG").learning_rate(config, 30) == pytest.approx(0.05 * 0.6**6)


@pytest.mark.parametrize(
    ("driver", "T_updt", "updates"),
    [
        ("SGD", 0, Updates(0, ())),
        ("SENG", 0, Updates(0, (200,))),
        ("K-FAC", 0, Updates(25, (250,))),
        ("R-KFAC T_inv=25", 0, Updates(25, (25,))),
        ("B-KFAC", 0, Updates(25, (250, 125))),
        ("B-KFAC-C", 0, Updates(25, (250, 125, 500))),
        ("B-R-KFAC", 0, Updates(25, (250, 25, 250))),
        ("B-KFAC", 10, Updates(10, (50, 10))),
        ("N-KFAC", 0, Updates(25, (250, 125))),
        ("N-KFAC T_base=50", 10, Updates(10, (50, 50))),
        ("W-KFAC", 0, Updates(25, (250,))),
    ],
)
def test_a_driver_says_when_it_does_what(driver: str, T_updt: int, updates: Updates) -> None:
    assert find_driver(driver).updates(paper_config(driver, T_updt), PAPER_STEPS) == updates


@pytest.mark.parametrize(
    ("updates", "cycle"),
    [(Updates(), 1), (Updates(0, (200,)), 200), (Updates(25, (250, 125)), 250), (Updates(10, (15,)), 30)],
)
def test_a_cycle_is_as_long_as_it_takes_updates_to_repeat(updates: Updates, cycle: int) -> None:
    """Also where one period is no multiple of the other."""
    assert updates.cycle == cycle


def test_a_driver_of_ones_own_has_defaults() -> None:
    own = Driver(lambda model, *_: torch.optim.Adam(model.parameters()), lambda *_: 0.1)
    assert own.updates(TrainingConfig(8, 1), 195) == Updates()


# On the paper's network, small.


def small_training(driver: str, **settings: object) -> Training:
    options = {"width": 1 / 16, "rank_scale": 1 / 40, "batch_size": 8, "epochs": 4}
    preset = dataclasses.replace(OPTIMIZER_PRESETS["digits"], **options)
    config = dataclasses.replace(preset.training_config(driver, 0, "cpu"), **settings)  # type: ignore[arg-type]
    return Training(config, tiny_dataset())


@pytest.mark.parametrize(
    ("driver", "on_fc0"),
    [
        ("K-FAC", Evd),
        ("R-KFAC", Rsvd),
        ("B-KFAC", Brand),
        ("B-KFAC-C", BrandCorrected),
        ("B-R-KFAC", BrandRsvd),
    ],
)
def test_brand_is_on_the_first_fc_layer_and_rsvd_elsewhere(driver: str, on_fc0: type[Process]) -> None:
    training = small_training(driver)
    training.step()
    optimizer = training.optimizer
    assert isinstance(optimizer, KFAC)
    others = Evd if driver == "K-FAC" else Rsvd
    for name, layer in optimizer.layers.items():
        for factor in layer.factors.values():
            (process,) = factor.processes.values()
            assert type(process) is (on_fc0 if name == "fc0" else others)
    assert len(optimizer.layers) == 15  # 13 convolutions, 2 FC layers


def test_equal_rank_gives_r_kfac_the_rank_of_the_brand_variants_on_the_first_fc_layer() -> None:
    optimizer = small_training("R-KFAC", equal_rank=True).optimizer
    assert isinstance(optimizer, KFAC)
    assert optimizer.policy == {"fc0": f"R-KFAC rank={round(220 / 40) + 8}"}
    brand = small_training("B-KFAC", equal_rank=True).optimizer
    assert isinstance(brand, KFAC) and not brand.policy


@pytest.mark.parametrize("driver", ["AdamW", "SENG", "B-KFAC-C", "B-R-KFAC"])
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


def test_a_checkpoint_of_another_rank_is_refused() -> None:
    state = small_training("SGD").state_dict()
    with pytest.raises(InputError, match=r"a run with rank_scale = 0\.025, not 0\.5"):
        small_training("SGD", rank_scale=0.5).load_state_dict(state)
