"""K-factor recordings on disk: a layer's stream of steps in HDF5, written once, replayed at will.

The layout (format "kfacerr-recording", version 1 or 2), which any program may write:

    /                  attributes format = "kfacerr-recording", version = 1 or 2
    /layers/<name>     attributes bias, batch_size, update_every
        k              (N,) int64, strictly increasing iterations
        update         (N,) uint8, 1 where the EA factors take this step's columns
        A, G           (N, d_A, n), (N, d_G, n) float32 or float16, chunked one step per chunk
        windows        (W, 3) int64 rows: first k, length in iterations, epoch
        phi            (N,) float64, optional damping ratio of each iteration
        n              (N,) int64, version 2 alone, optional: the step has this many columns, the first of its n

Further attributes, datasets and groups are ignored, also in /layers: a layer is a group that has k, A or G.
Steps outside the windows need only be there where `update` is 1.

A file is data and leads nowhere else: soft and external links, external storage, virtual datasets and object types
are refused, and sizes are held against the file's own before anything is read.

`kfacerr.recorder` writes it.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np

from .checks import path_of
from .exceptions import InputError
from .files import check_claim
from .stream import Step, Window

__all__ = ["FORMAT", "VERSIONS", "LayerRecording", "Recording"]

FORMAT = "kfacerr-recording"
VERSIONS = (1, 2)

# What h5py raises on damaged bytes.
_UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError)


class Recording:
    """Reads a recording, this package's or any other program's in the same layout; a context manager.

    A layer's description is validated when the layer is asked for, so that one bad layer spoils no other; its
    columns are read and checked step by step.

    Args:
        path: the HDF5 file, finished or partial.

    Attributes:
        path: the file.
        version: of its format.
        layers: the names of the layers it holds.

    Raises:
        InputError: in one line, naming the file and its fault.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path_of(path)
        self._file = open_file(self.path, "r")
        with closed_on_error(self._file, self.path):
            self.version = int(self._file.attrs["version"])
            self.layers = layer_groups(self._file)
        self._layers: dict[str, LayerRecording] = {}

    def __repr__(self) -> str:
        return f"<kfacerr Recording {str(self.path)!r} of {listed(self.layers)}>"

    def layer(self, name: str) -> "LayerRecording":
        """The named layer, validated; an InputError names its fault, or lists the layers there are."""
        if not self._file:
            raise InputError(f"{self.path}: the recording is closed")
        if name not in self.layers:
            hint = " (layer names must not contain '/')" if "/" in str(name) else ""
            raise InputError(f"{self.path}: no layer {name!r}; there are {listed(self.layers)}{hint}")
        if name not in self._layers:
            with in_one_line(self.path, _UNREADABLE):
                group = member(self._file["layers"], name, f"{self.path}: layer {name!r}")
                self._layers[name] = LayerRecording(self.path, name, group)
        return self._layers[name]

    def info(self) -> dict[str, Any]:
        """What the file holds, as plain values that JSON can take; `faults` are those of the other layers."""
        layers, faults = {}, []
        for name in self.layers:
            try:
                layers[name] = self.layer(name).info()
            except InputError as error:
                faults.append(str(error))
        return {
            "path": str(self.path),
            "format": FORMAT,
            "version": self.version,
            "bytes": self.path.stat().st_size,
            "layers": layers,
            "faults": faults,
        }

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LayerRecording:
    """One layer of a recording; got from `Recording.layer`.

    Args:
        path: of the recording, for errors.
        name: of the layer.
        group: its open HDF5 group.

    Attributes:
        name: the layer.
        d_A, d_G, n: its columns' shapes are (d_A, n) and (d_G, n); at most n where `widths` is given.
        widths: (N,) int64, the columns of each step; None where all have n.
        dtype: of the columns as stored.
        bias, batch_size, update_every: see `kfacerr.recorder.RecordingWriter.add_layer`.
        windows: list of `Window`, in the order of their start.
        k: (N,) int64, the iterations.
        update: (N,) bool.
        phi: (N,) float64, or None.
    """

    def __init__(self, path: Path, name: str, group: Any) -> None:
        self.path, self.name = path, name
        where = f"{path}: layer {name!r}"
        self._A, self._G = _columns_of(group, where)
        self.k, self.update, self.phi, self.widths, self.windows = _read_series(group, where)
        self.d_A, self.d_G, self.n = self._A.shape[1], self._G.shape[1], self._A.shape[2]
        self.dtype = self._A.dtype
        self.bias = bool(_read_integer(group, "bias", where, 0))
        self.batch_size = _read_integer(group, "batch_size", where, 1)
        self.update_every = _read_integer(group, "update_every", where, 1)

    def __repr__(self) -> str:
        sizes = f"d_A={self.d_A}, d_G={self.d_G}, n={self.n}"
        return f"<kfacerr LayerRecording {self.name!r}: {sizes}, {len(self)} steps>"

    def __len__(self) -> int:
        return len(self.k)

    @property
    def has_phi(self) -> bool:
        return self.phi is not None

    def recorded(self, window: Window) -> int:
        """The number of a window's iterations that are there; fewer than its length in an interrupted run."""
        return len(self._inside(window))

    def _inside(self, window: Window) -> np.ndarray:
        return self.k[(self.k >= window.start) & (self.k < window.start + window.length)]

    def steps(self) -> Iterator[Step]:
        """The stream, one step in memory at a time, columns as float32 (float64 where that is stored).

        Yields:
            `Step`s in NumPy.

        Raises:
            InputError: where columns cannot be read or hold NaN or Inf; names file, layer and iteration.
        """
        for i in range(len(self)):
            where = f"{self.path}: layer {self.name!r}, iteration {self.k[i]}"
            n = self.n if self.widths is None else int(self.widths[i])
            A, G = _read_columns(self._A, i, n, f"{where}: A"), _read_columns(self._G, i, n, f"{where}: G")
            phi = None if self.phi is None else float(self.phi[i])
            yield Step(int(self.k[i]), A, G, bool(self.update[i]), phi)

    def info(self) -> dict[str, Any]:
        """What the layer holds, as plain values."""
        return {
            "d_A": self.d_A,
            "d_G": self.d_G,
            "n": self.n if self.widths is None else f"up to {self.n}",
            "bias": self.bias,
            "batch_size": self.batch_size,
            "update_every": self.update_every,
            "dtype": str(self.dtype),
            "steps": len(self),
            "updates": int(self.update.sum()),
            "first_k": int(self.k[0]) if len(self) else None,
            "last_k": int(self.k[-1]) if len(self) else None,
            "has_phi": self.has_phi,
            "windows": [self._window(w) for w in self.windows],
        }

    def _window(self, window: Window) -> dict[str, int | None]:
        there = self._inside(window)
        return {
            **window._asdict(),
            "recorded": len(there),
            "first_recorded": int(there[0]) if len(there) else None,
        }


