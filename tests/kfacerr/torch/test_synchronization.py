"""A step that does not decompose never makes the host wait for the device (design §9: a GPU that waits is idle).

On the CPU a dispatch mode stands for the device: it refuses every operator whose answer the host must read. On a
GPU torch refuses by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfacerr.torch import KFAC, SENG
from kfacerr.torch._kfac_layer import process_of
from studies.config import TABLE_1
from studies.training import Training
from tests.studies.helpers import tiny_dataset, tiny_training

READS = {
    "_local_scalar_dense",  # item, float(x), bool(x), x.any() in an `if`
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",  # and what asks for its size
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "linalg_cholesky",  # these read LAPACK's status
    "linalg_eigh",
    "linalg_inv",
}
DRIVERS = ["SGD", "SENG", *TABLE_1]
QUIET = 7
"""Iterations from 1 on in which no driver has anything to decompose: T_updt is 10, SENG's period 8."""


class HostReads(Exception):
    """The host asked for a value."""


class NoReads(TorchDispatchMode):
    """Refuses operators whose answer the host must have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or (name in ("index", "index_put", "index_put_") and _has_mask(args[1])):
            raise HostReads(str(func))
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    """Whether an index is a mask, whose number of True is the result's size."""
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in indices)


@contextmanager
def no_reads() -> Iterator[None]:
    def refuse(tensor: Tensor, *args: Any) -> None:
        raise HostReads("tolist or numpy")

    # On the CPU these two read memory without an operator.
    with mock.patch.object(Tensor, "tolist", refuse), mock.patch.object(Tensor, "numpy", refuse), NoReads():
        yield


def training(driver: str, **settings: Any) -> Training:
    """One that has started up: iteration 0, where everything decomposes, is done."""
    run = tiny_training(tiny_dataset(128), driver=driver, rank_scale=1 / 40, T_updt=10, **settings)
    run.step()
    return run


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("driver", DRIVERS)
def test_steps_that_do_not_decompose_read_nothing(driver: str, amp: bool) -> None:
    run = training(driver, amp=amp)
    with no_reads():
        for _ in range(QUIET):
            run.step()
    assert run.k == 1 + QUIET


@pytest.mark.parametrize("driver", ["K-FAC T_inv=50", "R-KFAC T_inv=50"])
def test_a_step_that_only_updates_factors_looks_once(driver: str) -> None:
    """Whether the columns are finite: a NaN would stay in the factors."""
    run = training(driver)
    while run.k < 10:
        run.step()
    optimizer = run.optimizer
    assert isinstance(optimizer, KFAC)
    before = [process_of(layer.factors["A"]).estimate for layer in optimizer.layers.values()]
    looks = []

    def look(tensor: Tensor) -> list[Any]:
        looks.append(tensor)
        return [tensor[i].item() for i in range(len(tensor))]

    with mock.patch.object(Tensor, "tolist", look):
        run.step()
    assert len(looks) == 1
    now = [process_of(layer.factors["A"]).estimate for layer in optimizer.layers.values()]
    assert all(estimate is kept for estimate, kept in zip(now, before, strict=True))


def test_seng_that_does_not_look_at_every_step_still_looks_before_it_refreshes() -> None:
    net = nn.Linear(3, 2)
    optimizer = SENG(net, update_every=2, skip_nonfinite=False)
    before = net.weight.detach().clone()
    for bad, finite in ((True, True), (False, True), (True, False)):  # due, due still, and not due
        optimizer.zero_grad()
        net(torch.eye(3)).square().mean().backward()
        if bad:
            assert net.weight.grad is not None
            net.weight.grad[0, 0] = torch.nan
        optimizer.step()
        assert bool(net.weight.isfinite().all()) == finite
        if bad and finite:
            assert torch.equal(net.weight, before)


def test_the_dispatch_mode_notices_a_read() -> None:
    x = torch.ones(2)
    reads = ("x.sum().item()", "bool(x.any())", "x.nonzero()", "x.tolist()", "x[x > 0]")
    for read in reads:
        with pytest.raises(HostReads), no_reads():
            eval(read, {"x": x})


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("driver", [*DRIVERS, "AdamW"])
def test_torch_sees_no_synchronisation_either(driver: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    run = training(driver, device="cuda", amp=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(QUIET):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
