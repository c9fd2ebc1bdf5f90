"""One trial: a task, an optimizer, a learning rate, a seed. It takes seconds; one that is stopped is begun anew.

Every optimizer starts from the same weights and sees the same batches, once a seed, and every rate falls to 0
along half a cosine. After each epoch the losses are those of the whole train and test set.
"""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfacerr.exceptions import InputError
from studies.environment import select_device, synchronize
from studies.tasks.contestants import Contestant
from studies.tasks.problems import Data, Task
from studies.training import Purpose, derived_seed

__all__ = ["STAGES", "Epoch", "Run", "Trial", "train"]

STAGES = ("tune", "final")
"""What a trial is for: to choose the learning rate, or to compare at it."""

_EVALUATION_BATCH = 500


class Trial(NamedTuple):
    """What is tried; `stage` is one of `STAGES`."""

    task: str
    optimizer: str
    lr: float
    seed: int
    stage: str

    def __str__(self) -> str:
        return f"{self.task}, {self.optimizer}, lr {self.lr:g}, seed {self.seed}, {self.stage}"


class Epoch(NamedTuple):
    """What an epoch came to.

    Attributes:
        epoch: number of epochs done, from 1.
        seconds: of training since the start, by the clock on the wall; with what is measured, without evaluations.
        train_loss: of the whole train set; Inf from where the run diverged.
        test_loss: of the test set.
        test_accuracy: NaN where the targets are no classes.
    """

    epoch: int
    seconds: float
    train_loss: float
    test_loss: float
    test_accuracy: float


class Run:
    """A training run at iteration `k`.

    Attributes:
        k: iterations done.
        model: the network.
        optimizers: what steps together.
        steps_per_epoch: whole batches.
        steps: of the whole run.

    Raises:
        InputError: the train set does not fill a batch.
    """

    def __init__(self, task: Task, data: Data, contestant: Contestant, lr: float, seed: int, device: str) -> None:
        self.task, self.seed = task, seed
        self.device = select_device(device)
        self.train, self.test = (tuple(part.to(self.device) for part in pair) for pair in (data.train, data.test))
        self.steps_per_epoch = len(self.train[0]) // task.batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"task {task.name}: {len(self.train[0])} inputs do not fill a batch of {task.batch_size}"
            )
        self.steps = self.steps_per_epoch * task.epochs
        self.k = 0
        torch.manual_seed(derived_seed(seed, Purpose.WEIGHTS, 0))  # drawn on the CPU: the same for every device
        self.model: nn.Module = task.model().to(self.device)
        self.optimizers = contestant.make(self.model, task, lr, seed)
        self._schedulers = [torch.optim.lr_scheduler.LambdaLR(one, self._rate) for one in self.optimizers]

    def _rate(self, k: int) -> float:
        return (1 + math.cos(math.pi * k / self.steps)) / 2

    def epoch(self) -> Iterator[float]:
        """Trains for an epoch; yields the loss of each batch before its update."""
        number = self.k // self.steps_per_epoch
        generator = torch.Generator().manual_seed(derived_seed(self.seed, Purpose.SHUFFLE, number))
        order = torch.randperm(len(self.train[0]), generator=generator).to(self.device)
        size = self.task.batch_size
        for chosen in order[: self.steps_per_epoch * size].split(size):
            x, y = (part[chosen] for part in self.train)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = self.task.loss(self.model(x), y)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            for scheduler in self._schedulers:
                scheduler.step()
            self.k += 1
            yield loss.item()

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float, float]:
        """Loss on the train set, loss and accuracy on the test set."""
        train_loss, _ = self._mean(self.train)
        return train_loss, *self._mean(self.test)

    def _mean(self, pair: tuple[Tensor, ...]) -> tuple[float, float]:
        x, y = pair
        loss = correct = 0.0
        for inputs, targets in zip(x.split(_EVALUATION_BATCH), y.split(_EVALUATION_BATCH), strict=True):
            outputs = self.model(inputs)
            loss += self.task.loss(outputs, targets).item() * len(inputs)
            if self.task.classes:
                correct += (outputs.argmax(-1) == targets).sum().item()
        return loss / len(x), correct / y[..., None].shape[:-1].numel() if self.task.classes else math.nan


def train(run: Run) -> tuple[list[Epoch], str]:
    """Trains to the end, or until the run diverges.

    Args:
        run: at its beginning.

    Returns:
        The epochs, and why the run diverged; "" if it did not. The epoch in which it did is the last.
    """
    epochs: list[Epoch] = []
    seconds = 0.0
    for number in range(1, run.task.epochs + 1):
        synchronize(run.device)
        started = time.perf_counter()
        diverged = _epoch(run)
        synchronize(run.device)
        seconds += time.perf_counter() - started
        losses = run.evaluate()
        if not diverged and not all(math.isfinite(loss) for loss in losses[:2]):
            diverged = f"the loss is {losses[0]} after epoch {number}"
        if diverged:
            return [*epochs, Epoch(number, seconds, math.inf, math.inf, math.nan)], diverged
        epochs.append(Epoch(number, seconds, *losses))
    return epochs, ""


def _epoch(run: Run) -> str:
    """Why the run diverged in this epoch, or ""."""
    try:
        for loss in run.epoch():
            if not math.isfinite(loss):
                return f"the loss is {loss} at iteration {run.k - 1}"
    except torch.linalg.LinAlgError as error:  # of a decomposition of what is not finite, or soon will not be
        return f"iteration {run.k}: {' '.join(str(error).split())}"
    return ""