def open_file(path: Path, mode: str) -> h5py.File:
    """The HDF5 file, once its format, version and /layers group are as they should be."""
    try:
        with path.open("rb") if path.is_file() else nullcontext() as there:
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if there is None:
        raise InputError(f"{path}: {'is no regular file' if path.exists() else 'no such file'}")
    try:
        if not h5py.is_hdf5(path):
            raise InputError(f"{path}: not an HDF5 file")
        file = h5py.File(path, mode)
    except InputError:
        raise
    except BlockingIOError as error:
        raise InputError(f"{path}: in use by another process") from error
    except _UNREADABLE as error:
        raise InputError(f"{path}: truncated or damaged: {first_line(error)}") from error
    with closed_on_error(file, path):
        _check_root(file, path)
    return file


@contextmanager
def closed_on_error(file: h5py.File, path: Path) -> Iterator[None]:
    """Closes the file if its inspection fails, and says in one line what h5py says in many."""
    try:
        with in_one_line(path, _UNREADABLE):
            yield
    except InputError:
        file.close()
        raise


@contextmanager
def in_one_line(path: Path, damaged: tuple[type[Exception], ...]) -> Iterator[None]:
    """Says what a reader raises on bytes that are not what they seem; `damaged` are its errors."""
    try:
        yield
    except InputError:
        raise
    except damaged as error:
        raise InputError(f"{path}: truncated or damaged: {first_line(error)}") from error


