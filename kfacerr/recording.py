"""K-factor recordings on disk: a layer's stream of steps in HDF5, written once, replayed at will.

The layout (format "kfacerr-recording", version 1), which any program may write:

    /                  attributes format = "kfacerr-recording", version = 1
    /layers/<name>     attributes bias, batch_size, update_every
        k              (N,) int64, strictly increasing iterations
        update         (N,) uint8, 1 where the EA factors take this step's columns
        A, G           (N, d_A, n), (N, d_G, n) float32 or float16, chunked one step per chunk
        windows        (W, 3) int64 rows: first k, length in iterations, epoch
        phi            (N,) float64, optional damping ratio of each iteration

Further attributes and datasets are ignored. Steps outside the windows need only be there where `update` is 1.

A recording under way is called `<name>.partial`, is itself a readable recording, and takes its own name when it
is closed cleanly. Every step is flushed as it comes (0.2 ms for a small layer), so a killed process loses at
most the step being written. Chunks carry a checksum (Fletcher 32, a filter every HDF5 library has; it adds
0.4 ms a MiB). They are not compressed: measured on post-ReLU columns, LZF saves 35-60% of A but takes 8 times as
long to write, gzip 20 times, and LZF cannot be read without h5py.
"""

import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np

from .backend import to_numpy
from .errors import InputError
from .stream import Array, Step, Window

__all__ = ["FORMAT", "VERSION", "LayerRecording", "Recording", "RecordingWriter"]

FORMAT = "kfacerr-recording"
VERSION = 1

log = logging.getLogger(__name__)

_UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError)  # what h5py raises on damaged bytes


# ------------------------------------------------------------------------------------------------ writing


