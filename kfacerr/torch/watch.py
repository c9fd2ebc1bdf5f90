"""How wrong is my inverse? Watches layers of a model while anything trains it.

    with kfacerr.torch.watch(model, "head", rank=32) as w:
        train(model)  # your loop, Lightning, transformers' Trainer, accelerate: unchanged
    print(w.report())

An iteration is a step of an optimizer that holds a watched weight; torch calls back after it, as a step may run
the backward itself, in its closure (Lightning does). What backwards left for a layer since the last step are its
micro-batches (`kfacerr.torch._micro_batches`).
"""

import fnmatch
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..advice import Advice, Budget, advise_recording
from ..algorithms import SEVEN, Algorithm
from ..checks import instance, names, path_of, whole
from ..damping import Damping
from ..exceptions import InputError
from ..process import Settings
from ..recorder import RecordingWriter
from ..recording import Recording
from ..report import Measurement, Report, default_rank
from ..stream import Columns, Step, Window, Windows, ordered
from ..study import ErrorStudy
from ._micro_batches import LayerTotals, gradient_columns, micro_batch
from ._scaling import overflowed, read_scale
from .follower import Capture, Follower, followable_layers, release

__all__ = ["Watch", "watch"]

logger = logging.getLogger(__name__)

IN_NUMPY_UP_TO = 512
"""Rows of the larger factor. There calls cost more than the products in them, and NumPy's cost half of torch's."""


def watch(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    algorithms: Sequence[str | Algorithm] = SEVEN,
    rank: int | None = None,
    rho: float = 0.95,
    phi: float = 0.1,
    damping: str | Damping = "own",
    continuation: str = "min",
    every: int = 10,
    windows: Windows | None = None,
    record: str | Path | None = None,
    loss_scale: float | Callable[[], float] = 1.0,
    seed: int = 0,
) -> "Watch":
    """Measures algorithms on layers of a model, within a `with` block that trains it.

    By default errors are measured at the updates of windows that grow rarer: of five updates each, which is one
    period of the heavier ones, from iteration 10, 100, 1000, ... times `every`. Before a window the last updates
    are followed, 45 with rho = 0.95 (what is older weighs a tenth then, as it would), and nothing else is looked
    at. So a short run has something to show, and a long one spends ever less on it. Windows that are given are
    measured at every iteration, and all updates before them are followed.

    Everything is computed where the columns are: in float64 on a CPU, in float32 on a GPU. The report says what it
    cost, the tutorial what it costs in general; fewer `algorithms` or layers, or a larger `every`, make it less.

    Args:
        model: any module, trained inside the block by whatever calls it.
        layers: names or patterns ("encoder.*.fc1"); the largest layer that can be followed if None.
        algorithms: names; the seven of §4.2 by default.
        rank: r; an eighth of a layer's smaller dimension, at least 4 and at most 220, if None.
        rho: EA decay.
        phi: damping ratio.
        damping: as `ErrorStudy` takes it: "own" phi lambda_max, "common", or one such as "mean=0.1".
        continuation: of the spectrum.
        every: T_updt, optimizer steps between updates of the factors.
        windows: (first iteration, length) of each, or `Window`s, iterations counted from 0 in the block; one
            `Window` may stand for itself; see above if None.
        record: where to write an HDF5 recording as well (version 2: batches may differ in size).
        loss_scale: what the loss is multiplied with before `backward()`; for a GradScaler `scaler.get_scale`.
        seed: of the randomised algorithms.

    Returns:
        The `Watch`, to be used as a context manager.

    Raises:
        InputError: no such layer, none that can be followed, or a value out of range.
    """
    whole(every, "every", 1)
    instance(model, "the model", nn.Module)
    if not callable(loss_scale):
        read_scale(loss_scale)
    settings = Settings(rank=1 if rank is None else rank, rho=rho, continuation=continuation, seed=seed)
    chosen = _chosen(model, layers)
    listed = names(algorithms, "algorithms", str, Algorithm)
    named = tuple(dict.fromkeys(map(str, map(Algorithm.parse, listed))))
    measured = _Windows(every, windows, rho)
    ErrorStudy(named, settings, measured.windows, phi=phi, damping=damping)  # what it refuses, it refuses now
    return Watch(chosen, named, settings, rank, (phi, damping), measured, record, loss_scale)