def layer_groups(file: h5py.File) -> list[str]:
    """The layers' names; whatever else is in /layers is left out. A link is named, and refused when asked for."""
    layers = file["layers"]
    return [name for name in layers if not _is_hard(layers, name) or _is_layer(layers[name])]


def _is_layer(entry: Any) -> bool:
    return isinstance(entry, h5py.Group) and any(part in entry for part in ("k", "A", "G"))


def _is_hard(group: Any, name: str) -> bool:
    return isinstance(group.get(name, getlink=True), h5py.HardLink)


def member(group: Any, name: str, where: str) -> Any:
    """What a group holds by that name, None if nothing; refuses links, which may lead out of the file."""
    if name not in group and group.get(name, getlink=True) is None:
        return None
    if not _is_hard(group, name):
        raise InputError(f"{where}: {name} is a soft or external link, which is not followed: copy the data in")
    return group[name]


def _check_root(file: h5py.File, path: Path) -> None:
    kind = file.attrs.get("format")
    if isinstance(kind, np.ndarray) and kind.size == 1:
        kind = kind.item()
    if isinstance(kind, bytes):  # a fixed-length string, as C programs and MATLAB write them
        kind = kind.decode("utf-8", "replace").rstrip("\0 ")
    if kind != FORMAT:
        raise InputError(f"{path}: not a {FORMAT} (attribute format is {kind!r})")
    version = _read_integer(file, "version", str(path), 0)
    if version not in VERSIONS:
        raise InputError(f"{path}: version {version} of the format is not supported, only {listed(VERSIONS)}")
    if not isinstance(member(file, "layers", str(path)), h5py.Group):
        raise InputError(f"{path}: has no group /layers")
    if not all(isinstance(name, str) for name in file["layers"]):
        raise InputError(f"{path}: truncated or damaged: a layer's name is not UTF-8")


def _dataset(group: Any, name: str, where: str) -> Any:
    """A dataset that stands in the file itself, or None if there is nothing of that name."""
    found = member(group, name, where)
    if found is None:
        return None
    if not isinstance(found, h5py.Dataset):
        raise InputError(f"{where}: {name} is not a dataset")
    if found.external or found.is_virtual:
        kind = "external storage" if found.external else "a virtual dataset"
        raise InputError(f"{where}: {name} is {kind}, which is not followed: copy the data in")
    return found


def check_own(group: Any, where: str) -> None:
    """Refuses a layer any of whose datasets stands elsewhere."""
    for name in (*series_names(group), "windows"):
        _dataset(group, name, where)


def _check_claim(dataset: Any, elements: int, where: str) -> None:
    check_claim(elements * dataset.dtype.itemsize, dataset.file.filename, where)


def _columns_of(group: Any, where: str) -> tuple[Any, Any]:
    """A and G as datasets."""
    found = {name: _dataset(group, name, where) for name in ("k", "update", "A", "G", "windows")}
    missing = [name for name, dataset in found.items() if dataset is None]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    for name in "AG":
        X = found[name]
        if X.ndim != 3 or X.dtype.kind != "f" or 0 in X.shape[1:]:
            raise InputError(f"{where}: {name} must be float32 or float16 (N, d, n), is {X.dtype} {X.shape}")
        _check_claim(X, X.shape[1] * X.shape[2], f"{where}: a step of {name}")
    if found["A"].shape[2] != found["G"].shape[2]:
        raise InputError(f"{where}: A has {found['A'].shape[2]} columns a step, G has {found['G'].shape[2]}")
    return found["A"], found["G"]


def _read_series(
    group: Any, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, list[Window]]:
    """k, update, phi and n, each (N,), and the windows; all of them validated."""
    varies = group.file.attrs["version"] >= 2
    kinds = {"k": "iu", "update": "iub", "phi": "fiu"} | ({"n": "iu"} if varies else {})
    found = {name: _dataset(group, name, where) for name in kinds}
    found = {name: dataset for name, dataset in found.items() if dataset is not None}
    for name, dataset in found.items():
        if dataset.ndim != 1 or dataset.dtype.kind not in kinds[name]:
            expected = "real" if name == "phi" else "integer"
            raise InputError(f"{where}: {name} must be {expected} (N,), is {dataset.dtype} {dataset.shape}")
        _check_claim(dataset, dataset.shape[0], f"{where}: {name}")
    lengths = {name: dataset.shape[0] for name, dataset in found.items()}
    lengths |= {name: group[name].shape[0] for name in "AG"}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"{where}: datasets differ in their number of steps: {told}")
    k, update = found["k"][:].astype(np.int64), found["update"][:]
    _check_series(k, update, where)
    phi = _read_phi(found["phi"], k, where) if "phi" in found else None
    widths = _read_widths(found["n"], k, group["A"].shape[2], where) if "n" in found else None
    return k, update.astype(bool), phi, widths, _read_windows(group, where)


