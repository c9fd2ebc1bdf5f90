"""A task of six steps."""

from functools import partial

import torch
from torch.nn import functional as F

from studies.tasks.models import mlp
from studies.tasks.problems import Data, Source, Task
from studies.tasks.study import TasksPreset


def blobs(source: Source) -> Data:
    """Three classes that a line parts, 24 to train on and 12 to test."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(36) % 3
    x = torch.randn(36, 20, generator=generator) + 2 * F.one_hot(y, 20)
    return Data("blobs", (x[:24], y[:24]), (x[24:], y[24:]))


TASK = Task(
    name="tiny",
    data=blobs,
    model=partial(mlp, 20, 24, 16, 3),
    loss=F.cross_entropy,
    layer="fc0",
    rank=4,
    batch_size=8,
    epochs=2,
)
PRESET = TasksPreset("tasks", {"tiny": TASK}, rates=2, seeds=(1, 2), timing_rounds=1)
