"""The images by name: CIFAR-10 in its official layouts, scikit-learn's digits, Fashion-MNIST (design §13).

CIFAR-10 is read from disk, or downloaded once into the user's cache. What is read is checked against the
official checksums first, and a pickle is read without executing anything in it.
"""

import io
import pickle
import pickletools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kfacerr.exceptions import InputError
from studies.fashion_mnist import load_fashion_mnist
from studies.images import Dataset, checked_labels, named_folder, read_file, verified_name

__all__ = ["load_cifar10", "load_dataset", "load_digits_rgb"]

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_LAYOUTS = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}  # the preferred one first
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Release:
    """What identifies a release of CIFAR-10.

    Attributes:
        url, archive_sha256: of the archive that holds `cifar-10-batches-bin`.
        file_md5: file name -> MD5, of the batches in both layouts.
        records: images in each file.
    """

    url: str
    archive_sha256: str
    file_md5: Mapping[str, str]
    records: int


# The archive's SHA-256 stands, alike, in several libraries that load it; the MD5 of the python batches in
# torchvision; those of the binary ones in rai-project/dldataset and, alike, in another project's CMake scripts.
OFFICIAL = Release(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    archive_sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    file_md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
    records=10_000,
)
# SHA-256 of all images re-encoded as JPEG of quality 75, as `cifar-10-batches-bin` (design §13).
_JPEG75_SHA256 = {
    "data_batch_1.bin": "8da035fc1631e8ce5f25904206b8993b0f3ad02a504c0584d662e806fd76c12b",
    "data_batch_2.bin": "106eeaad9f1fa7a999292fdafe68ee909080f58aee038a76994035aedf40ba26",
    "data_batch_3.bin": "99cb88ba00fca88bf28c517a74307b6b78a346c6ea747a561cb8e660c787d5cb",
    "data_batch_4.bin": "76b482bc3bb79c0370e48ea71bb6e4f567a3770d224dc09a9ddc8cfa2369f294",
    "data_batch_5.bin": "490f5ead4f04a3eb71d5898eb551e0d8d2c592feb778fb9b109a006b3f231495",
    "test_batch.bin": "0ce179d0c0a5220739d6223197952896644ceabb648dacfdebd7f06789af543f",
}


def load_cifar10(
    root: Path | None = None,
    *,
    accept_modified: bool = False,
    download: bool = True,
    release: Release = OFFICIAL,
) -> Dataset:
    """CIFAR-10 from `root`, else from `$KFACERR_DATA`, else from the user's cache, downloaded if need be.

    The folder is (or holds) `cifar-10-batches-bin` or `cifar-10-batches-py`; a folder that is named and
    holds neither is an error, never a reason to look elsewhere.

    Args:
        root: where to look first.
        accept_modified: take files whose checksums are not the official ones; the data set's name says so.
        download: fetch a data set that is not in the cache.
        release: URL and checksums; for tests.

    Raises:
        InputError: the data set is missing, incomplete, altered or malformed; names the file.
    """
    folder = _find_folder(root) or _download(release, download)
    files = [folder / (batch + _LAYOUTS[folder.name]) for batch in _BATCHES]
    # The very bytes whose checksum was taken are the ones parsed.
    most = 2 * release.records * (1 + _PIXELS) + 2**20
    contents = {file: read_file(file, most, "a batch of CIFAR-10") for file in files}
    known = {"JPEG-75": _JPEG75_SHA256}
    name = verified_name(
        "CIFAR-10", contents, release.file_md5, "md5", accept_modified=accept_modified, known=known
    )
    parse = _parse_binary if files[0].suffix == ".bin" else _parse_pickle
    batches = [parse(file, content, release.records) for file, content in contents.items()]
    images = torch.from_numpy(np.concatenate([images for images, _ in batches]).reshape(-1, 3, 32, 32))
    labels = torch.from_numpy(np.concatenate([labels for _, labels in batches]))
    n_test = release.records
    return Dataset(
        name, images[:-n_test], labels[:-n_test], images[-n_test:], labels[-n_test:], CIFAR10_CLASSES, True
    )


def load_digits_rgb() -> Dataset:
    """scikit-learn's 1797 handwritten digits: 8x8 grey -> 3x32x32, each pixel a 4x4 block. No download.

    The last 360, in part of writers not among the first 1437, are the test set, as is usual.
    """
    from sklearn.datasets import load_digits  # here, because it is slow to import and CIFAR-10 does without

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the values are 0..16
    large = grey.repeat(4, axis=1).repeat(4, axis=2)
    images = torch.from_numpy(large).unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    classes = tuple(str(digit) for digit in range(10))
    return Dataset("digits", images[:-360], labels[:-360], images[-360:], labels[-360:], classes, False)


