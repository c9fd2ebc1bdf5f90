"""One training run, step by step and resumable: data on the device, augmentation, network, optimizer.

Everything random at iteration k or in epoch e is drawn from a generator seeded by (seed, purpose, k or e).
A run is therefore a function of its configuration alone, and one that is stopped and resumed goes on exactly
as if it had not been (bitwise on the CPU), with no generator states to save.
"""

import math
from dataclasses import asdict
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kfacerr.exceptions import InputError
from studies.config import TrainingConfig
from studies.drivers import Driver, find_driver
from studies.environment import select_device
from studies.images import Dataset
from studies.networks import VGG16BN, vgg16_bn

__all__ = ["Diverged", "Purpose", "Training", "crop_and_mirror", "derived_seed"]

PADDING = 4  # of the random crop (design §4)
CHECK_EVERY = 50  # iterations between looks at the loss, each of which makes the host wait for the device
_EVALUATION_BATCH = 500


class Diverged(InputError):
    """The loss of a training step is not finite."""


class Purpose(IntEnum):
    """What a derived seed is for; the numbers are part of what makes a run repeatable."""

    WEIGHTS = 0
    SHUFFLE = 1
    AUGMENT = 2
    DROPOUT = 3


def derived_seed(seed: int, purpose: Purpose, index: int) -> int:
    """A 63-bit seed for (seed, purpose, index); the streams of different arguments are independent."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, index))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def crop_and_mirror(images: Tensor, tops: Tensor, lefts: Tensor, mirror: Tensor) -> Tensor:
    """Windows of the images padded by 4 black pixels, some of them mirrored.

    Args:
        images: (b, 3, h, w).
        tops, lefts: (b,) int64 in 0..8, the window's corner in the padded image.
        mirror: (b,) bool, which windows to flip left to right.

    Returns:
        (b, 3, h, w), of the images' dtype.
    """
    batch, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (PADDING,) * 4)
    rows = tops[:, None] + torch.arange(height, device=device)
    across = torch.arange(width, device=device)
    columns = lefts[:, None] + torch.where(mirror[:, None], across.flip(0), across)
    return padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


class Training:
    """A training run at iteration `k`.

    Attributes:
        k: the iteration that `step` will do next.
        model: its FC layers are "fc0" and "fc1".
        optimizer, config, device: as the names say.
        steps_per_epoch: whole batches only; what is left of an epoch's permutation is dropped.
    """

    def __init__(self, config: TrainingConfig, dataset: Dataset, driver: Driver | None = None) -> None:
        """Start at iteration 0, with weights drawn from the seed.

        Args:
            config: determines the run.
            dataset: is copied to the device as it is, in uint8.
            driver: takes the place of `find_driver(config.driver)`, for an optimizer of your own.

        Raises:
            InputError: an unknown driver or device, or fewer train images than one batch takes.
        """
        self.config = config
        self.device = select_device(config.device)
        self.steps_per_epoch = len(dataset.train_images) // config.batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"{dataset.name}: {len(dataset.train_images)} train images do not fill a batch of "
                f"{config.batch_size}"
            )
        self.k = 0
        torch.manual_seed(derived_seed(config.seed, Purpose.WEIGHTS, 0))
        # Drawn on the CPU: the same for every device.
        model = vgg16_bn(config.width, len(dataset.classes), config.conv_width)
        # PyTorch's annotation of Module.to leaves out memory_format alone.
        self.model: VGG16BN = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._driver = driver or find_driver(config.driver)
        self.optimizer = self._driver.make_optimizer(self.model, config, self.steps_per_epoch)
        self._identity = {
            **{name: value for name, value in asdict(config).items() if name != "device"},
            "dataset": dataset.name,
            "n_train": len(dataset.train_images),
        }
        self._mirrored = dataset.mirrored
        self._train = (dataset.train_images.to(self.device), dataset.train_labels.to(self.device))
        self._test = (dataset.test_images.to(self.device), dataset.test_labels.to(self.device))
        mean, std = (x.float().view(1, 3, 1, 1) for x in dataset.channel_statistics())
        # (image / 255 - mean) / std as one multiplication and one addition. A channel may be constant.
        self._scale = (1 / (255 * std.clamp(min=1e-3))).to(self.device)
        self._shift = (-mean / std.clamp(min=1e-3)).to(self.device)
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))  # the epoch, and its order
        self._unchecked: list[Tensor] = []  # losses of the last iterations

    @property
    def epoch(self) -> int:
        """n_ce(k), counted from 0."""
        return self.k // self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Iterations of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def step(self) -> Tensor:
        """Iteration k: forward, backward, update. Hooks' columns may be taken afterwards.

        Reseeds torch's global generator, for dropout. The loss is looked at every 50 iterations only.

        Returns:
            The mean loss of the batch before the update, a scalar on the device.

        Raises:
            InputError: the run is over.
            Diverged: the loss was not finite since the last look.
        """
        if self.k >= self.total_steps:
            raise InputError(f"iteration {self.k} is past the end of the run, {self.config.epochs} epochs")
        images, labels = self.batch(self.k)
        for group in self.optimizer.param_groups:
            group["lr"] = self._driver.learning_rate(self.config, self.epoch)
        torch.manual_seed(derived_seed(self.config.seed, Purpose.DROPOUT, self.k))
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self._logits(images), labels)
        loss.backward()
        self.optimizer.step()
        self.k += 1
        loss = loss.detach()
        self._unchecked.append(loss)
        if len(self._unchecked) >= CHECK_EVERY or self.k % self.steps_per_epoch == 0:
            self.check_losses()
        return loss

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """The batch of iteration k: normalised images (b, 3, 32, 32) float32, labels (b,) int64.

        Each image appears at most once in an epoch.
        """
        epoch, position = divmod(k, self.steps_per_epoch)
        if self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.config.seed, Purpose.SHUFFLE, epoch))
            order = torch.randperm(len(self._train[0]), generator=generator)
            self._permutation = (epoch, self._beside(order))
        size = self.config.batch_size
        chosen = self._permutation[1][position * size : (position + 1) * size]
        images, labels = self._train[0][chosen], self._train[1][chosen]
        if self.config.augment:
            images = crop_and_mirror(images, *self._augmentation(k))
        return self._normalised(images), labels

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test set. Leaves the run as it was.

        Raises:
            Diverged: the loss of a training step since the last look was not finite.
        """
        self.check_losses()
        was_training = self.model.training
        self.model.eval()
        loss, correct = (torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(2))
        try:
            with torch.no_grad():
                for images, labels in zip(*(x.split(_EVALUATION_BATCH) for x in self._test), strict=True):
                    logits = self._logits(self._normalised(images))
                    loss += F.cross_entropy(logits, labels, reduction="sum")
                    correct += (logits.argmax(1) == labels).sum()
        finally:
            self.model.train(was_training)
        count = len(self._test[1])
        return loss.item() / count, correct.item() / count

    def check_losses(self) -> None:
        """Look at the losses since the last look.

        Raises:
            Diverged: one is not finite; names the first such iteration.
        """
        losses = torch.stack(self._unchecked).tolist() if self._unchecked else []
        first = self.k - len(losses)
        self._unchecked.clear()
        for k, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                epoch = k // self.steps_per_epoch
                raise Diverged(f"the training diverged: the loss is {loss} at iteration {k} (epoch {epoch})")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for `studies.jobs.save_checkpoint`. Refuses a diverged run."""
        self.check_losses()
        return {
            "identity": self._identity,
            "k": self.k,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another `Training` of the same configuration and data set stood.

        Raises:
            InputError: it was of another one; names the first setting that differs.
        """
        theirs = state.get("identity", {})
        for name, value in self._identity.items():
            if (other := theirs.get(name)) != value:
                raise InputError(f"the checkpoint is of a run with {name} = {other}, not {value}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.k = state["k"]
        self._unchecked.clear()

    def _augmentation(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Corners of the crops, and which to mirror, at iteration k."""
        # Drawn on the CPU, so that every device sees the same batches.
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, Purpose.AUGMENT, k))
        size = self.config.batch_size
        corners = torch.randint(2 * PADDING + 1, (2, size), generator=generator)
        mirror = torch.rand(size, generator=generator) < (0.5 if self._mirrored else 0.0)
        tops, lefts, mirrored = self._beside(torch.cat([corners, mirror[None]]))
        return tops, lefts, mirrored.bool()

    def _beside(self, host: Tensor) -> Tensor:
        """What was drawn on the host, on the device; pinned, for else the host would wait for the copy."""
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def _logits(self, images: Tensor) -> Tensor:
        """Of the network in its precision, in float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            logits: Tensor = self.model(images)
        return logits.float()

    def _normalised(self, images: Tensor) -> Tensor:
        normalised = images.float() * self._scale + self._shift
        return normalised.contiguous(memory_format=torch.channels_last)
