"""What is trained on: small networks and data that are on every machine, each a run of a few hundred steps.

`TASKS` are those of the report. `SEARCH` are others, on which the default settings of `KFAC` may be chosen:
nothing in the report was tuned on what it reports. Data that are drawn are the same for every seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.data import load_cifar10
from studies.tasks.models import Transformer, autoencoder, convnet, mlp

__all__ = ["SEARCH", "TASKS", "Data", "Source", "Task"]


class Data(NamedTuple):
    """Inputs and targets, in memory.

    Attributes:
        name: as results are to quote it.
        train: inputs and targets, (N, ...) each.
        test: the same of the test set.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Source(NamedTuple):
    """Where data come from that must be given.

    Attributes:
        folder: see `studies.data.load_cifar10`; None for its other places, without a download.
        accept_modified: take images that are not the official ones.
    """

    folder: Path | None = None
    accept_modified: bool = False


Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, its data, and how long it is trained.

    Attributes:
        name: of the task.
        data: makes the data.
        model: makes the network, with weights from torch's global generator.
        loss: of outputs and targets, a mean over the batch.
        layer: the hidden layer on which errors are measured: the first fully connected one, which has the Brand
            processes.
        rank: r of the low-rank algorithms: an eighth of the smaller dimension of that layer, as in
            `kfacerr.report.default_rank`. The default, 220, exceeds the dimension of most factors here, and every
            inverse would be exact.
        classes: whether the targets are classes, and accuracy is told.
        batch_size: of training; whole batches only.
        epochs: of each run.
    """

    name: str
    data: Callable[[Source], Data]
    model: Callable[[], nn.Module]
    loss: Loss
    layer: str
    rank: int
    classes: bool = True
    batch_size: int = 32
    epochs: int = 12


# --------------------------------------------------------------------------------------------------- losses


def next_character(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every position: (b, t, v) and (b, t)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def bernoulli(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of pixels in [0, 1], summed over an image, as Martens & Grosse (2015) train autoencoders."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, summed over an output."""
    return (outputs - targets).square().sum() / (2 * len(targets))


# ----------------------------------------------------------------------------------------------------- data


@cache
def digits(source: Source, shape: tuple[int, ...], itself: bool) -> Data:
    """scikit-learn's digits in [0, 1], the last 360 the test set; the targets are the labels, or the images."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images / 16.0).float().reshape(-1, *shape)
    y = x if itself else torch.from_numpy(bunch.target.astype(np.int64))
    return Data("digits", (x[:-360], y[:-360]), (x[-360:], y[-360:]))


@cache
def characters(source: Source, context: int = 32) -> Data:
    """The descriptions of scikit-learn's data sets, in pieces of `context` characters; every tenth is a test.

    Printable ASCII is told apart; what else there is, line ends among it, is one character. 42 kB.
    """
    folder = files("sklearn.datasets") / "descr"
    pages = sorted((page for page in folder.iterdir() if page.name.endswith(".rst")), key=lambda page: page.name)
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    codes = torch.tensor([ord(letter) - 31 if " " <= letter <= "~" else 0 for letter in text])
    pieces = codes[: len(codes) // (context + 1) * (context + 1)].view(-1, context + 1)
    held_out = torch.arange(len(pieces)) % 10 == 9
    train, test = pieces[~held_out], pieces[held_out]
    return Data("scikit-learn's descriptions", (train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:]))


@cache
def cifar10(source: Source, n_train: int = 2_500, n_test: int = 1_000) -> Data:
    """The first images of CIFAR-10, each channel of mean 0 and variance 1 over the train set."""
    whole = load_cifar10(source.folder, accept_modified=source.accept_modified, download=False)
    subset = whole.subset(n_train, n_test)
    mean, std = (value.float().view(1, 3, 1, 1) for value in subset.channel_statistics())
    train, test = ((images / 255 - mean) / std for images in (subset.train_images, subset.test_images))
    # Copies: what is kept is not to hold all 60,000 images.
    return Data(whole.name, (train, subset.train_labels.clone()), (test, subset.test_labels.clone()))


@cache
def teacher(source: Source, n_train: int = 2_000, n_test: int = 500) -> Data:
    """What a random network 64-48-10 takes random inputs for."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_train + n_test, 64, generator=generator) * 0.9 ** torch.arange(64)
    hidden = torch.tanh(x @ torch.randn(64, 48, generator=generator))
    y = (hidden @ torch.randn(48, 10, generator=generator)).argmax(1)
    return Data("a teacher's classes", (x[:n_train], y[:n_train]), (x[n_train:], y[n_train:]))


@cache
def manifold(source: Source, n_train: int = 2_000, n_test: int = 500) -> Data:
    """Points of a smooth surface of dimension 4 in 64 dimensions; the targets are the points."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(n_train + n_test, 4, generator=generator)
    x = torch.sin(z @ torch.randn(4, 32, generator=generator)) @ torch.randn(32, 64, generator=generator) / 32**0.5
    return Data("a surface", (x[:n_train], x[:n_train]), (x[n_train:], x[n_train:]))


@cache
def diabetes(source: Source) -> Data:
    """scikit-learn's diabetes data: ten numbers a patient, and how the disease went on; both standardised."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    x, y = (torch.from_numpy(values).float() for values in (bunch.data, bunch.target[:, None]))
    x, y = ((values - values[:360].mean(0)) / values[:360].std(0) for values in (x, y))
    return Data("diabetes", (x[:360], y[:360]), (x[360:], y[360:]))


# ---------------------------------------------------------------------------------------------------- tasks

_TASKS = (
    Task(
        name="mlp",
        data=partial(digits, shape=(64,), itself=False),
        model=partial(mlp, 64, 128, 96, 10),
        loss=F.cross_entropy,
        layer="fc0",
        rank=8,
    ),
    Task(
        name="convnet",
        data=partial(digits, shape=(1, 8, 8), itself=False),
        model=partial(convnet, (1, 8, 16), 256, 64, strides=(1, 2)),
        loss=F.cross_entropy,
        layer="fc0",
        rank=8,
        epochs=8,
    ),
    Task(
        name="autoencoder",
        data=partial(digits, shape=(64,), itself=True),
        model=partial(autoencoder, 64, 96, 48, 24, 8),
        loss=bernoulli,
        layer="fc0",
        rank=8,
        classes=False,
    ),
    Task(
        name="transformer",
        data=characters,
        model=partial(Transformer, 96, 32),
        loss=next_character,
        layer="blocks.0.attention.qkv",
        rank=8,
        batch_size=16,
        epochs=4,
    ),
    Task(
        name="cifar10",
        data=cifar10,
        model=partial(convnet, (3, 8, 16, 16), 256, 64, strides=(2, 2, 2)),
        loss=F.cross_entropy,
        layer="fc0",
        rank=8,
        epochs=6,
    ),
)
TASKS = {task.name: task for task in _TASKS}

_SEARCH = (
    Task(
        name="teacher",
        data=teacher,
        model=partial(mlp, 64, 96, 96, 10),
        loss=F.cross_entropy,
        layer="fc0",
        rank=8,
        epochs=8,
    ),
    Task(
        name="manifold",
        data=manifold,
        model=partial(autoencoder, 64, 96, 48, 16, 4),
        loss=squares,
        layer="fc0",
        rank=8,
        classes=False,
        epochs=8,
    ),
    Task(
        name="diabetes",
        data=diabetes,
        model=partial(mlp, 10, 64, 64, 1),
        loss=squares,
        layer="fc1",
        rank=8,
        classes=False,
        epochs=30,
    ),
)
SEARCH = {task.name: task for task in _SEARCH}