class RecordingWriter:
    """Writes a recording, one step at a time; a context manager.

        with RecordingWriter("run.h5") as writer:
            writer.add_layer("fc", d_A=2049, d_G=10, n=128, bias=True, batch_size=128, update_every=10,
                             windows=[Window(start=500, length=100, epoch=5)])
            for step in stream:
                writer.append("fc", step)

    A clean exit (or `close()`) gives the file its name. An exception, Ctrl-C included, keeps what is there as
    `<path>.partial` and says so in the log; so does `suspend()`. `resume=True` opens that file again:
    then `add_layer` with the same description is accepted, and `truncate` drops the steps after the checkpoint
    that training restarts from. A finished recording can be resumed too, and becomes partial again.

    Args:
        path: where the finished recording will be; missing folders are made.
        overwrite: replace a recording, finished or partial, that is already there.
        resume: continue the partial, or the finished, recording of that name.

    Raises:
        InputError: if something is there already (without overwrite or resume), nothing is (with resume), or
            what is there is no recording.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._last: dict[str, int] = {}  # the last k of each layer
        self._file = self._reopen() if resume else self._create(overwrite)

    @property
    def layers(self) -> list[str]:
        return list(self._last)

    def steps(self, layer: str) -> int:
        """The number of steps recorded of a layer."""
        return int(self._group(layer)["k"].shape[0])

    def add_layer(
        self,
        layer: str,
        *,
        d_A: int,
        d_G: int,
        n: int,
        bias: bool,
        batch_size: int,
        update_every: int,
        windows: Sequence[Window] = (),
        dtype: Any = np.float32,
    ) -> None:
        """Describes a layer before its first step.

        Args:
            layer: its name; dots are welcome, slashes are not (HDF5 would nest).
            d_A, d_G, n: the columns' shapes are (d_A, n) and (d_G, n).
            bias: whether the last row of A is the constant of the bias.
            batch_size: samples in a batch.
            update_every: T_updt.
            windows: where every iteration is recorded and the errors will be measured.
            dtype: float32, or float16 for half the disk: 3 digits, and magnitudes above 65504 are refused.

        Raises:
            InputError: for a bad value, or if the layer is there already with another description.
        """
        if not layer or "/" in layer or layer == ".":
            raise InputError(f"layer name {layer!r}: an HDF5 group needs a name, and one without '/'")
        storage = np.dtype(dtype)
        if storage not in (np.dtype(np.float32), np.dtype(np.float16)):
            raise InputError(f"layer {layer!r}: float32 or float16 is needed, got {storage}")
        sizes = {"d_A": d_A, "d_G": d_G, "n": n, "batch_size": batch_size, "update_every": update_every}
        for key, value in sizes.items():
            if value < 1:
                raise InputError(f"layer {layer!r}: {key} must be positive, got {value}")
        rows = np.array([tuple(w) for w in windows], dtype=np.int64).reshape(-1, 3)
        _check_windows(rows, f"layer {layer!r}")
        if layer in self._last:
            self._check_same(layer, sizes | {"bias": bias, "dtype": storage}, rows)
            return
        group = self._file["layers"].create_group(layer)
        group.attrs["bias"] = np.bool_(bias)
        group.attrs["batch_size"] = batch_size
        group.attrs["update_every"] = update_every
        group.create_dataset("windows", data=rows)
        for name, d in (("A", d_A), ("G", d_G)):
            group.create_dataset(
                name,
                shape=(0, d, n),
                maxshape=(None, d, n),
                chunks=(1, d, n),
                dtype=storage,
                fletcher32=True,
                fillvalue=np.nan,  # a step whose columns never reached the disk reads as NaN and is refused
            )
        _create_series(group, "update", np.uint8)
        _create_series(group, "k", np.int64)
        self._file.flush()
        self._last[layer] = -1

    def append(self, layer: str, step: Step) -> None:
        """Adds a step; its arrays may be NumPy, CuPy or torch.

        Raises:
            InputError: for an unknown layer, a k that does not increase, wrong shapes, NaN or Inf, magnitudes
                beyond float16 where that is the storage, or a disk that refuses. Nothing is written then.
        """
        group = self._group(layer)
        where = f"layer {layer!r}, iteration {step.k}"
        if step.k <= self._last[layer]:
            raise InputError(f"{where}: iterations must increase from 0, the last was {self._last[layer]}")
        arrays = {name: _to_storage(getattr(step, name), group[name], f"{where}: {name}") for name in "AG"}
        count = group["k"].shape[0]
        series: dict[str, Any] = {"update": step.update}
        if step.phi is not None:
            if not (math.isfinite(step.phi) and step.phi > 0):
                raise InputError(f"{where}: phi must be positive and finite, got {step.phi}")
            series["phi"] = step.phi
        if ("phi" in series) != ("phi" in group) and count > 0:
            raise InputError(f"{where}: phi must be given at every step of a layer or at none")
        if "phi" in group and "phi" not in series:
            del group["phi"]  # left from steps that `truncate` dropped
        if "phi" in series and "phi" not in group:
            _create_series(group, "phi", np.float64)
        try:
            # k comes last: a step counts once its k is there.
            for name, value in (arrays | series | {"k": step.k}).items():
                group[name].resize(count + 1, axis=0)
                group[name][count] = value
            self._file.flush()
        except OSError as error:
            _cut(group, count)
            raise InputError(f"{self.partial}: {where} cannot be written: {_first_line(error)}") from error
        except BaseException:
            _cut(group, count)
            raise
        self._last[layer] = step.k

    def truncate(self, layer: str, k: int) -> int:
        """Drops a layer's steps with iteration >= k, and returns how many are left."""
        group = self._group(layer)
        left = int(np.searchsorted(group["k"][:], k))
        _cut(group, left)
        self._file.flush()
        self._last[layer] = int(group["k"][left - 1]) if left else -1
        return left

    def close(self) -> None:
        """Finishes the recording and gives it its name. May be called again."""
        if self._file:
            self._file.close()
            os.replace(self.partial, self.path)

    def suspend(self) -> None:
        """Closes the file but leaves it `<path>.partial`, to be resumed."""
        if self._file:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._file:
            kept = max((self.steps(layer) for layer in self.layers), default=0)
            self.suspend()
            note = f"the recording so far ({kept} steps) is kept in {self.partial}"
            log.warning("interrupted by %s: %s", type(error).__name__, note)
            error.add_note(note)

    def _create(self, overwrite: bool) -> h5py.File:
        if not overwrite:
            if self.path.exists():
                raise InputError(f"{self.path}: exists already; pass overwrite, or resume to continue it")
            if self.partial.exists():
                raise InputError(
                    f"{self.partial}: an interrupted recording; pass resume to continue it, or overwrite"
                )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = h5py.File(self.partial, "w")
        except OSError as error:
            raise InputError(f"{self.partial}: cannot be created: {_first_line(error)}") from error
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.create_group("layers")
        file.flush()
        return file

    def _reopen(self) -> h5py.File:
        if not self.partial.exists():
            if not self.path.exists():
                raise InputError(f"{self.partial}: nothing to resume, no such file")
            Recording(self.path).close()  # a foreign or damaged file is refused before it is renamed
            os.replace(self.path, self.partial)
        file = _open(self.partial, "r+")
        with _closed_on_error(file, self.partial):
            for layer, group in file["layers"].items():
                if isinstance(group, h5py.Group) and "k" in group:
                    _cut(group, _intact_steps(group))
                steps = LayerRecording(self.partial, layer, group).k  # refuses what a reader would refuse
                if not all(group[name].maxshape[0] is None for name in _series(group)):
                    raise InputError(f"{self.partial}: layer {layer!r} has datasets of fixed length")
                self._last[layer] = int(steps[-1]) if len(steps) else -1
        return file

    def _group(self, layer: str) -> Any:
        if layer not in self._last:
            raise InputError(f"{self.path}: layer {layer!r} has not been added; there are {_listed(self._last)}")
        return self._file["layers"][layer]

    def _check_same(self, layer: str, described: dict[str, Any], windows: np.ndarray) -> None:
        there = LayerRecording(self.partial, layer, self._group(layer))
        for key, value in described.items():
            if (found := getattr(there, key)) != value:
                raise InputError(f"{self.partial}: layer {layer!r} was recorded with {key} = {found}, not {value}")
        if there.windows != _to_windows(windows):
            raise InputError(f"{self.partial}: layer {layer!r} was recorded with other windows")


