"""Fashion-MNIST is read right from its gzipped idx files, and only if it is what it claims to be."""

import gzip
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kfacerr.exceptions import InputError
from studies.data import load_dataset
from studies.fashion_mnist import SHA256, load_fashion_mnist

COUNTS = {"train": 12, "t10k": 5}  # of the tiny data set


def idx(values: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def arrays() -> dict[str, NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    images = {
        f"{part}-images-idx3-ubyte": rng.integers(0, 256, (n, 28, 28), np.uint8) for part, n in COUNTS.items()
    }
    labels = {f"{part}-labels-idx1-ubyte": rng.integers(0, 10, n, np.uint8) for part, n in COUNTS.items()}
    return {name: (images | labels)[name] for name in SHA256}


@pytest.fixture
def sha256(arrays: dict[str, NDArray[np.uint8]]) -> dict[str, str]:
    return {name: hashlib.sha256(idx(values)).hexdigest() for name, values in arrays.items()}


@pytest.fixture
def folder(tmp_path: Path, arrays: dict[str, NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("KFACERR_DATA", raising=False)
    place = tmp_path / "fashion-mnist"
    place.mkdir()
    for name, values in arrays.items():
        (place / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
    return place


def assert_refused(message: str, *args: Any, **options: Any) -> None:
    """Refused with one line that contains `message`."""
    with pytest.raises(InputError) as caught:
        load_fashion_mnist(*args, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_stand_in_a_black_frame_with_three_channels_alike(
    folder: Path, arrays: dict[str, NDArray[np.uint8]], sha256: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFACERR_DATA", str(folder.parent))
    for root in (folder, folder.parent, None):
        dataset = load_fashion_mnist(root, sha256=sha256)
        assert (dataset.name, dataset.classes[9], dataset.mirrored) == ("Fashion-MNIST", "Ankle boot", True)
        for part, images, labels in (
            ("train", dataset.train_images, dataset.train_labels),
            ("t10k", dataset.test_images, dataset.test_labels),
        ):
            assert images.shape == (COUNTS[part], 3, 32, 32) and images.dtype == torch.uint8
            grey = torch.from_numpy(arrays[f"{part}-images-idx3-ubyte"])
            assert torch.equal(images[:, :, 2:-2, 2:-2], grey.unsqueeze(1).expand(-1, 3, -1, -1))
            assert int(images.sum()) == 3 * int(grey.sum())
            assert labels.dtype == torch.int64
            assert labels.tolist() == arrays[f"{part}-labels-idx1-ubyte"].tolist()


def test_a_data_set_is_found_by_its_name_and_cut(folder: Path) -> None:
    dataset = load_dataset("fashion-mnist", folder, accept_modified=True, n_train=7)
    assert (dataset.name, len(dataset.train_labels), len(dataset.test_labels)) == (
        "Fashion-MNIST (modified)",
        7,
        5,
    )


def test_another_packing_of_the_official_files_is_official(folder: Path, sha256: dict[str, str]) -> None:
    for file in folder.iterdir():
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), compresslevel=1, mtime=7))
    assert load_fashion_mnist(folder, sha256=sha256).name == "Fashion-MNIST"


def test_an_altered_file_is_refused_with_both_checksums_and_the_option_that_takes_it(
    folder: Path, sha256: dict[str, str]
) -> None:
    file = folder / "t10k-labels-idx1-ubyte.gz"
    content = idx(np.zeros(5, np.uint8))
    file.write_bytes(gzip.compress(content))
    assert_refused(f"{file}: SHA256 {hashlib.sha256(content).hexdigest()}", folder, sha256=sha256)
    assert_refused(sha256["t10k-labels-idx1-ubyte"], folder, sha256=sha256)
    assert_refused("--accept-modified-data", folder, sha256=sha256)
    assert load_fashion_mnist(folder, accept_modified=True, sha256=sha256).name == "Fashion-MNIST (modified)"


def images(*shape: int) -> bytes:
    return idx(np.zeros(shape, np.uint8))


MALFORMED = [
    ("t10k-images", b"text", "not a readable gzip file"),
    ("t10k-images", gzip.compress(images(5, 28, 28))[:-5], "not a readable gzip file: Compressed file ended"),
    ("t10k-images", gzip.compress(bytes(10)), "10 bytes that are no idx file of images"),
    ("t10k-images", gzip.compress(images(5, 28, 27)), "3796 bytes that are no idx file of images"),
    ("t10k-images", gzip.compress(images(5, 28, 28)[:-1]), "3935 bytes that are no idx file of images"),
    ("t10k-labels", gzip.compress(images(0)), "8 bytes that are no idx file of labels"),
    ("t10k-labels", gzip.compress(images(6)), "6 labels for the 5 images"),
    ("train-labels", gzip.compress(idx(np.full(12, 10, np.uint8))), "10..10 instead of 0..9"),
]


@pytest.mark.parametrize(("start", "content", "message"), MALFORMED, ids=[row[2] for row in MALFORMED])
def test_a_malformed_file_is_refused_and_named_even_where_altered_data_are_accepted(
    start: str, content: bytes, message: str, folder: Path
) -> None:
    (file,) = folder.glob(f"{start}-*")
    file.write_bytes(content)
    assert_refused(f"{file}: ", folder, accept_modified=True)
    assert_refused(message, folder, accept_modified=True)


def test_a_file_that_unpacks_to_more_than_all_images_is_read_no_further(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studies.fashion_mnist.RECORDS", 12)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images(13, 28, 28)))
    assert_refused("holds more than the 9,424 bytes of 12 images", folder, accept_modified=True)


def test_a_missing_file_and_a_folder_without_any_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    assert_refused("train-labels-idx1-ubyte.gz: cannot be read", folder)
    assert_refused(f"{tmp_path / 'empty'}: holds no train-images-idx3-ubyte.gz; install", tmp_path / "empty")
