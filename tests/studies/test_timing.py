"""t_epoch is taken over whole cycles, and what is said of its parts adds up to it."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kfacerr.exceptions import InputError
from studies import timing
from studies.config import TABLE_1, TrainingConfig
from studies.drivers import find_driver
from studies.presets import OPTIMIZER_PRESETS, PRESETS
from studies.timing import measure, parts
from tests.studies.helpers import refused, tiny_dataset


def tiny_config(driver: str) -> TrainingConfig:
    preset = dataclasses.replace(OPTIMIZER_PRESETS["digits"], width=1 / 32, batch_size=8, rank_scale=1 / 40)
    return preset.training_config(driver, 0, "cpu")


@pytest.mark.parametrize(
    ("driver", "working"),
    [
        ("SGD", {"forward/backward", "step", "other"}),
        ("K-FAC", {"forward/backward", "step", "other", "decomposition"}),
        ("SENG", {"forward/backward", "step", "other", "decomposition"}),
    ],
)
def test_the_parts_of_a_step_add_up_to_it(driver: str, working: set[str]) -> None:
    """With three steps an epoch every step updates the factors."""
    config = tiny_config(driver)
    timed = measure(config, tiny_dataset(24), 0)
    assert set(timed.parts) == working
    assert sum(timed.parts.values()) == pytest.approx(timed.t_epoch, rel=1e-6)
    assert timed.steps % find_driver(driver).updates(config, 3).cycle == 0


def test_what_heavier_steps_take_beyond_lighter_ones_is_theirs() -> None:
    plain, update, heavy = [10.0, 2.0, 1.0], [11.0, 4.0, 1.0], [11.0, 9.0, 1.0]
    laps = np.array([plain, plain, update, plain, heavy, plain])
    expected = {"forward/backward": 60, "step": 12, "other": 6, "EA update": 2 * 3, "decomposition": 5}
    assert parts(laps, [0, 0, 1, 0, 2, 0]) == expected
    assert sum(expected.values()) == laps.sum()


def test_where_all_updates_decompose_both_are_decomposition() -> None:
    laps = np.array([[1.0, 1.0, 1.0], [2.0, 5.0, 1.0]])
    assert parts(laps, [0, 2]) == {"forward/backward": 2, "step": 2, "other": 2, "decomposition": 5}


def test_where_all_steps_are_alike_nothing_is_told_apart() -> None:
    assert parts(np.ones((4, 3)), [2, 2, 2, 2]) == {"forward/backward": 4, "step": 4, "other": 4}


def test_what_was_timed_otherwise_is_refused(tmp_path: Path) -> None:
    config = tiny_config("SGD")
    timing.time_drivers([config], tiny_dataset(24), 1, tmp_path)
    other = dataclasses.replace(config, batch_size=4)
    with pytest.raises(InputError, match="another configuration"):
        timing.time_drivers([other], tiny_dataset(24), 1, tmp_path)


def test_table_1s_algorithms_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dataclasses.replace(
        PRESETS["digits"], n_train=24, width=1 / 64, batch_size=8, window_epochs=(1,), rank_scale=1 / 40
    )
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    assert timing.main(["--preset", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]) == 0
    times = pd.read_csv(tmp_path / "timing.csv")
    assert list(times.columns) == ["table", "driver", "round", "steps", "t_epoch"]
    assert list(times.driver) == list(TABLE_1) and (times.table == 1).all()
    assert dict(zip(times.driver, times.steps, strict=True)) == dict.fromkeys(TABLE_1, 50) | {
        "R-KFAC T_inv=10": 10
    }
    split = pd.read_csv(tmp_path / "breakdown.csv").groupby("driver").seconds.sum()
    np.testing.assert_allclose(split[times.driver], times.t_epoch, rtol=1e-6)


def test_no_round_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--preset", "digits", "--rounds", 0, "--out", tmp_path / "out")
    assert "--rounds must be at least 1" in refused(capsys, timing.main, *options)
    assert not (tmp_path / "out").exists()