def _create_series(group: Any, name: str, dtype: Any) -> None:
    # No checksum: these chunks are written again at every step, and a kill in between must not lose them all.
    group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(1024,), dtype=dtype)


def _to_storage(array: Array, dataset: Any, where: str) -> np.ndarray:
    """The columns as a finite host array of the dataset's shape and dtype."""
    try:
        host = to_numpy(array)
    except TypeError as error:  # torch's bfloat16 has no NumPy dtype
        raise InputError(f"{where} cannot become a NumPy array: {_first_line(error)}") from error
    if host.shape != dataset.shape[1:]:
        raise InputError(f"{where} has shape {host.shape}, but {dataset.shape[1:]} is recorded")
    if host.dtype.kind != "f":
        raise InputError(f"{where} has dtype {host.dtype}; real floating columns are needed")
    if not np.isfinite(host).all():
        raise InputError(f"{where} holds NaN or Inf")
    with np.errstate(over="ignore"):
        stored = host.astype(dataset.dtype, copy=False)
    if stored.dtype.itemsize < host.dtype.itemsize and not np.isfinite(stored).all():
        raise InputError(f"{where} reaches {abs(host).max():.3g}, beyond what {dataset.dtype} holds")
    return stored


def _cut(group: Any, count: int) -> None:
    """Every series of the group to at most `count` steps."""
    for name in _series(group):
        if group[name].shape[0] > count:
            group[name].resize(count, axis=0)


def _intact_steps(group: Any) -> int:
    """The number of leading steps that were written whole before the process died."""
    count = min((group[name].shape[0] for name in _series(group)), default=0)
    if count == 0:
        return 0
    rising = np.diff(group["k"][:count], prepend=-1) > 0  # an entry that never reached the disk reads 0
    return count if rising.all() else int(np.argmin(rising))


def _series(group: Any) -> list[str]:
    return [name for name in ("k", "update", "A", "G", "phi") if name in group]


# ------------------------------------------------------------------------------------------------ reading


class Recording:
    """Reads a recording, this package's or any other program's in the same layout; a context manager.

    Everything but the columns is validated on opening; the columns are read and checked step by step.

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
        self._file = _open(self.path, "r")
        with _closed_on_error(self._file, self.path):
            groups = self._file["layers"].items()
            self._layers = {name: LayerRecording(self.path, name, group) for name, group in groups}
        self.layers = list(self._layers)

    def layer(self, name: str) -> "LayerRecording":
        """The named layer; an InputError lists those there are."""
        if name not in self._layers:
            raise InputError(f"{self.path}: no layer {name!r}; there are {_listed(self.layers)}")
        return self._layers[name]

    def info(self) -> dict[str, Any]:
        """What the file holds, as plain values that JSON can take."""
        return {
            "path": str(self.path),
            "format": FORMAT,
            "version": VERSION,
            "bytes": self.path.stat().st_size,
            "layers": {name: layer.info() for name, layer in self._layers.items()},
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
        bias, batch_size, update_every: see `RecordingWriter.add_layer`.
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
        self.windows = _to_windows(windows)

    def __len__(self) -> int:
        return len(self.k)

    @property
    def has_phi(self) -> bool:
        return self.phi is not None

    def recorded(self, window: Window) -> int:
        """The number of a window's iterations that are there; fewer than its length in an interrupted run."""
        inside = (self.k >= window.start) & (self.k < window.start + window.length)
        return int(inside.sum())

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
            "windows": [{**w._asdict(), "recorded": self.recorded(w)} for w in self.windows],
        }


