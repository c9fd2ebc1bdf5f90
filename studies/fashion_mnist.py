"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747), from its four gzipped idx files.

There is no download: Debian's package dataset-fashion-mnist installs them, github.com/zalandoresearch has them.
"""

import gzip
import io
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kfacerr.exceptions import InputError
from studies.images import Dataset, checked_labels, named_folder, read_file, verified_name

__all__ = ["load_fashion_mnist"]

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
RECORDS, SHAPE, PADDING = 60_000, (28, 28), 2

# SHA-256 of what is packed in the files. Debian's are packed without name and date, and so are other bytes; with
# these put back they have the MD5 by which torchvision knows the official ones.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def load_fashion_mnist(
    root: Path | None = None, *, accept_modified: bool = False, sha256: Mapping[str, str] = SHA256
) -> Dataset:
    """The grey 28x28 images as 3x32x32: two black pixels on each side, three channels alike.

    Args:
        root: the folder that is, or holds, `fashion-mnist`; else `$KFACERR_DATA`, else Debian's.
        accept_modified: take files whose checksums are not the official ones; the data set's name says so.
        sha256: file name -> checksum of what is packed in it; for tests.

    Raises:
        InputError: a file is missing, altered or malformed; names it.
    """
    folder = _find_folder(root)
    official = {f"{name}.gz": checksum for name, checksum in sha256.items()}
    contents = {folder / name: _unpacked(folder / name) for name in official}
    name = verified_name("Fashion-MNIST", contents, official, "sha256", accept_modified=accept_modified)
    files = iter(contents.items())
    train, test = (_part(*next(files), *next(files)) for _ in range(2))
    return Dataset(name, *train, *test, CLASSES, True)


def _find_folder(root: Path | None) -> Path:
    place, first = named_folder(root) or DEBIAN, f"{next(iter(SHA256))}.gz"
    for folder in (place / "fashion-mnist", place):
        if (folder / first).exists():
            return folder
    raise InputError(
        f"{place}: holds no {first}; install Debian's dataset-fashion-mnist, or name a folder that holds the four "
        "files of Fashion-MNIST with --data DIR"
    )


def _unpacked(file: Path) -> bytes:
    """What is packed in a file: no more than 60,000 images, whatever it says of itself."""
    most = 16 + RECORDS * math.prod(SHAPE)
    packed = read_file(file, 2 * most, "a file of Fashion-MNIST")
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            content = stream.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: not a readable gzip file: {error}") from error
    if len(content) > most:
        raise InputError(f"{file}: holds more than the {most:,} bytes of {RECORDS:,} images")
    return content


def _part(images: Path, pixels: bytes, labels: Path, classes: bytes) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) of two files."""
    grey = _parsed(images, pixels, SHAPE)
    known = checked_labels(labels, _parsed(labels, classes, ()))
    if len(grey) != len(known):
        raise InputError(f"{labels}: {len(known)} labels for the {len(grey)} images of {images.name}")
    padded = np.pad(grey, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    return torch.from_numpy(padded).unsqueeze(1).expand(-1, 3, -1, -1), torch.from_numpy(known)


def _parsed(file: Path, content: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes: 0x0800 + the number of dimensions, these, the values in C order."""
    start = 4 * (2 + len(shape))
    magic, count, *rest = struct.unpack(f">{start // 4}I", content[:start].ljust(start, b"\0"))
    expected = start + count * math.prod(shape)
    if (magic, *rest) != (0x0801 + len(shape), *shape) or not count or len(content) != expected:
        what = "images of 28x28" if shape else "labels"
        raise InputError(f"{file}: {len(content)} bytes that are no idx file of {what}, or one cut short")
    return np.frombuffer(content, np.uint8, offset=start).reshape(count, *shape)
