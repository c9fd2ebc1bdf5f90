"""Writes K-factor recordings; the layout is `kfacerr.recording`'s.

A recording under way is called `<name>.partial`, is itself a readable recording, and takes its own name when it
is closed cleanly. Every step is flushed as it comes (0.2 ms for a small layer), so a killed process loses at
most the step being written. Where the disk is full, a step is refused before HDF5 begins to write it. Chunks carry
a checksum (Fletcher 32, a filter every HDF5 library has; it adds 0.4 ms a MiB). They are not compressed: measured
on post-ReLU columns, LZF saves 35-60% of A but takes 8 times as long to write, gzip 20 times, and LZF cannot be
read without h5py.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np

from .array import to_numpy
from .checks import instance, path_of, positive, switch, whole
from .exceptions import InputError
from .files import check_regular, lock
from .recording import (
    FORMAT,
    VERSIONS,
    LayerRecording,
    Recording,
    check_own,
    closed_on_error,
    first_line,
    layer_groups,
    listed,
    member,
    open_file,
    series_names,
    to_windows,
)
from .stream import Array, Step, Windows, ordered

__all__ = ["RecordingWriter"]

log = logging.getLogger(__name__)

ROOM = 2**17
"""Bytes that a step may need on the disk beside its columns."""


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
        self.path = path_of(path)
        self.partial = path_of(f"{self.path}.partial")
        self._last: dict[str, int] = {}  # the last k of each layer
        check_regular(self.path)
        check_regular(self.partial)
        self._lock = lock(self.path)  # before anything is opened: h5py empties a file before it asks for its own
        try:
            self._file = self._reopen() if resume else self._create(overwrite)
        except BaseException:
            self._lock.release()
            raise

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
        n: int | None,
        bias: bool,
        batch_size: int,
        update_every: int,
        windows: Windows = (),
        dtype: Any = np.float32,
    ) -> None:
        """Describes a layer before its first step.

        Args:
            layer: its name; dots are welcome, slashes are not (HDF5 would nest).
            d_A: rows of A.
            d_G: rows of G.
            n: columns of both; None where they vary from step to step, which makes the file one of version 2.
            bias: whether the last row of A is the constant of the bias.
            batch_size: samples in a batch.
            update_every: T_updt.
            windows: where every iteration is recorded and the errors will be measured.
            dtype: float32, or float16 for half the disk: 3 digits, and magnitudes above 65504 are refused.

        Raises:
            InputError: for a bad value, or if the layer is there already with another description.
        """
        _check_name(layer)
        storage = _storage(dtype, f"layer {layer!r}")
        sizes = {"d_A": d_A, "d_G": d_G, "batch_size": batch_size, "update_every": update_every}
        sizes |= {} if n is None else {"n": n}
        for key, value in sizes.items():
            _int64(value, f"layer {layer!r}: {key}", 1)
        switch(bias, f"layer {layer!r}: bias")
        rows = _window_rows(windows, f"layer {layer!r}")
        if not self._file:
            raise InputError(f"{self.path}: the recording is closed")
        if layer in self._last:
            self._check_same(layer, sizes | {"bias": bias, "dtype": storage}, n is None, rows)
            return
        with self._writing(f"layer {layer!r}", rows.nbytes):
            group = self._file["layers"].create_group(layer)
            group.attrs["bias"] = np.bool_(bias)
            group.attrs["batch_size"] = batch_size
            group.attrs["update_every"] = update_every
            group.create_dataset("windows", data=rows)
            if n is None:
                self._file.attrs["version"] = VERSIONS[-1]
                _create_series(group, "n", np.int64)
            for name, d in (("A", d_A), ("G", d_G)):
                _create_columns(group, name, d, n, batch_size, storage)
            _create_series(group, "update", np.uint8)
            _create_series(group, "k", np.int64)
            self._file.flush()
        self._last[layer] = -1

    def append(self, layer: str, step: Step) -> None:
        """Adds a step; its arrays may be NumPy, CuPy or torch.

        Args:
            layer: its name.
            step: A (d_A, n) and G (d_G, n).

        Raises:
            InputError: for an unknown layer, a k that does not increase, wrong shapes, NaN or Inf, magnitudes
                beyond float16 where that is the storage, or a disk that refuses. Nothing is written then.
        """
        group = self._group(layer)
        where = f"layer {layer!r}, iteration {instance(step, 'the step', Step).k}"
        _int64(step.k, f"layer {layer!r}: k")
        switch(step.update, f"{where}: update")
        if step.k <= self._last[layer]:
            raise InputError(f"{where}: iterations must increase from 0, the last was {self._last[layer]}")
        arrays = {name: _to_storage(getattr(step, name), group, name, f"{where}: {name}") for name in "AG"}
        n, n_G = arrays["A"].shape[1], arrays["G"].shape[1]
        if n != n_G:
            raise InputError(f"{where}: A has {n} columns and G has {n_G}")
        count = group["k"].shape[0]
        series: dict[str, Any] = {"update": step.update} | ({"n": n} if "n" in group else {})
        if step.phi is not None:
            series["phi"] = positive(step.phi, f"{where}: phi")
        if ("phi" in series) != ("phi" in group) and count > 0:
            raise InputError(f"{where}: phi must be given at every step of a layer or at none")
        if "phi" in group and "phi" not in series:
            del group["phi"]  # left from steps that `truncate` dropped
        if "phi" in series and "phi" not in group:
            _create_series(group, "phi", np.float64)
        with self._writing(where, sum(X.nbytes for X in arrays.values())):
            try:
                for name, value in arrays.items():
                    group[name].resize((count + 1, value.shape[0], max(n, group[name].shape[2])))
                    group[name][count, :, :n] = value
                # k comes last: a step counts once its k is there.
                for name, value in (series | {"k": step.k}).items():
                    group[name].resize(count + 1, axis=0)
                    group[name][count] = value
                self._file.flush()
            except BaseException:
                _cut(group, count)
                raise
        self._last[layer] = step.k

    def set_windows(self, layer: str, windows: Windows) -> None:
        """Replaces a layer's windows, where only the end of a training tells which were reached.

        Args:
            layer: its name.
            windows: as in `add_layer`.

        Raises:
            InputError: for an unknown layer, or for bad windows.
        """
        group = self._group(layer)
        rows = _window_rows(windows, f"layer {layer!r}")
        del group["windows"]
        group.create_dataset("windows", data=rows)
        self._file.flush()

    def truncate(self, layer: str, k: int) -> int:
        """Drops a layer's steps with iteration >= k, and returns how many are left."""
        group = self._group(layer)
        whole(k, f"layer {layer!r}: k")
        left = int(np.searchsorted(group["k"][:], k))
        with self._writing(f"layer {layer!r}", None):
            _cut(group, left)
            self._file.flush()
        self._last[layer] = int(group["k"][left - 1]) if left else -1
        return left

    def close(self) -> None:
        """Finishes the recording and gives it its name. May be called again."""
        if self._file:
            self.suspend()
            try:
                os.replace(self.partial, self.path)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def suspend(self) -> None:
        """Closes the file but leaves it `<path>.partial`, to be resumed."""
        if self._file:
            try:
                with self._writing("its end", None):
                    self._file.close()
            finally:
                self._lock.release()

    @contextmanager
    def _writing(self, what: str, size: int | None) -> Iterator[None]:
        """Says what fails in one line; where the disk has no room for `size` bytes, nothing is begun."""
        try:
            if size is not None:
                _reserve(self.partial, size + ROOM)
            yield
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.partial}: {what} cannot be written: {first_line(error)}") from error

    def __repr__(self) -> str:
        state = "open" if self._file else "closed"
        return f"<kfacerr RecordingWriter {str(self.path)!r} of {', '.join(self.layers) or 'no layers'}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._file:
            kept = max((self.steps(layer) for layer in self.layers), default=0)
            try:
                self.suspend()
            except InputError as second:  # the first is what the user is to hear of
                error.add_note(str(second))
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
            file.attrs["format"] = FORMAT
            file.attrs["version"] = VERSIONS[0]
            file.create_group("layers")
            file.flush()
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.partial}: cannot be created: {first_line(error)}") from error
        return file

    def _reopen(self) -> h5py.File:
        if not self.partial.exists():
            if not self.path.exists():
                raise InputError(f"{self.partial}: nothing to resume, no such file")
            with Recording(self.path) as finished:  # a foreign or damaged file is refused before it is renamed
                for layer in finished.layers:
                    finished.layer(layer)
            os.replace(self.path, self.partial)
        try:
            return self._continued()
        except InputError as error:
            raise InputError(f"{error} (to start anew pass overwrite, or remove the file)") from error

    def _continued(self) -> h5py.File:
        file = open_file(self.partial, "r+")
        with closed_on_error(file, self.partial):
            for layer in layer_groups(file):
                group = member(file["layers"], layer, f"{self.partial}: layer {layer!r}")
                check_own(group, f"{self.partial}: layer {layer!r}")  # before anything is written
                _cut(group, _intact_steps(group))
                steps = LayerRecording(self.partial, layer, group).k  # refuses what a reader would refuse
                if not all(group[name].maxshape[0] is None for name in series_names(group)):
                    raise InputError(f"{self.partial}: layer {layer!r} has datasets of fixed length")
                self._last[layer] = int(steps[-1]) if len(steps) else -1
        return file

    def _group(self, layer: str) -> Any:
        if layer not in tuple(self._last):  # also of what cannot be a key
            raise InputError(f"{self.path}: layer {layer!r} has not been added; there are {listed(self._last)}")
        if not self._file:
            raise InputError(f"{self.path}: the recording is closed")
        return self._file["layers"][layer]

    def _check_same(self, layer: str, described: dict[str, Any], varies: bool, windows: np.ndarray) -> None:
        there = LayerRecording(self.partial, layer, self._group(layer))
        if varies != (there.widths is not None):
            raise InputError(f"{self.partial}: layer {layer!r} was recorded with n that varies, or now varies")
        for key, value in described.items():
            if (found := getattr(there, key)) != value:
                raise InputError(f"{self.partial}: layer {layer!r} was recorded with {key} = {found}, not {value}")
        if there.windows != to_windows(windows):
            raise InputError(f"{self.partial}: layer {layer!r} was recorded with other windows")