def _open(path: Path, mode: str) -> h5py.File:
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
        raise InputError(f"{path}: truncated or damaged: {_first_line(error)}") from error
    with _closed_on_error(file, path):
        _check_root(file, path)
    return file


@contextmanager
def _closed_on_error(file: h5py.File, path: Path) -> Iterator[None]:
    """Closes the file if its inspection fails, and says in one line what h5py says in many."""
    try:
        yield
    except InputError:
        file.close()
        raise
    except _UNREADABLE as error:
        file.close()
        raise InputError(f"{path}: truncated or damaged: {_first_line(error)}") from error


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
    is_group = isinstance(group, h5py.Group)
    missing = [name for name in required if not (is_group and isinstance(group.get(name), h5py.Dataset))]
    if missing:
        hint = " (layer names must not contain '/')" if len(missing) == len(required) else ""
        raise InputError(f"{where} lacks {', '.join(missing)}{hint}")
    for name in "AG":
        if group[name].ndim != 3 or group[name].dtype.kind != "f" or 0 in group[name].shape[1:]:
            raise InputError(
                f"{where}: {name} must be float32 or float16 (N, d, n), is {group[name].dtype} {group[name].shape}"
            )
    if group["A"].shape[2] != group["G"].shape[2]:
        raise InputError(f"{where}: A has {group['A'].shape[2]} columns a step, G has {group['G'].shape[2]}")
    phi = group.get("phi")
    kinds = {"k": "iu", "update": "iub"} | ({} if phi is None else {"phi": "f"})
    for name, allowed in kinds.items():
        if not isinstance(group[name], h5py.Dataset):
            raise InputError(f"{where}: {name} is not a dataset")
        if group[name].ndim != 1 or group[name].dtype.kind not in allowed:
            expected = "floating" if allowed == "f" else "integer"
            raise InputError(
                f"{where}: {name} must be {expected} (N,), is {group[name].dtype} {group[name].shape}"
            )
    lengths = {name: group[name].shape[0] for name in _series(group)}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"{where}: datasets differ in their number of steps: {found}")
    k, update, windows = group["k"][:].astype(np.int64), group["update"][:], group["windows"][()]
    _check_series(k, update, where)
    _check_windows(windows, where)
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


def _check_windows(rows: np.ndarray, where: str) -> None:
    """Windows are integer rows (first k >= 0, length >= 1, epoch) that do not overlap."""
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind not in "iu":
        raise InputError(f"{where}: windows must be integer (W, 3), is {rows.dtype} {rows.shape}")
    windows = _to_windows(rows)
    for window in windows:
        if window.start < 0 or window.length < 1:
            raise InputError(f"{where}: window (first k {window.start}, length {window.length}) is empty")
    for one, two in itertools.pairwise(windows):
        if one.start + one.length > two.start:
            raise InputError(f"{where}: the windows at iterations {one.start} and {two.start} overlap")


def _to_windows(rows: np.ndarray) -> list[Window]:
    return sorted(Window(*map(int, row)) for row in rows)


def _read_integer(owner: Any, attribute: str, where: str, least: int) -> int:
    """An integer or boolean attribute, also where it was written as an array of one element."""
    if attribute not in owner.attrs:
        raise InputError(f"{where} lacks the attribute {attribute}")
    value = np.asarray(owner.attrs[attribute])
    if value.size != 1 or value.dtype.kind not in "iub" or value.item() < least:
        raise InputError(f"{where}: attribute {attribute} must be an integer >= {least}, is {value.tolist()!r}")
    return int(value.item())


def _read_columns(dataset: Any, i: int, where: str) -> np.ndarray:
    try:
        columns = dataset[i]
    except _UNREADABLE as error:
        raise InputError(f"{where} cannot be read, the file is damaged: {_first_line(error)}") from error
    if not np.isfinite(columns).all():
        raise InputError(f"{where} holds NaN or Inf")
    return columns.astype(np.float64 if dataset.dtype.itemsize > 4 else np.float32, copy=False)


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
