"""What an error study says of its cost, in advance and while it runs."""

import pytest
import torch

from studies.forecast import Pace, Sizes, Speeds, update_seconds, window_seconds

SIZES = Sizes(d_A=16385, d_G=2048, n=256, rank=220, inverses=18)


def test_the_papers_layer_costs_what_was_measured():
    """With the speeds of one thread of a CPU: 65 s of Cholesky and 50 s of products an update."""
    speeds = Speeds(gemm=90e9, cholesky=60e9)
    assert update_seconds(SIZES, speeds) == pytest.approx(120, rel=0.2)
    assert window_seconds(SIZES, speeds, 300, 30) == pytest.approx(90 * 60, rel=0.2)
    assert window_seconds(SIZES, speeds, 1, 0) == pytest.approx(6, rel=0.2)


def test_speeds_are_measured_in_flops_a_second():
    speeds = Speeds.measured(torch.float32, torch.device("cpu"))
    assert all(1e8 < speed < 1e15 for speed in speeds)


def test_the_time_left_is_by_kind_of_iteration():
    pace = Pace({"heavy": 100.0})
    assert pace.seconds([("plain", 10)]) == 0  # nothing is known yet
    pace.took("plain", 1.0)
    pace.took("plain", 3.0)
    assert pace.seconds([("plain", 5), ("heavy", 2)]) == 5 * 2 + 2 * 100
    pace.took("heavy", 50.0)
    assert pace.seconds([("plain", 5), ("heavy", 2)]) == 5 * 2 + 2 * 50
    assert pace.seconds([("unknown", 3)]) == 54.0  # the mean of the three