class _Windows:
    """Where errors are measured: windows that are given, or those that grow rarer."""

    GROWTH, FIRST, UPDATES = 10, 10, 5
    COUNT = 11  # the last of the default windows starts at the 10^11th update
    OLDER = 0.1  # weight in the factors, where a default window starts, of what is older than the updates followed

    def __init__(self, every: int, given: Windows | None, rho: float) -> None:
        self.every = every
        self.given = given is not None
        self.lead = every * math.ceil(math.log(self.OLDER) / math.log(rho))
        if given is None:
            starts = (self.FIRST * every * self.GROWTH**j for j in range(self.COUNT))
            self.windows = [Window(start, self.UPDATES * every) for start in starts]
        else:
            self.windows = ordered(given)
            if not self.windows:
                raise InputError("no window to measure in is given")

    def updates(self, k: int) -> bool:
        """Whether the factors take iteration k's columns."""
        if k % self.every != 0:
            return False
        return self.given or any(w.start - self.lead <= k < w.start + w.length for w in self.windows)

    def wants(self, k: int) -> bool:
        """Whether iteration k's columns are needed."""
        return self.updates(k) or (self.given and any(k in window for window in self.windows))

    def reached(self, k: int) -> list[Window]:
        """Those that had begun by iteration k; all that were given."""
        return [w for w in self.windows if self.given or w.start < max(k, 1)]


