"""The presets have the paper's numbers at its size, and its proportions at theirs."""

import dataclasses
import json

import pytest

from kfacerr.algorithms import SEVEN
from studies.config import PAPER_STEPS, table_2
from studies.presets import OPTIMIZER_PRESETS, PRESETS, OptimizerPreset, Preset


def test_learning_rates_scale_with_the_root_of_the_batch() -> None:
    preset = OPTIMIZER_PRESETS["cifar10-small"]
    assert preset.training_config("SGD", 0, "cpu").learning_rate == pytest.approx(0.1 / 2)
    assert preset.training_config("K-FAC", 0, "cpu").learning_rate == pytest.approx(0.3 / 2)
    assert preset.training_config("AdamW", 0, "cpu").learning_rate == 1e-3


def test_rates_are_the_papers() -> None:
    preset = OPTIMIZER_PRESETS["paper"]
    for name in table_2(PAPER_STEPS)[1:7]:
        config = preset.training_config(name, 0, "cpu")
        assert (config.learning_rate, config.weight_decay, config.momentum) == (0.3, 7e-4, 0.0)
    config = preset.training_config("SENG", 0, "cpu")
    assert (config.learning_rate, config.weight_decay, config.momentum) == (0.05, 1e-2, 0.9)


def test_the_papers_layer_has_the_papers_sizes() -> None:
    preset, paper = PRESETS["paper-layer"], PRESETS["paper"]
    assert preset.setting == paper.setting == "FC layer 16384-2048, n = 256, r = 230"
    assert [preset.schedules.rank(epoch) for epoch in (0, 14, 15, 30)] == [220, 220, 230, 230]
    assert preset.windows(195) == paper.windows(195) == [(2930, 300, 15), (5850, 300, 30)]
    measured = [str(a) for a in preset.algorithms if a.get("continuation") is None]
    others = "R-KFAC T_inv=50 rank=486", "R-KFAC T_inv=300 rank=486", "N-KFAC", "W-KFAC T_inv=50"
    assert measured == [*SEVEN, *others]
    assert {a.get("continuation") for a in preset.algorithms} == {None, "trace"}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_an_error_study_measures_the_seven_and_r_kfac_at_the_rank_of_the_brand_variants(preset: Preset) -> None:
    names = [str(algorithm) for algorithm in preset.algorithms]
    assert len(set(names)) == len(names) and set(SEVEN) <= set(names)
    rank = preset.schedules.rank(preset.window_epochs[0]) + preset.batch_size
    assert f"R-KFAC T_inv=50 rank={rank} continuation=trace" in names
    config = preset.training_config("R-KFAC T_inv=50", 0, 195, "cpu")
    assert config.schedules == preset.schedules and config.T_updt == preset.T_updt
    assert json.loads(json.dumps(dataclasses.asdict(preset)))["name"] == preset.name


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_window_lies_within_one_phi_one_rank_and_one_oversampling(preset: Preset) -> None:
    steps = (preset.n_train or {"digits": 1437, "cifar10": 50_000}[preset.dataset]) // preset.batch_size
    of = preset.schedules
    for window, paper_epoch in zip(preset.windows(steps), (15, 30), strict=True):
        epochs = range(window.start // steps, (window.start + window.length - 1) // steps + 1)
        assert len({(of.phi(epoch), of.rank(epoch), of.oversampling(epoch)) for epoch in epochs}) == 1
        assert of.phi(epochs[0]) == PRESETS["paper"].schedules.phi(paper_epoch)


def test_the_papers_preset_is_section_6() -> None:
    paper = OPTIMIZER_PRESETS["paper"]
    assert (paper.width, paper.batch_size, paper.epochs, len(paper.seeds)) == (1.0, 256, 50, 10)
    assert (paper.n_train, paper.n_test, paper.rank_scale) == (None, None, 1.0)
    assert paper.targets == (0.91, 0.93, 0.935)


@pytest.mark.parametrize("preset", OPTIMIZER_PRESETS.values(), ids=OPTIMIZER_PRESETS)
def test_targets_ascend_and_configurations_can_be_written(preset: OptimizerPreset) -> None:
    assert list(preset.targets) == sorted(set(preset.targets))
    assert json.loads(json.dumps(dataclasses.asdict(preset)))["name"] == preset.name
    for driver in table_2(156):
        preset.training_config(driver, 0, "cpu")
