"""Files and folders that hold K-factors, read as the trees that `kfacerr.stored` looks through.

The kind of a file is told by its first bytes: safetensors, HDF5, NumPy's .npy and .npz, what `torch.save` wrote.
Arrays are read one at a time, when they are asked for.

Nothing in a file is executed. `torch.load` runs with weights_only, and classes that it does not know become
`_Inert` objects, which do nothing; NumPy's pickles stay unread. Links, in HDF5 or among the files of a folder, are
refused, and sizes are held against the file's own before anything is read.
"""

import functools
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np

from .exceptions import InputError
from .files import check_claim
from .recording import FORMAT, in_one_line, listed
from .stored import StoredArray, stored, stored_leaves

__all__ = ["read_tree"]


def read_tree(path: Path) -> Any:
    """What a file, or a folder such as kronfluence and bergson write, holds.

    Args:
        path: the file or the folder.

    Returns:
        A tree as `kfacerr.stored.stored` gives it.

    Raises:
        InputError: it is not there, damaged, or of no kind that is known; names it.
    """
    if path.is_dir():
        return _folder(path)
    tree = _file(path)
    match = _TABLE.fullmatch(path.stem)
    if match is None:
        return tree
    counts = path.with_name(
        f"num_{match[1]}_processed{match[2]}{path.suffix}"
    )  # a sum's count has a file of its own
    return _kronfluence([path, *([counts] if counts.is_file() else [])])


# ------------------------------------------------------------------------------------------------- folders

_TABLE = re.compile(
    r"((?:activation|gradient)_(?:covariance|eigenvectors)|num_(?:activation_|gradient_)?covariance_processed)"
    r"((?:_data_partition\d+_module_partition\d+)?)"
)
"""The files of a factors_NAME folder of kronfluence that matter here."""

