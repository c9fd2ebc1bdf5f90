"""K-factor recordings on disk: a layer's stream of steps in HDF5, written once, replayed at will.

The layout (format "kfacerr-recording", version 1), which any program may write:

    /                  attributes format = "kfacerr-recording", version = 1
    /layers/<name>     attributes bias, batch_size, update_every
        k              (N,) int64, strictly increasing iterations
        update         (N,) uint8, 1 where the EA factors take this step's columns
        A, G           (N, d_A, n), (N, d_G, n) float32 or float16, chunked one step per chunk
        windows        (W, 3) int64 rows: first k, length in iterations, epoch
        phi            (N,) float64, optional damping ratio of each iteration

Further attributes, datasets and groups are ignored, also in /layers: a layer is a group that has k, A or G.
Steps outside the windows need only be there where `update` is 1.

`kfacerr.recorder` writes it.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np

from .exceptions import InputError
from .stream import Step, Window

__all__ = ["FORMAT", "VERSION", "LayerRecording", "Recording"]

FORMAT = "kfacerr-recording"
VERSION = 1

_UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError)  # what h5py raises on damaged bytes


class Recording:
    """Reads a recording, this package's or any other program's in the same layout; a context manager.

    A layer's description is validated when the layer is asked for, so that one bad layer spoils no other; its
    columns are read and checked step by step.

    Args:
        path: the HDF5 file, finished or partial.

    Attributes:
        path: the file.
        layers: the names of the layers it holds.

    Raises:
        InputError: in one line, naming the file and its fault.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open_file(self.path, "r")
        with closed_on_error(self._file, self.path):
            self._groups = layer_groups(self._file)
        self._layers: dict[str, LayerRecording] = {}
        self.layers = list(self._groups)

    def layer(self, name: str) -> "LayerRecording":
        """The named layer, validated; an InputError names its fault, or lists the layers there are."""
        if name not in self._groups:
            hint = " (layer names must not contain '/')" if "/" in name else ""
            raise InputError(f"{self.path}: no layer {name!r}; there are {listed(self.layers)}{hint}")
        if name not in self._layers:
            with _in_one_line(self.path):
                self._layers[name] = LayerRecording(self.path, name, self._groups[name])
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
            "version": VERSION,
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

    Attributes:
        name: the layer.
        d_A, d_G, n: its columns' shapes are (d_A, n) and (d_G, n).
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
        self._A, self._G, self.k, self.update, self.phi, windows = _read_datasets(group, where)
        self.d_A, self.d_G, self.n = self._A.shape[1], self._G.shape[1], self._A.shape[2]
        self.dtype = self._A.dtype
        self.bias = bool(_read_integer(group, "bias", where, 0))
        self.batch_size = _read_integer(group, "batch_size", where, 1)
        self.update_every = _read_integer(group, "update_every", where, 1)
        self.windows = to_windows(windows)

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

        Raises:
            InputError: where columns cannot be read or hold NaN or Inf; names file, layer and iteration.
        """
        for i in range(len(self)):
            where = f"{self.path}: layer {self.name!r}, iteration {self.k[i]}"
            A, G = _read_columns(self._A, i, f"{where}: A"), _read_columns(self._G, i, f"{where}: G")
            phi = None if self.phi is None else float(self.phi[i])
            yield Step(int(self.k[i]), A, G, bool(self.update[i]), phi)

    def info(self) -> dict[str, Any]:
        """What the layer holds, as plain values."""
        return {
            "d_A": self.d_A,
            "d_G": self.d_G,
            "n": self.n,
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
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not h5py.is_hdf5(path):
        raise InputError(f"{path}: not an HDF5 file")
    try:
        file = h5py.File(path, mode)
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
        with _in_one_line(path):
            yield
    except InputError:
        file.close()
        raise


@contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path}: truncated or damaged: {first_line(error)}") from error


def layer_groups(file: h5py.File) -> dict[str, Any]:
    """The layers' groups by name, not validated; whatever else is in /layers is left out.

    `get` is None for a link that leads nowhere.
    """
    found = {name: file["layers"].get(name) for name in file["layers"]}
    return {
        name: group
        for name, group in found.items()
        if isinstance(group, h5py.Group) and any(part in group for part in ("k", "A", "G"))
    }


def _check_root(file: h5py.File, path: Path) -> None:
    kind = file.attrs.get("format")
    if isinstance(kind, np.ndarray) and kind.size == 1:
        kind = kind.item()
    if isinstance(kind, bytes):  # a fixed-length string, as C programs and MATLAB write them
        kind = kind.decode("utf-8", "replace").rstrip("\0 ")
    if kind != FORMAT:
        raise InputError(f"{path}: not a {FORMAT} (attribute format is {kind!r})")
    version = _read_integer(file, "version", str(path), 0)
    if version != VERSION:
        raise InputError(f"{path}: version {version} of the format is not supported, only {VERSION}")
    if not isinstance(file.get("layers"), h5py.Group):
        raise InputError(f"{path}: has no group /layers")
    if not all(isinstance(name, str) for name in file["layers"]):
        raise InputError(f"{path}: truncated or damaged: a layer's name is not UTF-8")


def _read_datasets(
    group: Any, where: str
) -> tuple[Any, Any, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """A and G as datasets; k, update, phi and the windows' rows as arrays; all of them validated."""
    required = ("k", "update", "A", "G", "windows")
    missing = [name for name in required if not isinstance(group.get(name), h5py.Dataset)]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    for name in "AG":
        if group[name].ndim != 3 or group[name].dtype.kind != "f" or 0 in group[name].shape[1:]:
            raise InputError(
                f"{where}: {name} must be float32 or float16 (N, d, n), is {group[name].dtype} {group[name].shape}"
            )
    if group["A"].shape[2] != group["G"].shape[2]:
        raise InputError(f"{where}: A has {group['A'].shape[2]} columns a step, G has {group['G'].shape[2]}")
    phi = group.get("phi")
    kinds = {"k": "iu", "update": "iub"} | ({} if phi is None else {"phi": "fiu"})
    for name, allowed in kinds.items():
        if not isinstance(group[name], h5py.Dataset):
            raise InputError(f"{where}: {name} is not a dataset")
        if group[name].ndim != 1 or group[name].dtype.kind not in allowed:
            expected = "real" if name == "phi" else "integer"
            raise InputError(
                f"{where}: {name} must be {expected} (N,), is {group[name].dtype} {group[name].shape}"
            )
    lengths = {name: group[name].shape[0] for name in series_names(group)}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"{where}: datasets differ in their number of steps: {found}")
    k, update, windows = group["k"][:].astype(np.int64), group["update"][:], group["windows"][()]
    _check_series(k, update, where)
    check_windows(windows, where)
    return group["A"], group["G"], k, update.astype(bool), _read_phi(phi, k, where), windows