def _create_columns(group: Any, name: str, d: int, n: int | None, batch_size: int, storage: Any) -> None:
    """An empty dataset (0, d, n), whose n may grow if it is None."""
    group.create_dataset(
        name,
        shape=(0, d, n or 1),
        maxshape=(None, d, n),
        chunks=(1, d, n or batch_size),
        dtype=storage,
        fletcher32=True,
        fillvalue=np.nan,  # a step whose columns never reached the disk reads as NaN and is refused
    )


def _create_series(group: Any, name: str, dtype: Any) -> None:
    # No checksum: these chunks are written again at every step, and a kill in between must not lose them all.
    group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(1024,), dtype=dtype)


def _reserve(path: Path, size: int) -> None:
    """Refuses where disk or quota have no room for so many bytes more: a failed write spoils an HDF5 file."""
    if not hasattr(os, "posix_fallocate"):
        if shutil.disk_usage(path).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        try:
            os.posix_fallocate(file.fileno(), end, size)
        finally:
            os.ftruncate(file.fileno(), end)


def _int64(value: Any, what: str, least: int = 0) -> None:
    """Refuses what the file has no room for, as no whole number in range."""
    if whole(value, what, least) >= 2**63:
        raise InputError(f"{what} must be a whole number below 2^63, got {value}")


