"""CIFAR-10 is read right from both layouts, only if it is what it claims to be, and nothing in it is executed."""

import functools
import gc
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kfacerr.exceptions import InputError
from studies.data import OFFICIAL, Release, load_cifar10, load_digits_rgb
from studies.images import Dataset

RECORDS = 20  # in each file of the tiny data set; the official ones have 10,000
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2's cPickle did: `bytes` as its `str`, and NumPy 1's names."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.fixture(scope="module")
def batches() -> dict[str, Arrays]:
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (RECORDS, 3072), np.uint8), rng.integers(0, 10, RECORDS, np.uint8))
        for name in BATCHES
    }


def binary_files(batches: dict[str, Arrays]) -> dict[str, bytes]:
    return {f"{name}.bin": np.column_stack([y, x]).tobytes() for name, (x, y) in batches.items()}


def pickle_files(batches: dict[str, Arrays]) -> dict[str, bytes]:
    return {
        name: python2_pickle({b"data": x, b"labels": y.tolist(), b"batch_label": name.encode()})
        for name, (x, y) in batches.items()
    }


def write_layout(root: Path, layout: str, files: dict[str, bytes]) -> Path:
    folder = root / layout
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def release(batches: dict[str, Arrays]) -> Release:
    files = binary_files(batches) | pickle_files(batches)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return Release(url="http://127.0.0.1:9/nothing", archive_sha256="0" * 64, file_md5=md5, records=RECORDS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own cache and data folder stay out of these tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KFACERR_DATA", raising=False)
    return tmp_path / "cache" / "kfacerr"


@pytest.fixture
def binary(tmp_path: Path, batches: dict[str, Arrays]) -> Path:
    return write_layout(tmp_path, "cifar-10-batches-bin", binary_files(batches))


@pytest.fixture
def python(tmp_path: Path, batches: dict[str, Arrays]) -> Path:
    return write_layout(tmp_path, "cifar-10-batches-py", pickle_files(batches))


def assert_holds(dataset: Dataset, batches: dict[str, Arrays]) -> None:
    images = torch.from_numpy(np.concatenate([x for x, _ in batches.values()])).reshape(-1, 3, 32, 32)
    labels = torch.from_numpy(np.concatenate([y for _, y in batches.values()])).long()
    assert torch.equal(dataset.train_images, images[:-RECORDS])
    assert torch.equal(dataset.test_images, images[-RECORDS:])
    assert torch.equal(dataset.train_labels, labels[:-RECORDS])
    assert torch.equal(dataset.test_labels, labels[-RECORDS:])
    assert dataset.train_labels.dtype == torch.int64


def assert_refused(message: str, *args: Any, **options: Any) -> None:
    """Refused with one line that contains `message`."""
    with pytest.raises(InputError) as caught:
        load_cifar10(*args, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Reading.


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_both_official_layouts_give_the_same_images_and_labels(
    layout: str, batches: dict[str, Arrays], release: Release, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    for root in (folder, folder.parent):
        dataset = load_cifar10(root, release=release)
        assert dataset.name == "CIFAR-10"
        assert dataset.classes[3] == "cat"
        assert_holds(dataset, batches)


def test_the_first_byte_is_the_label_and_pixels_run_by_channel_row_column(binary: Path, release: Release) -> None:
    record = (binary / "data_batch_2.bin").read_bytes()[3073 : 2 * 3073]
    dataset = load_cifar10(binary, release=release)
    assert dataset.train_labels[RECORDS + 1] == record[0]
    assert dataset.train_images[RECORDS + 1, 2, 5, 7] == record[1 + 2 * 1024 + 5 * 32 + 7]


def test_the_binary_layout_is_preferred(binary: Path, python: Path, release: Release) -> None:
    (python / "test_batch").unlink()
    load_cifar10(binary.parent, release=release)


def test_the_environment_names_the_folder_where_the_caller_does_not(
    python: Path, batches: dict[str, Arrays], release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFACERR_DATA", str(python.parent))
    assert_holds(load_cifar10(release=release), batches)


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_pickled_by_todays_numpy_are_read_too(
    protocol: int, python: Path, batches: dict[str, Arrays], release: Release
) -> None:
    images, labels = batches["test_batch"]
    content = pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol)
    (python / "test_batch").write_bytes(content)
    assert_holds(load_cifar10(python, release=release, accept_modified=True), batches)


# Refusing.


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    python: Path, release: Release, tmp_path: Path
) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    content = python2_pickle({b"data": Malicious()})
    pickle.loads(content)
    (tmp_path / "executed").rmdir()  # so an ordinary unpickler does run it
    (python / "data_batch_3").write_bytes(content)
    assert_refused("data_batch_3", python, release=release, accept_modified=True)
    assert_refused(f"refusing to load {os.mkdir.__module__}.mkdir", python, release=release, accept_modified=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_an_altered_file_is_refused_with_both_checksums_and_the_option_that_takes_it(
    layout: str, release: Release, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    file = next(folder.glob("data_batch_4*"))
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)
    assert_refused(str(file), folder, release=release)
    assert_refused(hashlib.md5(content).hexdigest(), folder, release=release)
    assert_refused(release.file_md5[file.name], folder, release=release)
    assert_refused("--accept-modified-data", folder, release=release)
    assert load_cifar10(folder, release=release, accept_modified=True).name == "CIFAR-10 (modified)"


def test_the_jpeg_set_is_known_by_name_but_still_needs_the_option(
    binary: Path, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in binary.iterdir()}
    monkeypatch.setattr("studies.data._JPEG75_SHA256", sha256)
    other = replace(release, file_md5=OFFICIAL.file_md5)
    assert_refused("CIFAR-10 (JPEG-75)", binary, release=other)
    assert load_cifar10(binary, release=other, accept_modified=True).name == "CIFAR-10 (JPEG-75)"


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_a_missing_file_is_named(layout: str, release: Release, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    file = next(folder.glob("test_batch*"))
    file.unlink()
    assert_refused(f"{file}: cannot be read", folder, release=release)


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_a_truncated_file_is_refused_even_where_altered_data_are_accepted(
    layout: str, release: Release, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    file = next(folder.glob("data_batch_5*"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(f"{file}: ", folder, release=release, accept_modified=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"labels": [11] * RECORDS}, "the labels range over 11..11"),
        ({b"labels": [0.5] * RECORDS}, "float64"),
        ({b"labels": [1]}, "labels (1,)"),
        ({b"data": np.zeros((RECORDS, 3072), np.int64)}, "not a uint8 array"),
        ({b"data": np.zeros((RECORDS, 3071), np.uint8)}, "images (20, 3071)"),
        ({b"data": b"text"}, "not a readable batch"),
    ],
)
def test_a_malformed_batch_is_refused(
    change: dict[bytes, object],
    message: str,
    python: Path,
    batches: dict[str, Arrays],
    release: Release,
) -> None:
    images, labels = batches["test_batch"]
    content = {b"data": images, b"labels": labels.tolist()} | change
    (python / "test_batch").write_bytes(python2_pickle(content))
    assert_refused("test_batch: ", python, release=release, accept_modified=True)
    assert_refused(message, python, release=release, accept_modified=True)


def test_a_label_above_9_is_refused_in_the_binary_layout(binary: Path, release: Release) -> None:
    content = bytearray((binary / "test_batch.bin").read_bytes())
    content[0] = 10
    (binary / "test_batch.bin").write_bytes(content)
    assert_refused("..10 instead of 0..9", binary, release=release, accept_modified=True)


def test_a_named_folder_without_the_data_set_is_an_error(tmp_path: Path, binary: Path) -> None:
    empty = tmp_path / "empty"
    assert_refused(f"{empty}: holds neither cifar-10-batches-bin nor cifar-10-batches-py", empty)


def test_without_download_a_missing_data_set_is_an_error_that_says_what_to_do(cache: Path) -> None:
    assert_refused(str(cache), download=False)
    assert_refused("--data DIR", download=False)


# Downloading, from this machine.


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, batches: dict[str, Arrays], release: Release) -> Iterator[Release]:
    """The release, served as an archive on a loopback port."""
    folder = tmp_path / "server"
    source = write_layout(tmp_path / "source", "cifar-10-batches-bin", binary_files(batches))
    (source / "readme.html").write_text("not needed")
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    sha256 = hashlib.sha256((folder / "cifar-10-binary.tar.gz").read_bytes()).hexdigest()
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
            yield replace(release, url=url, archive_sha256=sha256)
        finally:
            server.shutdown()
            thread.join()
            with warnings.catch_warnings():  # requests leaves a connection that broke to the collector
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()


def test_a_data_set_not_in_the_cache_is_downloaded_once(
    served: Release, batches: dict[str, Arrays], cache: Path
) -> None:
    assert_holds(load_cifar10(release=served), batches)
    assert [path.name for path in cache.iterdir()] == ["cifar-10-batches-bin"]
    assert_holds(load_cifar10(release=served, download=False), batches)


def test_an_interrupted_unpacking_is_done_again(served: Release, batches: dict[str, Arrays], cache: Path) -> None:
    half_done = {name: content[:100] for name, content in binary_files(batches).items()}
    write_layout(cache / "unpacking", "cifar-10-batches-bin", half_done)
    assert_holds(load_cifar10(release=served), batches)


def test_a_download_with_a_wrong_checksum_is_refused_and_not_kept(served: Release, cache: Path) -> None:
    wrong = replace(served, archive_sha256="0" * 64)
    assert_refused("cifar-10-binary.tar.gz", release=wrong)
    assert_refused("does not match the known hash", release=wrong)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("sent", [0, 1, 1000])
def test_a_broken_transfer_is_refused_and_not_kept(
    sent: int, served: Release, cache: Path, batches: dict[str, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server promises the whole archive and closes the connection after a few bytes of it."""

    def broken(self: Any, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read(sent))
        outputfile.flush()
        self.close_connection = True

    with monkeypatch.context() as patch:
        patch.setattr(QuietHandler, "copyfile", broken)
        assert_refused("could not be downloaded", release=served)
    assert not list(cache.iterdir())
    assert_holds(load_cifar10(release=served), batches)


def test_an_error_of_the_server_is_named(served: Release) -> None:
    assert_refused("404", release=replace(served, url=served.url + "x"))


# What is no batch.


def test_a_batch_that_is_no_file_of_its_size_is_refused_before_it_is_read(binary: Path, release: Release) -> None:
    batch = binary / "data_batch_3.bin"
    batch.unlink()
    os.mkfifo(batch)
    assert_refused("data_batch_3.bin: 0 bytes, or no file", binary, release=release)
    batch.unlink()
    with batch.open("wb") as file:
        file.truncate(2**40)  # sparse
    assert_refused("data_batch_3.bin: 1,099,511,627,776 bytes", binary, release=release, accept_modified=True)
    batch.unlink()
    batch.symlink_to(batch)
    assert_refused("data_batch_3.bin: cannot be read", binary, release=release)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04N" + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1) + b".",
        b"N" + pickle.PUT + b"99999999999\n.",
        b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04" + pickle.BINBYTES8 + struct.pack("<Q", 2**40) + b".",
    ],
)
def test_a_pickle_that_asks_for_gigabytes_is_refused(content: bytes, python: Path, release: Release) -> None:
    (python / "data_batch_2").write_bytes(content)
    assert_refused("data_batch_2: not a readable batch", python, release=release, accept_modified=True)


def test_without_a_network_the_error_names_the_url_and_the_way_out(release: Release) -> None:
    assert_refused(release.url, release=release)  # where nothing listens
    assert_refused("--data DIR", release=release)


# Data sets.


def test_channel_statistics_are_those_of_the_train_images_in_units_of_0_to_1(
    binary: Path, release: Release
) -> None:
    dataset = load_cifar10(binary, release=release).subset(30)
    mean, std = dataset.channel_statistics()
    pixels = dataset.train_images.double() / 255
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(std, pixels.std((0, 2, 3), correction=0), rtol=1e-12, atol=0.0)


def test_a_subset_is_the_first_train_images_and_the_whole_test_set(binary: Path, release: Release) -> None:
    dataset = load_cifar10(binary, release=release)
    subset = dataset.subset(7)
    assert torch.equal(subset.train_images, dataset.train_images[:7])
    assert torch.equal(subset.train_labels, dataset.train_labels[:7])
    assert len(subset.test_images) == RECORDS
    for wrong in (0, 5 * RECORDS + 1):
        with pytest.raises(InputError, match="train images"):
            dataset.subset(wrong)


def test_digits_are_1797_images_of_4x4_blocks_that_may_not_be_mirrored() -> None:
    digits = load_digits_rgb()
    assert digits.train_images.shape == (1437, 3, 32, 32)
    assert digits.test_images.shape == (360, 3, 32, 32)
    assert digits.train_images.dtype == torch.uint8
    assert not digits.mirrored
    images = digits.test_images
    blocks = images[:, :1, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(images, blocks.expand_as(images))
    assert (images.min(), images.max()) == (0, 255)
    assert torch.bincount(digits.test_labels).min() > 30