def _check_series(k: np.ndarray, update: np.ndarray, where: str) -> None:
    falls = np.flatnonzero(np.diff(k, prepend=-1) <= 0)
    if falls.size:
        i = int(falls[0])
        before = f"after {k[i - 1]}" if i else "at the start"
        raise InputError(f"{where}: k must increase strictly from 0, but is {k[i]} {before} (step {i})")
    odd = np.flatnonzero((update != 0) & (update != 1))
    if odd.size:
        raise InputError(f"{where}, iteration {k[odd[0]]}: update must be 0 or 1, is {update[odd[0]]}")


def _read_phi(phi: Any, k: np.ndarray, where: str) -> np.ndarray | None:
    if phi is None:
        return None
    values = phi[:].astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        raise InputError(f"{where}, iteration {k[bad[0]]}: phi must be positive, is {values[bad[0]]}")
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


def _read_columns(dataset: Any, i: int, where: str) -> np.ndarray:
    try:
        columns = dataset[i]
    except _UNREADABLE as error:
        raise InputError(f"{where} cannot be read, the file is damaged: {first_line(error)}") from error
    if not np.isfinite(columns).all():
        raise InputError(f"{where} holds NaN or Inf")
    return columns.astype(np.float64 if dataset.dtype.itemsize > 4 else np.float32, copy=False)


def listed(names: Any) -> str:
    return ", ".join(names) or "none"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def series_names(group: Any) -> list[str]:
    """The datasets of a layer with an entry a step, those that are there."""
    return [name for name in ("k", "update", "A", "G", "phi") if name in group]
