"""Data parallelism: one set of K-factors for all processes, and the decompositions shared out among them.

With W processes, each with a loss that is a mean over its own b_i samples, DistributedDataParallel leaves the
mean of the W gradients. Its columns are those of micro-batches with G divided by W: of B samples in all, process i
has the columns `sqrt(b_i/B) A_i` and `sqrt(B/b_i) G_i/W`, which for equal batches are `A_i/sqrt(W)` and
`G_i/sqrt(W)`.

Processes that read columns (Brand's) get all of them, gathered; a dense factor that only an EVD or RSVD reads gets
the sum of the `X_i X_i^T`. A streaming sketch (N-KFAC's) gets the sum of the `X_i X_i^T Omega`, (d, s) numbers
however many columns there are; where Omega changes each process changes it by itself, and then takes one's state.

Each decomposition that is due is done by one process and its result broadcast, the largest first, each to the
process with the least to do. Sketches and choices are drawn by the one that decomposes, and the state of its
generator is broadcast too. K-FAC and N-KFAC decompose nothing before their inverse is asked for, and each process
takes that by itself. So all processes hold the same state, and a checkpoint of one is good for any number.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..factor import KFactor
from ..process import Process

__all__ = ["Job", "Team", "assign", "is_sharded", "update_together"]


class Team:
    """The processes that train one model together, or this one alone: then nothing is sent."""

    def __init__(self, together: bool = True) -> None:
        several = together and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0

    def each(self, values: Tensor) -> Tensor:
        """(W, ...) the values of all processes, of one shape and dtype."""
        if self.size == 1:
            return values[None]
        values = values.contiguous()
        out = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(out, values)
        return torch.stack(out)

    def gather(self, X: Tensor, widths: Sequence[int]) -> Tensor:
        """(d, sum of widths): the columns of all processes, in the order of their ranks."""
        if self.size == 1:
            return X
        padded = X.new_zeros(max(widths), X.shape[0])
        padded[: X.shape[1]] = X.T
        parts = self.each(padded)
        return torch.cat([part[:n] for part, n in zip(parts, widths, strict=True)]).T.contiguous()

    def sum(self, X: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(X)
        return X

    def largest(self, X: Tensor) -> float:
        """The largest magnitude in the processes' X. Waits for the device."""
        top = X.abs().max() if X.numel() else X.new_zeros(())
        if self.size > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX)
        return float(top)

    def any(self, flags: Tensor) -> list[bool]:
        """Which of the flags any process has raised. Waits for the device."""
        if self.size > 1:
            flags = flags.to(torch.int32)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def exchange(self, mine: Mapping[int, Any], owners: Sequence[int], device: torch.device) -> list[Any]:
        """States (nested dicts) by index, each from its owner, to all processes; `mine` are this one's."""
        outlines: list[Any] = [None] * self.size
        dist.all_gather_object(outlines, {i: _map_leaves(state, _outline) for i, state in mine.items()})
        states = []
        for i, owner in enumerate(owners):
            outline = outlines[owner][i]
            size = sum(o.bytes for o in _leaves(outline) if isinstance(o, _Outline))
            packed = torch.empty(size, dtype=torch.uint8, device=device)
            if owner == self.rank and size:
                tensors = [leaf for leaf in _leaves(mine[i]) if isinstance(leaf, Tensor)]
                torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors], out=packed)
            if size:
                dist.broadcast(packed, src=owner)
            # The owner, too, goes on from the copy: another memory layout would round differently.
            states.append(_unpacked(outline, packed))
        return states


@dataclass(frozen=True)
class _Outline:
    """A tensor's place in a state."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _unpacked(outline: Any, packed: Tensor) -> Any:
    """The state that `outline` describes, with the tensors whose bytes lie one after the other in `packed`."""
    done = 0

    def fill(leaf: Any) -> Any:
        nonlocal done
        if not isinstance(leaf, _Outline):
            return leaf
        part = packed[done : done + leaf.bytes].clone()  # a copy is aligned
        done += leaf.bytes
        return part.view(leaf.dtype).reshape(leaf.shape)

    return _map_leaves(outline, fill)


def _outline(leaf: Any) -> Any:
    return _Outline(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _leaves(value)
    else:
        yield state


def _map_leaves(state: Any, change: Any) -> Any:
    if isinstance(state, dict):
        return {key: _map_leaves(value, change) for key, value in state.items()}
    return change(state)


def assign(costs: Sequence[float], size: int) -> list[int]:
    """The owner of each job: the dearest first, each to the process with the least to do so far."""
    loads = [0.0] * size
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += costs[i]
    return owners


class Job(NamedTuple):
    """A factor's update in one step, as this process sees it.

    Attributes:
        factor: configured for the step; that of all processes is the same.
        X: (d, n_i) this process's columns.
        widths: n_1, ..., n_W.
        push: `factor.push` with what to do if it fails.
    """

    factor: KFactor
    X: Tensor
    widths: Sequence[int]
    push: Callable[..., None]

    @property
    def cost(self) -> float:
        """Flops of an update that decomposes; a process that does not say is taken for an EVD."""
        d, n = self.X.shape[0], sum(self.widths)
        process = _process(self)
        try:
            cost = process.cost(d, n)
        except NotImplementedError:
            return 9.0 * d**3
        return cost.update + cost.heavy


def update_together(team: Team, k: int, jobs: Sequence[Job]) -> None:
    """Step k of (8) and of the processes of all factors. Every process calls it with the same factors."""
    due: list[tuple[Job, Tensor, dict[str, Any]]] = []
    for job in jobs:
        decomposes = job.factor.due(k)
        X, sums = _shared_columns(team, k, job)
        if decomposes:
            due.append((job, X, sums))
        else:
            job.push(k, X, **sums)
    if not due:
        return
    owners = assign([job.cost for job, _, _ in due], team.size)
    mine = {}
    for i, ((job, X, sums), owner) in enumerate(zip(due, owners, strict=True)):
        if owner == team.rank:
            job.push(k, X, **sums)
            mine[i] = _process(job).state_dict()
        else:
            job.factor.absorb(job.factor.admit(X, finite=True), gram=sums.get("gram"))
    states = team.exchange(mine, owners, due[0][1].device)
    for (job, _, _), state in zip(due, states, strict=True):
        _process(job).load_state_dict(state)


def _shared_columns(team: Team, k: int, job: Job) -> tuple[Tensor, dict[str, Any]]:
    """All processes' columns where the factor's process reads them; else this one's, and the sums for `push`:

    of the X X^T, or of the shares of a process that `adds`.
    """
    factor, process, X = job.factor, _process(job), job.X
    if factor.needs_columns and not process.adds:
        return team.gather(X, job.widths), {}
    if factor.unit is None:
        factor.set_unit(team.largest(X))
    own = factor.admit(X, finite=True)
    if process.adds:
        return X, {"total": {name: team.sum(part) for name, part in process.share(k, own).items()}}
    return X, {"gram": team.sum(own @ own.T)}


def _process(job: Job) -> Process:
    (process,) = job.factor.processes.values()
    return process


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's own parameters are spread over processes, as FSDP of either kind leaves them."""
    if getattr(module, "_is_fsdp_managed_module", False):  # its flat parameters themselves have no mark
        return True
    tensor = sys.modules.get("torch.distributed.tensor")  # where nobody imported it there is none
    return tensor is not None and any(isinstance(p, tensor.DTensor) for p in module._parameters.values())