def load_dataset(
    name: str, folder: Path | None, *, accept_modified: bool, n_train: int | None, n_test: int | None = None
) -> Dataset:
    """ "digits", "cifar10" or "fashion-mnist": its first `n_train` train and `n_test` test images (None: all)."""
    if name == "digits":
        dataset = load_digits_rgb()
    elif name == "cifar10":
        dataset = load_cifar10(folder, accept_modified=accept_modified)
    else:
        dataset = load_fashion_mnist(folder, accept_modified=accept_modified)
    return dataset.subset(n_train, n_test)


# Finding, downloading and checking the files.


def _find_folder(root: Path | None) -> Path | None:
    """The folder of batches, or None where only a download can help.

    Raises:
        InputError: a named folder holds no data set.
    """
    named = named_folder(root)
    place = named or _cache()
    for layout in _LAYOUTS:
        for folder in (place / layout, place):
            if folder.name == layout and folder.is_dir():
                return folder
    if named is not None:
        raise InputError(f"{named}: holds neither {' nor '.join(_LAYOUTS)}")
    return None


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache("kfacerr"))


def _download(release: Release, allowed: bool) -> Path:
    """Fetch the archive into the cache, check it, unpack it there; return the folder of batches."""
    import pooch

    hint = "name a folder that holds cifar-10-batches-bin or cifar-10-batches-py with --data DIR"
    if not allowed:
        raise InputError(f"CIFAR-10 is not in {_cache()}; {hint}")
    # Unpacked one folder down and then moved, so that an interrupted unpacking is not taken for a data set.
    unpack = pooch.Untar(
        members=[f"cifar-10-batches-bin/{batch}.bin" for batch in _BATCHES], extract_dir="unpacking"
    )
    archive = _cache() / "cifar-10-binary.tar.gz"
    shutil.rmtree(_cache() / "unpacking", ignore_errors=True)  # what an interrupted unpacking left
    try:
        pooch.retrieve(
            release.url,
            known_hash=f"sha256:{release.archive_sha256}",
            fname=archive.name,
            path=_cache(),
            processor=unpack,
            progressbar=True,
        )
        folder = _cache() / "cifar-10-batches-bin"
        (_cache() / "unpacking" / folder.name).rename(folder)
        (_cache() / "unpacking").rmdir()
        archive.unlink()
    except Exception as error:  # of requests, pooch, tarfile and the file system
        reason = " ".join(str(error).split())
        raise InputError(f"CIFAR-10 could not be downloaded from {release.url}: {reason}; {hint}") from error
    return folder


# Parsing the two layouts. Both give images (N, 3072) uint8 in the order (channel, row, column), labels (N,).

_Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


def _parse_binary(file: Path, content: bytes, records: int) -> _Batch:
    """Records of one label byte and 3072 pixel bytes."""
    size = records * (1 + _PIXELS)
    if len(content) != size:
        raise InputError(f"{file}: {len(content)} bytes instead of {size}; the file is cut short or foreign")
    rows = np.frombuffer(content, np.uint8).reshape(records, 1 + _PIXELS)
    return rows[:, 1:], checked_labels(file, rows[:, 0])


def _parse_pickle(file: Path, content: bytes, records: int) -> _Batch:
    """A dictionary pickled by Python 2: b"data", a (N, 3072) uint8 array, and b"labels", a list."""
    try:
        _check_size(content)
        batch = _DataOnlyUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = batch[b"data"].array(), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: not a readable batch of CIFAR-10: {reason}") from error
    if images.shape != (records, _PIXELS) or labels.shape != (records,):
        raise InputError(
            f"{file}: images {images.shape} and labels {labels.shape}, expected {records} images of {_PIXELS}"
        )
    return images, checked_labels(file, labels)


def _check_size(content: bytes) -> None:
    """Refuses a pickle that takes more memory than it has bytes: a memo is as long as its largest index."""
    for operation, argument, _ in pickletools.genops(content):  # refuses itself what is cut short
        if "PUT" in operation.name and int(str(argument)) > len(content):
            raise ValueError(f"it asks for {argument} places in {len(content)} bytes")


class _PickledDtype:
    """Stands for `numpy.dtype` while unpickling; remembers the type's code only."""

    def __init__(self, code: bytes | str = "", *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass  # byte order and the like, which uint8 does not have


class _PickledArray:
    """Stands for `numpy.ndarray` while unpickling; holds the state that NumPy would have been given."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        _version, shape, dtype, fortran_order, data = self.state
        if dtype.code not in (b"u1", "u1") or fortran_order:
            raise ValueError("the images are not a uint8 array in C order")
        return np.frombuffer(data, np.uint8).reshape(shape)


class _DataOnlyUnpickler(pickle.Unpickler):
    """Reads numbers, strings, containers and arrays; it knows no names but those of the two inert classes.

    A pickle acts only through the callables that `find_class` returns, so this one cannot act at all; it
    does not even import the modules it names.
    """

    _KNOWN: ClassVar = {
        ("numpy", "dtype"): _PickledDtype,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,  # the name up to NumPy 1
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,  # and since
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"refusing to load {module}.{name}")
        return self._KNOWN[module, name]
