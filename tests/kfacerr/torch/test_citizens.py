"""What torch itself puts around an optimizer: schedulers, averages of weights, checkpoints, hooks, FSDP."""

import contextlib
import copy
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import lr_scheduler, swa_utils

from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC, SENG
from tests.kfacerr.torch.cases import CASES, Case, loss_of, parameters, relative, same, snapshot, train

STEPS = 8


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def batches(case: Case, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    return [case.batch(k) for k in range(steps)]


# ---- schedulers ---------------------------------------------------------------------------------------------

Make = Callable[[torch.optim.Optimizer], Any]


def _sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": _sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_tried():
    there = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert there - {"LRScheduler"} <= set(SCHEDULERS)


def advance(scheduler: Any) -> None:
    scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("which", ["Algorithm 8", "SENG"])
def test_a_scheduler_sets_what_is_set_by_hand_and_resumes_with_the_optimizer(which, name):
    """Momentum too, which some cycle, of an optimizer that had none; the numbers are those that SGD is given."""
    case = CASES[which]
    net, other, again = case.make(), case.make(), case.make()
    optimizer, second, third = (case.optimizer(n, lr=0.1, momentum=0.0) for n in (net, other, again))
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, reference = SCHEDULERS[name](optimizer), SCHEDULERS[name](sgd)
    resumed, rates = SCHEDULERS[name](third), set()
    for k, batch in enumerate(batches(case)):
        for key in ("lr", "momentum"):
            second.param_groups[0][key] = sgd.param_groups[0][key]
        rates.add(optimizer.param_groups[0]["lr"])
        train(net, optimizer, [batch])
        train(other, second, [batch])
        if k >= 4:
            train(again, third, [batch])
        sgd.step()
        advance(scheduler)
        advance(reference)
        if k >= 4:
            advance(resumed)
        if k == 3:
            again.load_state_dict(net.state_dict())
            third.load_state_dict(optimizer.state_dict())
            resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert torch.equal(parameters(net), parameters(other))
    assert torch.equal(parameters(net), parameters(again))
    assert len(rates) > 1


# ---- averages of weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_an_average_of_the_weights_disturbs_nothing_and_is_that_of_the_weights(case, kind):
    """AveragedModel is a deep copy of the hooked model: its forwards and backwards leave no columns."""
    net = case.make()
    optimizer = case.optimizer(net)
    average = swa_utils.AveragedModel(
        net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5) if kind == "EMA" else None
    )
    seen = []
    for batch in batches(case):
        train(net, optimizer, [batch])
        average.update_parameters(net)
        loss_of(average, batch).backward()
        seen.append(parameters(net))
    assert torch.equal(parameters(net), case.run(STEPS))
    mean = seen[0]
    for k, weights in enumerate(seen[1:], 2):
        mean = mean + (weights - mean) * (0.5 if kind == "EMA" else 1 / k)
    assert relative(parameters(average.module), mean) <= 1e-12
    assert set(average.module.state_dict()) == set(net.state_dict())


def test_the_batch_norms_of_an_average_are_updated_without_the_optimizer():
    net = nn.Sequential(nn.Linear(40, 6), nn.BatchNorm1d(6)).double()
    case = CASES["factored"]
    for make in (KFAC, SENG):
        optimizer = make(net, lr=0.01)
        average = swa_utils.AveragedModel(net)
        before = snapshot(optimizer)
        swa_utils.update_bn([case.batch(k)[0] for k in range(3)], average)
        assert same(before, snapshot(optimizer))
        inputs = torch.cat([net[0](case.batch(k)[0]) for k in range(3)])
        assert relative(average.module[1].running_mean, inputs.mean(0).detach()) <= 1e-12
        optimizer.close()


def test_an_average_keeps_nothing_of_the_optimizer_alive(case):
    net = case.make()
    optimizer = case.optimizer(net)
    average = swa_utils.AveragedModel(net)
    train(net, optimizer, batches(case, 2))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    net_gone = weakref.ref(net)
    del net
    gc.collect()
    assert net_gone() is None
    assert average(case.batch(0)[0]).isfinite().all()