class Watch:
    """What `watch` gives: a context manager, and then a report.

    Args:
        modules: the watched layers by name.
        algorithms: names.
        settings: of the processes, but for the rank.
        rank: r; the default of `watch` if None.
        damping: phi, and the damping as `ErrorStudy` takes it.
        windows: where errors are measured.
        record: where to write a recording; nowhere if None.
        loss_scale: what the loss is multiplied with before `backward()`.

    Attributes:
        k: optimizer steps seen.
        layers: names of the watched layers.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        algorithms: Sequence[str],
        settings: Settings,
        rank: int | None,
        damping: tuple[float, str | Damping],
        windows: _Windows,
        record: str | Path | None,
        loss_scale: float | Callable[[], float],
    ) -> None:
        self.k = 0
        self.layers = list(modules)
        self._modules, self._algorithms, self._settings, self._rank = modules, algorithms, settings, rank
        (self._phi, self._damping), self._windows, self._loss_scale = damping, windows, loss_scale
        self._record = None if record is None else path_of(record)
        self._measurements: dict[str, Measurement] = {}
        self._stopped: dict[str, str] = {}  # layers that could not be measured on, and why
        self._seconds = 0.0
        self._began = self._ended = 0.0
        self._follower: Follower | None = None
        self._writer: RecordingWriter | None = None
        self._handle: Any = None

    def __repr__(self) -> str:
        what = "see .report()" if self._measurements else "nothing measured yet"
        return f"<kfacerr Watch of {', '.join(map(repr, self.layers))}: {self.k} steps; {what}>"

    # --------------------------------------------------------------------------------------------- block

    def __enter__(self) -> Self:
        if self._follower is not None:
            raise InputError("a watch is used once: call kfacerr.torch.watch again")
        if self._record is not None:
            self._writer = RecordingWriter(self._record, overwrite=True)
        way_out = "leave {name!r} out of the layers that are watched"
        self._follower = Follower(self._modules, several=True, way_out=way_out)
        self._follower.enabled = self._windows.wants(0)
        self._handle = register_optimizer_step_post_hook(self._on_step)
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = time.perf_counter()
        self._handle.remove()
        assert self._follower is not None
        self._follower.close()
        if self._writer is not None:  # what there is is a recording, also where the training failed
            for name in self._measurements:
                self._writer.set_windows(name, self._windows.reached(self.k))
            self._writer.close()
        if self.k == 0 and error is None:
            logger.warning("no optimizer with a watched weight took a step inside the block: nothing was measured")

    def _on_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After any optimizer's step."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(module._parameters.get("weight")) in own for module in self._modules.values()):
            return
        assert self._follower is not None
        if overflowed(optimizer):
            self._follower.forget()
            return
        started = time.perf_counter()
        if self._windows.wants(self.k):
            try:
                captures = self._follower.take()
            except InputError as error:
                logger.warning("iteration %d is not measured: %s", self.k, error)
            else:
                with torch.no_grad():
                    self._measure(captures)
        self.k += 1
        self._follower.enabled = self._windows.wants(self.k)
        self._seconds += time.perf_counter() - started

    def _measure(self, captures: dict[str, list[Capture]]) -> None:
        """One iteration of each layer that a backward reached. What fails stops that layer, not the training."""
        for name, passes in captures.items():
            if name in self._stopped:
                continue
            try:
                A, G = self._columns(name, passes)
                self._push(name, Step(self.k, A, G, self._windows.updates(self.k), self._phi))
            except InputError as error:
                self._stopped[name] = f"measured up to iteration {self.k - 1} only: {error}"
                logger.warning("layer %r is not watched any more: %s", name, error)
        release(captures)

    def _columns(self, name: str, passes: Sequence[Capture]) -> Columns:
        """The columns of the whole step, in the precision that they are measured in."""
        scale = read_scale(self._loss_scale)
        parts = [micro_batch(capture, scale) for capture in passes]
        batch, n = sum(part.batch for part in parts), sum(part.columns.A.shape[1] for part in parts)
        columns = gradient_columns(parts, LayerTotals(batch, (n,), double=False))
        if columns.A.device.type != "cpu":
            return Columns(columns.A.float(), columns.G.float())
        A, G = columns.A.double(), columns.G.double()
        small = max(A.shape[0], G.shape[0]) <= IN_NUMPY_UP_TO
        return Columns(A.numpy(), G.numpy()) if small else Columns(A, G)

    def _push(self, name: str, step: Step) -> None:
        if name not in self._measurements:
            self._start(name, step)
        if self._writer is not None:
            self._writer.append(name, step)
        self._measurements[name].push(step)

    def _start(self, name: str, step: Step) -> None:
        """At a layer's first columns, which tell its dimensions."""
        d_A, d_G = step.A.shape[0], step.G.shape[0]
        rank = default_rank(d_A, d_G) if self._rank is None else self._rank
        settings = Settings(**{**vars(self._settings), "rank": rank})
        windows = self._windows.windows
        self._measurements[name] = Measurement(
            name,
            settings,
            windows,
            algorithms=self._algorithms,
            phi=self._phi,
            damping=self._damping,
            every=self._windows.every,
        )
        if self._writer is not None:
            bias = getattr(self._modules[name], "bias", None) is not None
            sizes = {"d_A": d_A, "d_G": d_G, "n": None, "batch_size": step.A.shape[1]}
            self._writer.add_layer(name, **sizes, bias=bias, update_every=self._windows.every, windows=windows)

    # -------------------------------------------------------------------------------------------- results

    def report(self) -> Report:
        """What has been measured so far.

        Returns:
            The report, of the layers that were reached.

        Raises:
            InputError: nothing has been.
        """
        if not self._measurements:
            raise InputError(
                "nothing was measured: no optimizer that holds a watched weight took a step inside the block"
            )
        end = self._ended or time.perf_counter()
        training = end - self._began - self._seconds
        seconds = {"training": training, "watching": self._seconds}
        measured = [self._measurements[name] for name in self.layers if name in self._measurements]
        windows = self._windows.reached(self.k)
        return Report(measured, seconds=seconds, windows=windows, remarks=self._stopped)

    def advise(self, layer: str | None = None, budget: str | None = None) -> Advice:
        """Which inverse a watched layer should have; see `kfacerr.advice`.

        Args:
            layer: its name; the first watched one if None.
            budget: ms per iteration ("20"), or a multiple of what SGD spends on the layer ("1.5x"); "4x" if None.

        Returns:
            The advice, from a replay of the recording.

        Raises:
            InputError: nothing was recorded, the block has not ended, no such layer, or a bad budget.
        """
        if self._record is None or not self._ended:
            raise InputError("advice needs the recording of a block that has ended: watch(..., record='run.h5')")
        with Recording(self._record) as recording:
            found = recording.layer(layer or self.layers[0])
            rank = default_rank(found.d_A, found.d_G) if self._rank is None else self._rank
            settings = {**vars(self._settings), "rank": rank}
            limit = None if budget is None else Budget.parse(budget)
            return advise_recording(found, budget=limit, phi=self._phi, damping=self._damping, **settings)


def _chosen(model: nn.Module, layers: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers by name: those that names and patterns fit, or the largest."""
    modules = dict(model.named_modules())
    there = followable_layers(model)
    told = f"the layers that can be followed: {', '.join(there) or 'none'}"
    if layers is None:
        if not there:
            raise InputError(f"the model has no layer to watch; {told}")
        largest = max(there, key=lambda name: _size(modules[name].weight))
        return {largest: modules[largest]}
    found: dict[str, nn.Module] = {}
    for pattern in names((layers,) if isinstance(layers, str) else layers, "layers"):
        fitting = [name for name in there if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise InputError(f"no layer to watch fits {pattern!r}; {told}")
        found |= {name: modules[name] for name in fitting}
    if not found:
        raise InputError(f"no layer to watch is named; {told}")
    return found


def _size(weight: Any) -> int:
    return weight.numel() if isinstance(weight, Tensor) else 0
