"""What the tests of the studies share: a data set of noise, and a network small enough to train in a test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from studies.config import TrainingConfig
from studies.images import Dataset
from studies.training import Training


def tiny_dataset(n_train: int = 27, mirrored: bool = True) -> Dataset:
    """Images (n_train + 10, 3, 32, 32) of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n_train + 10, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n_train + 10) % 10
    train, test = (images[:n_train], labels[:n_train]), (images[n_train:], labels[n_train:])
    return Dataset("tiny", *train, *test, tuple("0123456789"), mirrored)


def tiny_training(dataset: Dataset | None = None, **settings: Any) -> Training:
    """Three steps an epoch; of 27 images, the last three of each epoch's permutation are dropped."""
    options = {"batch_size": 8, "epochs": 4, "width": 1 / 32, "device": "cpu"} | settings
    return Training(TrainingConfig(**options), dataset or tiny_dataset())


def weights(training: Training) -> list[Tensor]:
    """Copies of everything that the model holds."""
    return [value.clone() for value in training.model.state_dict().values()]


def assert_same_weights(one: Training, other: Training) -> None:
    """Bitwise."""
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *options: object) -> str:
    """The one line on stderr of a command that exits with status 2."""
    capsys.readouterr()
    try:
        status: object = main([str(option) for option in options])
    except SystemExit as stop:  # argparse's way
        status = stop.code
    line = capsys.readouterr().err
    assert status == 2
    assert line.count("\n") == 1 and line.endswith("\n")
    return line