def _check_name(layer: Any) -> None:
    """Refuses what names no group of its own in HDF5, or none that comes back."""
    odd = not isinstance(layer, str) or layer in ("", ".", "..") or any(c in layer for c in "/\0")
    if odd or (not layer.isascii() and layer.encode("utf-8", "replace").decode() != layer):
        raise InputError(f"layer name {layer!r}: an HDF5 group needs a name, and one without '/'")


def _storage(dtype: Any, where: str) -> "np.dtype[Any]":
    try:
        storage = np.dtype(dtype)
    except TypeError:
        storage = None
    if dtype is None or storage not in (np.dtype(np.float32), np.dtype(np.float16)):
        raise InputError(f"{where}: float32 or float16 is needed, got {dtype if storage is None else storage}")
    return storage


def _window_rows(windows: Any, where: str) -> np.ndarray:
    """(W, 3) int64, as they are stored."""
    try:
        found = ordered(windows)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for window in found:
        _int64(window.start + window.length, f"{where}: the end of a window")
        _int64(window.epoch, f"{where}: a window's epoch")
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def _to_storage(array: Array, group: Any, name: str, where: str) -> np.ndarray:
    """The columns as a finite host array of the dataset's d and dtype, and of its n unless that varies."""
    dataset = group[name]
    try:
        host = to_numpy(array)
    except TypeError as error:  # torch's bfloat16 has no NumPy dtype
        raise InputError(f"{where} cannot become a NumPy array: {first_line(error)}") from error
    expected = dataset.shape[1:] if "n" not in group else (dataset.shape[1], *host.shape[1:2])
    if host.shape != expected:
        raise InputError(f"{where} has shape {host.shape}, but {expected} is recorded")
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
    for name in series_names(group):
        if group[name].shape[0] > count:
            group[name].resize(count, axis=0)


def _intact_steps(group: Any) -> int:
    """The number of leading steps that were written whole before the process died."""
    count = min((group[name].shape[0] for name in series_names(group)), default=0)
    if count == 0:
        return 0
    rising = np.diff(group["k"][:count], prepend=-1) > 0  # an entry that never reached the disk reads 0
    return count if rising.all() else int(np.argmin(rising))