def _read_windows(group: Any, where: str) -> list[Window]:
    dataset = _dataset(group, "windows", where)
    _check_claim(dataset, dataset.size or 0, f"{where}: windows")
    rows = dataset[()]
    check_windows(rows, where)
    return to_windows(rows)


def _check_series(k: np.ndarray, update: np.ndarray, where: str) -> None:
    falls = np.flatnonzero(np.diff(k, prepend=-1) <= 0)
    if falls.size:
        i = int(falls[0])
        before = f"after {k[i - 1]}" if i else "at the start"
        raise InputError(f"{where}: k must increase strictly from 0, but is {k[i]} {before} (step {i})")
    odd = np.flatnonzero((update != 0) & (update != 1))
    if odd.size:
        raise InputError(f"{where}, iteration {k[odd[0]]}: update must be 0 or 1, is {update[odd[0]]}")


def _read_phi(phi: Any, k: np.ndarray, where: str) -> np.ndarray:
    values: np.ndarray = phi[:].astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        raise InputError(f"{where}, iteration {k[bad[0]]}: phi must be positive, is {values[bad[0]]}")
    return values


def _read_widths(n: Any, k: np.ndarray, most: int, where: str) -> np.ndarray:
    values: np.ndarray = n[:].astype(np.int64)
    bad = np.flatnonzero((values < 0) | (values > most))
    if bad.size:
        raise InputError(f"{where}, iteration {k[bad[0]]}: n must lie in 0..{most}, is {values[bad[0]]}")
    return values


def check_windows(rows: np.ndarray, where: str) -> None:
    """Windows are integer rows (first k >= 0, length >= 1, epoch) that do not overlap; nothing at all is none."""
    if rows.shape == (0,):  # as some programs write an empty table
        return
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind not in "iu":
        raise InputError(f"{where}: windows must be integer (W, 3), is {rows.dtype} {rows.shape}")
    windows = to_windows(rows)
    for window in windows:
        if window.start < 0 or window.length < 1:
            raise InputError(f"{where}: window (first k {window.start}, length {window.length}) is empty")
    for one, two in itertools.pairwise(windows):
        if one.start + one.length > two.start:
            raise InputError(f"{where}: the windows at iterations {one.start} and {two.start} overlap")


def to_windows(rows: np.ndarray) -> list[Window]:
    return sorted(Window(*map(int, row)) for row in rows)


def _read_integer(owner: Any, attribute: str, where: str, least: int) -> int:
    """A whole number, whatever type it was written in, also as an array of one element."""
    if attribute not in owner.attrs:
        raise InputError(f"{where} lacks the attribute {attribute}")
    value = np.asarray(owner.attrs[attribute])
    if value.size != 1 or value.dtype.kind not in "iubf" or value.item() < least or value.item() % 1 != 0:
        raise InputError(f"{where}: attribute {attribute} must be an integer >= {least}, is {value.tolist()!r}")
    return int(value.item())


def _read_columns(dataset: Any, i: int, n: int, where: str) -> np.ndarray:
    try:
        columns = dataset[i, :, :n]
    except _UNREADABLE as error:
        raise InputError(f"{where} cannot be read, the file is damaged: {first_line(error)}") from error
    if not np.isfinite(columns).all():
        raise InputError(f"{where} holds NaN or Inf")
    return columns.astype(np.float64 if dataset.dtype.itemsize > 4 else np.float32, copy=False)


def listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def series_names(group: Any) -> list[str]:
    """The datasets of a layer with an entry a step, those that are there."""
    return [name for name in ("k", "update", "A", "G", "phi", "n") if name in group]