# ---- torch.distributed.checkpoint ---------------------------------------------------------------------------


def checkpointed(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", ["momentum", "momentum that a scheduler gave", "no momentum"])
def test_a_distributed_checkpoint_resumes_bit_for_bit(case, way, tmp_path):
    """dcp.load fills the values that the state of a new optimizer has, which has neither factors nor momentum."""
    nets, optimizers = [], []
    for _ in range(2):
        nets.append(case.make())
        optimizers.append(case.optimizer(nets[-1], momentum=0.5 if way == "momentum" else 0.0))
        if way.endswith("gave"):
            lr_scheduler.CyclicLR(optimizers[-1], 0.01, 0.1)
    (net, other), (optimizer, second) = nets, optimizers
    train(net, optimizer, batches(case)[:3])
    dcp.save(checkpointed(net, optimizer), checkpoint_id=tmp_path / "c")
    saved = snapshot(optimizer)
    state = checkpointed(other, second)
    dcp.load(state, checkpoint_id=tmp_path / "c")
    set_state_dict(other, second, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert same(snapshot(second), saved)
    for model, its in ((net, optimizer), (other, second)):
        train(model, its, batches(case)[3:])
    assert torch.equal(parameters(net), parameters(other))


def test_momentum_on_a_schedule_is_in_a_distributed_checkpoint_from_the_start():
    case = CASES["KFAC"]
    optimizer = case.optimizer(case.make(), momentum=lambda epoch: min(epoch, 1) * 0.5, steps_per_epoch=2)
    assert sum(path.endswith("momentum_buffer") for path in snapshot(optimizer)) == len(optimizer.state)


def test_frozen_parameters_have_no_momentum_in_the_state(case):
    net = case.make()
    net[-1].requires_grad_(False)
    state = snapshot(case.optimizer(net, momentum=0.5))
    trained = sum(p.requires_grad for p in net.parameters())
    assert sum(path.endswith("momentum_buffer") for path in state) == trained


# ---- hooks, copies, other precision -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("which", ["Algorithm 8", "SENG"])
def test_a_model_may_be_compiled_in_place_after_the_optimizer_is_made(which):
    torch._dynamo.reset()
    case = CASES[which]
    net = case.make()
    optimizer = case.optimizer(net)
    net.compile(backend="aot_eager")
    train(net, optimizer, batches(case, 4))
    assert relative(parameters(net), case.run(4)) <= 1e-12


def test_hooks_around_the_step_are_called(case):
    net = case.make()
    optimizer = case.optimizer(net)
    seen: list[tuple[str, int]] = []
    optimizer.register_step_pre_hook(lambda its, *_: seen.append(("before", its.k)))
    optimizer.register_step_post_hook(lambda its, *_: seen.append(("after", its.k)))
    train(net, optimizer, batches(case, 2))
    assert seen == [("before", 0), ("after", 1), ("before", 1), ("after", 2)]


def test_factors_of_another_precision_are_refused_in_one_line_and_curvature_is_taken(case):
    net, other = case.make(torch.float32), case.make()
    optimizer, second = case.optimizer(net), case.optimizer(other)
    train(net, optimizer, [case.batch(k, dtype=torch.float32) for k in range(3)])
    second.load_state_dict(optimizer.state_dict())
    refused = pytest.raises(
        InputError, match=r"^layer '.', step .*convert, move or change the model before its first"
    )
    with refused if isinstance(second, KFAC) else contextlib.nullcontext():
        train(other, second, batches(case))
    assert parameters(other).isfinite().all()


def test_it_prints_its_groups(case):
    optimizer = case.optimizer(case.make(), lr=0.125)
    assert repr(optimizer).startswith(type(optimizer).__name__) and "lr: 0.125" in repr(optimizer)
