"""What all data sets have in common: images and labels on the CPU, and files that are checked as they are read."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kfacerr.exceptions import InputError

__all__ = ["Dataset", "checked_labels", "named_folder", "read_file", "verified_name"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels on the CPU.

    Attributes:
        name: as results are to quote it, e.g. "CIFAR-10 (JPEG-75)".
        train_images, test_images: (N, 3, 32, 32) uint8.
        train_labels, test_labels: (N,) int64.
        classes: their names; label i is `classes[i]`.
        mirrored: whether an image's mirror image is one of the same class (a 2's is not).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mirrored: bool

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the train images, in units of 0..1; (3,) float64."""
        # Sums of whole numbers below 2^53 are exact in float64; in chunks, for float64 is 8 times as large.
        total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for chunk in self.train_images.split(1000):
            values = chunk.double()
            total += values.sum((0, 2, 3))
            squares += values.square().sum((0, 2, 3))
        count = self.train_images.numel() // 3
        mean = total / count
        return mean / 255, (squares / count - mean.square()).clamp(min=0).sqrt() / 255

    def subset(self, n_train: int | None, n_test: int | None = None) -> "Dataset":
        """The first `n_train` train and `n_test` test images, as the official order is shuffled; None for all."""
        for part, n, there in (("train", n_train, self.train_labels), ("test", n_test, self.test_labels)):
            if n is not None and not 1 <= n <= len(there):
                raise InputError(f"{self.name}: n_{part} = {n} of {len(there)} {part} images")
        return replace(
            self,
            train_images=self.train_images[:n_train],
            train_labels=self.train_labels[:n_train],
            test_images=self.test_images[:n_test],
            test_labels=self.test_labels[:n_test],
        )


def named_folder(root: Path | None) -> Path | None:
    """`root`, else `$KFACERR_DATA`, else None."""
    from_environment = os.environ.get("KFACERR_DATA")
    return root or (Path(from_environment) if from_environment else None)


def read_file(file: Path, most: int, what: str) -> bytes:
    """What is in a file of at most `most` bytes: no pipe, which would hang, and no terabyte.

    Args:
        file: to read.
        most: bytes that are read.
        what: it is to be, e.g. "a batch of CIFAR-10".

    Raises:
        InputError: it is larger, no file, or cannot be read.
    """
    try:
        size = file.stat().st_size
        if not file.is_file() or size > most:
            raise InputError(f"{file}: {size:,} bytes, or no file: {what} has at most {most:,}")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error


def verified_name(
    name: str,
    contents: Mapping[Path, bytes],
    official: Mapping[str, str],
    digest: str,
    *,
    accept_modified: bool,
    known: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> str:
    """The data set's name, by its checksums: with "(modified)", or what else is known, where they differ.

    Args:
        name: of the official one.
        contents: file -> what was read from it.
        official: file name -> checksum.
        digest: the function that takes it, of `hashlib`.
        accept_modified: take other files.
        known: variant -> file name -> SHA-256.

    Raises:
        InputError: the checksums are others, and `accept_modified` is false.
    """
    found = {file: hashlib.new(digest, content, usedforsecurity=False) for file, content in contents.items()}
    altered = [file for file in found if found[file].hexdigest() != official[file.name]]
    if not altered:
        return name
    sha256 = {file.name: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    variant = next((variant for variant, sums in known.items() if sha256.items() <= sums.items()), "modified")
    if not accept_modified:
        raise InputError(
            f"{altered[0]}: {digest.upper()} {found[altered[0]].hexdigest()}, but officially it is "
            f'{official[altered[0].name]}; --accept-modified-data takes it, as "{name} ({variant})"'
        )
    return f"{name} ({variant})"


def checked_labels(file: Path, labels: NDArray[Any]) -> NDArray[np.int64]:
    """Labels (N,) of ten classes.

    Raises:
        InputError: they are no whole numbers from 0 to 9.
    """
    if labels.dtype.kind not in "iu":
        raise InputError(f"{file}: the labels are {labels.dtype} instead of whole numbers")
    if labels.min() < 0 or labels.max() > 9:
        raise InputError(f"{file}: the labels range over {labels.min()}..{labels.max()} instead of 0..9")
    return labels.astype(np.int64)