_SHARDED = re.compile(r"(eigen_)?(activation|gradient)_sharded")
"""The folders of a run of bergson that do."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".npz", ".npy", ".h5", ".hdf5")


def _folder(path: Path) -> Any:
    """One of kronfluence's factors_NAME, one of bergson's runs, or folders and files of several of them."""
    children = _children(path)
    tables = [child for child in children if child.suffix == ".safetensors" and _TABLE.fullmatch(child.stem)]
    if tables:
        return _kronfluence(tables)
    if _SHARDED.fullmatch(path.name):
        return _bergson(path.parent, [path])
    shards = [child for child in children if child.is_dir() and _SHARDED.fullmatch(child.name)]
    if shards:
        return _bergson(path, shards)
    trees = {
        child.name.removeprefix("factors_"): _folder(child)
        for child in children
        if child.is_dir() and child.name.startswith("factors_")
    }
    trees |= {child.stem: _file(_own(child)) for child in children if child.suffix in _SUFFIXES}
    if not trees:
        some = [child.name for child in children[:8]] + ["..."] * (len(children) > 8)
        raise InputError(f"{path}: holds no {', '.join(_SUFFIXES)} and no folder of factors, only {listed(some)}")
    return next(iter(trees.values())) if len(trees) == 1 else trees


def _children(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _own(path: Path) -> Path:
    """A child of a folder that is no link, which may lead anywhere."""
    if path.is_symlink():
        raise InputError(f"{path}: is a link, which is not followed: copy the file, or give what it leads to")
    return path


def _kronfluence(files: list[Path]) -> dict[str, Any]:
    """{"activation_covariance": {layer: sum}, ...}; parts of the data are added where no file holds their sum."""
    tree: dict[str, Any] = {}
    whole = {child.stem for child in files}
    for child in files:
        name, part = _TABLE.fullmatch(child.stem).groups()  # type: ignore[union-attr]
        if part and name in whole:
            continue
        held = tree.setdefault(name, {})
        for layer, array in _file(_own(child)).items():
            held[layer] = _joined(held[layer], array, np.add) if layer in held else array
    return tree


def _bergson(run: Path, folders: list[Path]) -> dict[str, Any]:
    """{"activation_sharded": {layer: sum}, ...}; each shard has some rows of every matrix."""
    tree: dict[str, Any] = {}
    for folder in folders:
        ranks = {
            int(m[1]): c for c in _children(folder) if (m := re.fullmatch(r"shard_(\d+)\.safetensors", c.name))
        }
        if not ranks or sorted(ranks) != list(range(len(ranks))):
            raise InputError(f"{folder}: holds shards {listed(sorted(ranks))}, some are missing")
        held = tree.setdefault(folder.name, {})
        for _, child in sorted(ranks.items()):
            for layer, array in _file(_own(child)).items():
                held[layer] = _joined(held[layer], array, _stacked) if layer in held else array
    total = run / "total_processed.pt"
    return tree | ({"total_processed": _file(_own(total))} if total.is_file() else {})


def _stacked(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.concatenate([one, two])


def _joined(
    one: StoredArray, two: StoredArray, join: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> StoredArray:
    rows = one.shape[0] + two.shape[0] if join is _stacked else one.shape[0]
    return StoredArray((rows, *one.shape[1:]), one.dtype, lambda: join(one.read(), two.read()))


# --------------------------------------------------------------------------------------------------- files


def _file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: {'is a pipe or a device' if path.exists() else 'no such file or folder'}")
    with in_one_line(path, _DAMAGED):
        with path.open("rb") as file:
            head = file.read(16)
        for known, reader in _READERS:
            if known(path, head):
                return reader(path)
    kinds = "safetensors, HDF5, .npz, .npy or what torch.save writes"
    raise InputError(f"{path}: not {kinds}: save the factors in one of these")


_DAMAGED = (
    *(OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, MemoryError, AttributeError),
    *(OverflowError, NotImplementedError, zipfile.BadZipFile, pickle.UnpicklingError),
)
"""What the readers raise on bytes that are not what they seem."""


def _later(path: Path, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """`read`, with errors that name the file."""

    def reading() -> np.ndarray:
        with in_one_line(path, _DAMAGED):
            return read()

    return reading


def _safetensors(path: Path) -> dict[str, StoredArray]:
    try:
        import safetensors
    except ImportError:
        raise InputError(f"{path}: needs safetensors (pip install 'kfacerr[safetensors]')") from None
    framework = "pt" if find_spec("torch") else "np"  # NumPy has no bfloat16

    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(path, framework=framework) as file:
            return stored(file.get_tensor(name)).read()

    damaged = (safetensors.SafetensorError,)
    with in_one_line(path, damaged), safetensors.safe_open(path, framework=framework) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: StoredArray(
                tuple(held.get_shape()),
                _SAFETENSORS.get(held.get_dtype(), held.get_dtype()),
                _later(path, functools.partial(read, name)),
            )
            for name, held in slices.items()
        }


_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


def _hdf5(path: Path) -> dict[str, Any]:
    import h5py

    def read(name: str) -> np.ndarray:
        with h5py.File(path, "r") as again:
            return again[name][()]

    tree: dict[str, Any] = {}
    links: dict[str, Any] = {}
    with h5py.File(path, "r") as file:
        if file.attrs.get("format") in (FORMAT, FORMAT.encode()):
            raise InputError(f"{path}: is a recording of columns, not of factors: see kfacerr report {path}")
        file.visititems_links(links.__setitem__)  # each once, none followed
        for name, link in links.items():
            if not isinstance(link, h5py.HardLink):
                raise InputError(
                    f"{path}: {name} is a soft or external link, which is not followed: copy the data in"
                )
            held = file[name]
            if not isinstance(held, h5py.Dataset) or held.dtype.kind not in "fiu":
                continue
            if held.external or held.is_virtual:
                raise InputError(f"{path}: {name} is stored elsewhere, which is not followed: copy the data in")
            check_claim(held.size * held.dtype.itemsize, path, f"{path}: {name}")
            *groups, last = name.split("/")
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = StoredArray(held.shape, held.dtype.name, _later(path, functools.partial(read, name)))
    return tree


def _npy(path: Path) -> StoredArray:
    """Mapped, so that its size is the file's."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    return StoredArray(values.shape, values.dtype.name, lambda: np.array(values))


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _npz(path: Path) -> dict[str, StoredArray]:
    tree: dict[str, StoredArray] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                header = _HEADERS.get(np.lib.format.read_magic(file))
                if header is None:  # (3, 0): fields with names beyond Latin-1
                    continue
                shape, _, dtype = header(file)
            name = member.filename.removesuffix(".npy")
            if dtype.kind in "fiu":  # not what would need a pickle
                check_claim(int(np.prod(shape, dtype=object)) * dtype.itemsize, path, f"{path}: {name}")
                tree[name] = StoredArray(shape, dtype.name, _later(path, functools.partial(_of_npz, path, name)))
    return tree


def _of_npz(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as held:
        return held[name]


class _Inert:
    """Stands for an object of a class that the unpickler does not know; does nothing with what it is given."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(f"{path}: needs PyTorch (pip install 'kfacerr[torch]')") from None
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise InputError(f"{path}: needs PyTorch >= 2.6, there is {torch.__version__}")
    zipped = zipfile.is_zipfile(path)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    with warnings.catch_warnings(), torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
        warnings.simplefilter("ignore")  # of protocols that it does not expect, and then refuses
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    tree = stored(held)
    for name, array in stored_leaves(tree):
        check_claim(int(np.prod(array.shape, dtype=object)) * 4, path, f"{path}: {name}")
    return tree


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


_READERS: list[tuple[Callable[[Path, bytes], bool], Callable[[Path], Any]]] = [
    (lambda path, head: head.startswith(b"\x93NUMPY"), _npy),
    (lambda path, head: head.startswith(b"PK\x03\x04") and _is_npz(path), _npz),
    (lambda path, head: head[6:9] == b"\0\0{" or path.suffix == ".safetensors", _safetensors),
    (lambda path, head: head.startswith((b"PK\x03\x04", b"\x80")), _torch),
    (lambda path, head: _is_hdf5(path), _hdf5),
]


def _is_hdf5(path: Path) -> bool:
    import h5py

    return bool(h5py.is_hdf5(path))
