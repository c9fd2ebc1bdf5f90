"""`KFAC` in use: with what a torch training loop has around an optimizer, and where things go wrong."""

import copy
import io
import logging
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kfacerr import processes
from kfacerr import rsvd as decompositions
from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC
from tests.kfacerr.torch.test_optimizer import convnet, images, mlp, parameters, relative, train, vectors

ALGORITHMS = ["K-FAC", "R-KFAC", "SRE-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C"]
BUSY = {"lr": 0.1, "rank": 5, "T_updt": 2, "T_inv": 4, "T_brand": 4, "T_rsvd": 4, "T_corct": 4, "momentum": 0.5}
"""Every part of every algorithm at work within ten steps, sketches included."""


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def snapshot(optimizer: KFAC) -> dict[str, Any]:
    """The values in the optimizer's state by their path, tensors copied."""
    return _leaves(optimizer.state_dict(), "")


def _leaves(state: Any, path: str) -> dict[str, Any]:
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for name, value in items for key, leaf in _leaves(value, f"{path}/{name}").items()}
    return {path: state.clone() if isinstance(state, Tensor) else state}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(
        torch.equal(a, other[key]) if isinstance(a, Tensor) else a == other[key] for key, a in one.items()
    )


# ---- checkpoints and copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": True, "linear_application": True}], ids=["plain", "options"]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checkpoint_resumes_bit_for_bit(algorithm, options):
    batches = [images(k) for k in range(14)]
    net = convnet(torch.float32)
    batches = [(x.float(), y) for x, y in batches]
    optimizer = KFAC(net, algorithm, **BUSY, **options)
    train(net, optimizer, batches[:7])
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, batches[7:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = convnet(torch.float32)
    resumed = KFAC(again, algorithm, **BUSY, **options)
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, batches[7:])
    assert torch.equal(parameters(again), parameters(net))
    assert same(snapshot(resumed), snapshot(optimizer))


def test_a_loaded_state_is_not_shared():
    net, other = mlp(), mlp()
    optimizer, second = KFAC(net, "B-R-KFAC", **BUSY), KFAC(other, "B-R-KFAC", **BUSY)
    train(net, optimizer, [vectors(0)])
    second.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    train(other, second, [vectors(k) for k in range(1, 4)])
    assert same(before, snapshot(optimizer))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KFAC(mlp(), "K-FAC"), "layer '0', factor A: the state is of 'B-KFAC', not of 'K-FAC'"),
        (lambda: KFAC(mlp(width=29), "B-KFAC"), "layer '0', factor G: the state is of d = 30, not 29"),
        (lambda: KFAC(convnet(), "B-KFAC"), "the state has other layers"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(make, message):
    net = mlp()
    optimizer = KFAC(net, "B-KFAC", rank=5)
    train(net, optimizer, [vectors(0)])
    state = optimizer.state_dict()
    other = make()
    state["param_groups"][0]["params"] = other.state_dict()["param_groups"][0]["params"]
    with pytest.raises(InputError, match=message):
        other.load_state_dict(state)
    with pytest.raises(InputError, match="not of a KFAC optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())


def test_a_state_that_is_refused_leaves_the_optimizer_as_it_was():
    net, wider = mlp(), mlp()
    wider[2] = nn.Linear(30, 7).double()
    optimizer, other = KFAC(net, "B-R-KFAC", **BUSY), KFAC(wider, "B-R-KFAC", **BUSY)
    train(wider, other, [vectors(k) for k in range(3)])
    train(net, optimizer, [vectors(0)])
    before = snapshot(optimizer)
    with pytest.raises(InputError, match="layer '2', factor G: the state is of d = 7, not 6"):
        optimizer.load_state_dict(other.state_dict())
    assert same(before, snapshot(optimizer))


def test_a_state_may_be_loaded_before_the_epoch_of_schedules_is_known():
    options = {**BUSY, "rank": lambda epoch: 5 + epoch}
    net, again = mlp(), mlp()
    optimizer, resumed = KFAC(net, "R-KFAC", **options, steps_per_epoch=2), KFAC(again, "R-KFAC", **options)
    train(net, optimizer, [vectors(k) for k in range(4)])
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    resumed.epoch = 2
    train(net, optimizer, [vectors(4)])
    train(again, resumed, [vectors(4)])
    assert torch.equal(parameters(net), parameters(again))


@pytest.mark.parametrize("algorithm", ["R-KFAC", "B-KFAC-C"])
def test_deepcopy_of_model_and_optimizer_is_independent_and_goes_on_alike(algorithm):
    net = convnet()
    optimizer = KFAC(net, algorithm, **BUSY)
    train(net, optimizer, [images(k) for k in range(3)])
    twin, copied = copy.deepcopy((net, optimizer))
    before = snapshot(optimizer)
    train(twin, copied, [images(k) for k in range(3, 8)])
    assert same(before, snapshot(optimizer))
    train(net, optimizer, [images(k) for k in range(3, 8)])
    assert torch.equal(parameters(twin), parameters(net))
    assert copied.layers["3"].module is twin[3]


def test_the_copy_of_an_optimizer_with_a_scheduler_steps_itself():
    net = mlp()
    optimizer = KFAC(net, "R-KFAC", **BUSY)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    twin, copied = copy.deepcopy((net, optimizer))
    before = parameters(net)
    train(twin, copied, [vectors(0)])
    assert torch.equal(parameters(net), before) and not torch.equal(parameters(twin), before)
    assert (optimizer.k, copied.k) == (0, 1)


def test_deepcopy_of_the_model_alone_leaves_the_optimizer_with_the_original():
    net, plain = mlp(), mlp()
    optimizer = KFAC(net, "K-FAC", **BUSY)
    twin = copy.deepcopy(net)
    for k in range(4):
        loss_of(twin, vectors(10 + k)).backward()
        train(net, optimizer, [vectors(k)])
    train(plain, KFAC(plain, "K-FAC", **BUSY), [vectors(k) for k in range(4)])
    assert torch.equal(parameters(net), parameters(plain))


def test_an_optimizer_that_is_gone_has_taken_its_hooks_with_it():
    net = mlp()
    for how in ("closed", "deleted"):
        optimizer = KFAC(net, "K-FAC")
        assert any(module._forward_hooks for module in net.modules())
        if how == "closed":
            optimizer.close()
        del optimizer
        assert not net._forward_pre_hooks and not any(module._forward_hooks for module in net.modules())


def test_a_model_converted_before_the_first_step_is_followed():
    net, other = mlp(torch.float32), mlp(torch.float32)
    optimizer = KFAC(net, "B-KFAC", **BUSY)
    net.double()
    other.double()
    train(net, optimizer, [vectors(0)])
    train(other, KFAC(other, "B-KFAC", **BUSY), [vectors(0)])
    assert torch.equal(parameters(net), parameters(other))
    assert optimizer.layers["0"].factors["A"].process.estimate.lowrank.D.dtype == torch.float64


# ---- around the step ----------------------------------------------------------------------------------------


def _reference_run(steps: int = 6, algorithm: str = "B-R-KFAC", make=convnet, **options) -> Tensor:
    net = make()
    train(net, KFAC(net, algorithm, **{**BUSY, **options}), [images(k) for k in range(steps)])
    return parameters(net)


def test_evaluation_between_the_steps_and_their_parts_changes_nothing():
    net = convnet()
    optimizer = KFAC(net, "B-R-KFAC", **BUSY)
    for k in range(6):
        optimizer.zero_grad()
        with torch.no_grad():
            net(images(100)[0])
        loss = loss_of(net, images(k))
        with torch.no_grad():
            net(images(101, b=7)[0])
        loss.backward()
        net(images(102, b=5)[0])  # with gradients, but no backward
        optimizer.step()
    assert torch.equal(parameters(net), _reference_run())


@pytest.mark.parametrize("order", ["after the forward", "of the model", "to zeros", "by hand", "after the step"])
def test_gradients_may_be_cleared_anywhere_before_the_backward(order):
    net = convnet()
    optimizer = KFAC(net, "B-R-KFAC", **BUSY)
    for k in range(6):
        if order == "of the model":
            net.zero_grad()
        if order == "to zeros":
            optimizer.zero_grad(set_to_none=False)
        if order == "by hand" and k:
            for p in net.parameters():
                p.grad.zero_()
        loss = loss_of(net, images(k))
        if order == "after the forward":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if order == "after the step":
            optimizer.zero_grad(set_to_none=True)
    assert torch.equal(parameters(net), _reference_run())


@pytest.mark.parametrize("how", ["optimizer", "zeros", "model"])
def test_a_backward_whose_gradients_are_cleared_leaves_no_columns(how):
    net = convnet()
    optimizer = KFAC(net, "B-R-KFAC", **BUSY)
    for k in range(6):
        loss_of(net, images(50 + k, b=3)).backward()  # no step: given up, or a GradScaler's overflow
        net.zero_grad() if how == "model" else optimizer.zero_grad(set_to_none=how == "optimizer")
        loss_of(net, images(k)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(parameters(net), _reference_run())


def test_a_closure_is_a_forward_and_a_backward():
    net = convnet()
    optimizer = KFAC(net, "B-R-KFAC", **BUSY)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, images(optimizer.k))
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(6)]
    assert torch.equal(parameters(net), _reference_run())
    assert all(loss.requires_grad for loss in losses)


def test_columns_are_caught_only_in_steps_that_update_the_factors():
    net = convnet()
    optimizer = KFAC(net, "R-KFAC", **{**BUSY, "T_updt": 3})
    caught = []
    for k in range(7):
        optimizer.zero_grad()
        loss_of(net, images(k)).backward()
        caught.append([bool(layer.hooks.pending()) for layer in optimizer.layers.values()])
        optimizer.step()
    assert caught == [[k % 3 == 0] * 3 for k in range(7)]


def test_an_inplace_activation_behind_a_layer_changes_nothing():
    results = []
    for inplace in (False, True):
        net = convnet()
        net[1], net[4] = nn.ReLU(inplace), nn.ReLU(inplace)
        train(net, KFAC(net, "B-KFAC", **BUSY), [images(k) for k in range(5)])
        results.append(parameters(net))
    assert torch.equal(*results)


def test_a_learning_rate_scheduler_drives_it():
    net, other = convnet(), convnet()
    optimizer = KFAC(net, "R-KFAC", **BUSY)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    second = KFAC(other, "R-KFAC", **BUSY)
    for k in range(5):
        train(net, optimizer, [images(k)])
        scheduler.step()
        second.param_groups[0]["lr"] = 0.1 * 0.1 ** (k // 2)
        train(other, second, [images(k)])
    assert relative(parameters(net), parameters(other)) <= 1e-13


def test_param_groups_have_their_own_settings():
    net, whole = mlp(), mlp()
    biases = [net[0].bias, net[2].bias]
    groups = [{"params": [net[0].weight, net[2].weight]}, {"params": biases, "lr": 0.0, "momentum": 0.0}]
    optimizer = KFAC(net, "K-FAC", groups, **BUSY)
    before = [b.detach().clone() for b in biases]
    train(net, optimizer, [vectors(0)])
    assert all(torch.equal(a, b) for a, b in zip(before, biases, strict=True))
    train(whole, KFAC(whole, "K-FAC", **BUSY), [vectors(0)])
    assert torch.equal(net[0].weight, whole[0].weight)  # the factors saw the bias all the same


def test_a_frozen_bias_is_no_part_of_the_layer_and_a_frozen_weight_leaves_sgd():
    net = mlp()
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = KFAC(net, "K-FAC", **{**BUSY, "momentum": 0.0}, weight_decay=0)
    train(net, optimizer, [vectors(0)])
    assert list(optimizer.layers) == ["0"]
    assert optimizer.layers["0"].factors["A"].info.d == 40
    after = list(net.parameters())
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True, False]
    assert relative(after[3].detach(), before[3] - 0.1 * after[3].grad) <= 1e-15
    optimizer.add_param_group({"params": [net[2].weight.requires_grad_(True)], "lr": 0.2})
    train(net, optimizer, [vectors(1)])
    assert list(optimizer.layers) == ["0", "2"]


def test_a_bias_that_is_optimized_but_frozen_is_no_part_of_the_layer_either():
    results = []
    for explicit in (False, True):
        net = mlp()
        net[0].bias.requires_grad_(False)
        optimizer = KFAC(net, "K-FAC", net.parameters() if explicit else None, **BUSY, weight_decay=0)
        train(net, optimizer, [vectors(k) for k in range(4)])
        assert optimizer.layers["0"].factors["A"].info.d == 40
        results.append(parameters(net))
    assert torch.equal(*results)


def test_a_bias_may_be_frozen_and_trained_again_after_the_factors_were_made():
    net = mlp()
    optimizer = KFAC(net, "K-FAC", **BUSY)
    train(net, optimizer, [vectors(0)])
    net[0].bias.requires_grad_(False)
    train(net, optimizer, [vectors(k) for k in range(1, 3)])
    again = mlp()
    again[0].bias.requires_grad_(False)
    resumed = KFAC(again, "K-FAC", again.parameters(), **BUSY)
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for model, its in ((net, optimizer), (again, resumed)):
        model[0].bias.requires_grad_(True)
        train(model, its, [vectors(k) for k in range(3, 6)])
    assert torch.equal(parameters(net), parameters(again))


@pytest.mark.parametrize("options", [{}, {"linear_application": True}], ids=["Algorithm 1", "Algorithm 8"])
def test_gradients_of_inputs_taken_between_micro_batches_change_nothing(options):
    results = []
    for between in (False, True):
        net = mlp()
        optimizer = KFAC(net, "K-FAC", **BUSY, **options)
        for k in range(3):
            optimizer.zero_grad()
            for j in range(2):
                x, y = vectors(2 * k + j)
                if between:
                    inputs = x.clone().requires_grad_()
                    torch.autograd.grad(100 * loss_of(net, (inputs, y)), inputs)
                (loss_of(net, (x, y)) / 2).backward()
            optimizer.step()
        results.append(parameters(net))
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="aot_eager"), nn.DataParallel])
def test_wrapped_models_keep_the_names_of_their_layers(wrap):
    torch._dynamo.reset()
    net, plain = mlp(), mlp()
    wrapped = wrap(net)
    optimizer = KFAC(wrapped, "K-FAC", **BUSY)
    assert list(optimizer.layers) == ["0", "2"]
    train(wrapped, optimizer, [vectors(k) for k in range(3)])
    train(plain, KFAC(plain, "K-FAC", **BUSY), [vectors(k) for k in range(3)])
    assert relative(parameters(net), parameters(plain)) <= 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_with_an_inplace_activation_is_followed():
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 5)
        ).double()
        optimizer = KFAC(net, "R-KFAC", **BUSY)
        model = torch.compile(net, backend="aot_eager") if compiled else net
        train(model, optimizer, [images(k) for k in range(4)])
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-12


def test_attentions_output_projection_is_not_the_first_fully_connected_layer():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 64, batch_first=True), nn.Flatten(), nn.Linear(24, 3))
    optimizer = KFAC(net, "B-KFAC", rank=1)
    assert {name: layer.policy for name, layer in optimizer.layers.items()} == {
        "0.linear1": "B-KFAC", "0.linear2": "R-KFAC", "2": "R-KFAC"
    }  # fmt: skip


def test_what_the_hooks_refuse_shows_a_way_out():
    net = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 6)).double()
    optimizer = KFAC(net, "K-FAC", **BUSY)
    x, y = vectors(0)
    with pytest.raises(InputError, match=r"layer '0' .*; leave it to SGD with policy=\{'0': 'SGD'\}"):
        net[0](net(x)[:, :1].expand(-1, 40) + net[0](x))
    loss = loss_of(net, (x, y))
    optimizer.zero_grad()
    loss = loss_of(net, (x, y))
    loss.backward(retain_graph=True)
    with pytest.raises(InputError, match=r"second backward through one forward.*; leave it to SGD"):
        loss.backward()


def test_a_model_converted_after_its_first_step_is_refused_by_the_layers_name():
    net = mlp(torch.float32)
    optimizer = KFAC(net, "K-FAC", **BUSY)
    train(net, optimizer, [vectors(0, dtype=torch.float32), vectors(1, dtype=torch.float32)])
    net.double()
    with pytest.raises(InputError, match=r"'0', step 2: columns A in torch.float64 .* factor in torch.float32"):
        train(net, optimizer, [vectors(2)])


def test_a_layer_the_backward_does_not_reach_is_left_alone():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = mlp(), mlp()

        def forward(self, x, both=False):
            return self.used(x) + self.idle(x) if both else self.used(x)

    net = Branches()
    optimizer = KFAC(net, "K-FAC", **{**BUSY, "T_updt": 1})
    before = parameters(net.idle)
    for k in range(2):
        optimizer.zero_grad()
        x, y = vectors(k)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert torch.equal(parameters(net.idle), before)
    optimizer.zero_grad()
    F.cross_entropy(net(x, both=True), y).backward()
    optimizer.step()
    assert not torch.equal(parameters(net.idle), before)
    assert optimizer.layers["idle.0"].factors["A"].info.n == 4


# ---- what is left to SGD ------------------------------------------------------------------------------------


def test_grouped_convolutions_and_other_layers_get_plain_sgd_and_the_log_says_so_once(caplog):
    caplog.set_level(logging.INFO)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 4, 3)
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.norm = nn.BatchNorm2d(4)
            self.scale = nn.Parameter(torch.ones(()))
            self.tied, self.twin, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
            self.twin.weight = self.tied.weight

        def forward(self, x):
            x = self.scale * self.norm(self.grouped(self.conv(x))).flatten(1)
            return self.out(self.twin(torch.tanh(self.tied(x))))

    net, sgd = Net().double(), Net().double()
    optimizer = KFAC(net, "R-KFAC", lr=0.1, momentum=0.5, weight_decay=0.01, policy={"out": "SGD"}, rank=5)
    for model, opt in ((net, optimizer), (sgd, torch.optim.SGD(sgd.parameters(), 0.1, 0.5, weight_decay=0.01))):
        for k in range(3):
            opt.zero_grad()
            loss_of(model, images(k)).backward()
            if k == 2:  # so that one more step can be compared from the same gradient
                for p, q in zip(model.parameters(), net.parameters(), strict=True):
                    p.grad.copy_(q.grad)
            opt.step()
        if model is net:
            grads = [p.grad for p in net.parameters()]
    assert list(optimizer.layers) == ["conv"]
    assert len(grads) == len(list(sgd.parameters()))
    for name in ("grouped", "norm", "tied", "twin", "out"):
        assert caplog.text.count(f"layer {name!r} ") == 1
    levels = {record.getMessage().split("'")[1]: record.levelname for record in caplog.records}
    assert levels["grouped"] == "WARNING" and levels["norm"] == levels["out"] == "INFO"


def test_plain_sgd_is_torchs_sgd():
    net, other = mlp(), mlp()
    policy = {"0": "SGD", "2": "SGD"}
    optimizer = KFAC(net, "K-FAC", lr=0.1, momentum=0.9, weight_decay=0.01, policy=policy)
    train(net, optimizer, [vectors(k) for k in range(5)])
    train(other, torch.optim.SGD(other.parameters(), 0.1, 0.9, weight_decay=0.01), [vectors(k) for k in range(5)])
    assert relative(parameters(net), parameters(other)) <= 1e-14


def test_a_brand_factor_with_no_room_falls_back_to_rsvd_and_the_log_says_so_once(caplog):
    net = mlp()  # d_A = 41, d_G = 30
    optimizer = KFAC(net, "B-KFAC", **{**BUSY, "rank": 25})
    train(net, optimizer, [vectors(k, b=5) for k in range(5)])
    factors = optimizer.layers["0"].factors
    assert [type(factors[side].process).__name__ for side in "AG"] == ["Brand", "Rsvd"]
    assert caplog.text.count("r + n >= d (25 + 5 >= 30), R-KFAC in place of Brand's update") == 1
    assert len(caplog.records) == 1


# ---- numerical trouble --------------------------------------------------------------------------------------


def _failing_eigh(monkeypatch, fails) -> None:
    original = decompositions.eigh_descending

    def eigh(K, what="matrix"):
        if fails(K):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(K, what)

    monkeypatch.setattr(decompositions, "eigh_descending", eigh)


def test_a_failed_decomposition_is_tried_again_in_float64(monkeypatch):
    batches = [(x.float(), y) for x, y in (vectors(k) for k in range(6))]
    net, other = mlp(torch.float32), mlp(torch.float32)
    train(net, KFAC(net, "K-FAC", **BUSY), batches)
    _failing_eigh(monkeypatch, lambda K: K.dtype == torch.float32)
    optimizer = KFAC(other, "K-FAC", **BUSY)
    train(other, optimizer, batches)
    assert relative(parameters(other), parameters(net)) <= 1e-5
    factor = optimizer.layers["0"].factors["A"]
    assert factor.process.estimate.lowrank.D.dtype == factor.ea.M.dtype == torch.float32


def test_a_decomposition_that_fails_for_good_keeps_the_previous_inverse_and_warns(monkeypatch):
    net = mlp()
    optimizer = KFAC(net, "K-FAC", **{**BUSY, "T_updt": 1, "T_inv": 2})
    train(net, optimizer, [vectors(0), vectors(1)])
    kept = {side: f.process.estimate.lowrank.D.clone() for side, f in optimizer.layers["0"].factors.items()}
    _failing_eigh(monkeypatch, lambda K: len(K) == 41)
    with pytest.warns(RuntimeWarning, match="layer '0', factor A, step 2: .* previous inverse is kept") as caught:
        train(net, optimizer, [vectors(2)])
    assert len(caught) == 1 and "failed to converge" in str(caught[0].message)
    now = {side: f.process.estimate.lowrank.D for side, f in optimizer.layers["0"].factors.items()}
    assert torch.equal(now["A"], kept["A"]) and not torch.equal(now["G"], kept["G"])
    monkeypatch.undo()
    train(net, optimizer, [vectors(3)])  # not due before step 4, but the failed one is made up for
    assert not torch.equal(optimizer.layers["0"].factors["A"].process.estimate.lowrank.D, kept["A"])


@pytest.mark.parametrize("part", ["w", "V"])
@pytest.mark.parametrize("algorithm", ["K-FAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C"])
def test_an_evd_that_gives_nan_is_a_failed_one(algorithm, part, monkeypatch):
    import array_api_compat.torch.linalg as linalg

    original = linalg.eigh
    net = mlp(torch.float32)
    batches = [vectors(k, dtype=torch.float32) for k in range(3)]
    every = {**BUSY, "T_updt": 1, "T_inv": 1, "T_brand": 1, "T_rsvd": 1, "T_corct": 1}
    optimizer = KFAC(net, algorithm, **every)
    train(net, optimizer, batches[:2])
    factor = optimizer.layers["0"].factors["A"]
    before = factor.process.state_dict()

    def spoilt(M):
        w, V = (X.clone() for X in original(M))
        (w if part == "w" else V)[..., 0] = math.nan
        return w, V

    monkeypatch.setattr(linalg, "eigh", spoilt)
    with pytest.warns(RuntimeWarning) as caught:
        train(net, optimizer, batches[2:])
    said = {str(w.message).partition(", step 2: the decomposition failed")[0] for w in caught}
    assert said >= {"layer '0', factor A", "layer '0', factor G"}
    assert same(_leaves(factor.process.state_dict(), ""), _leaves(before, ""))
    assert parameters(net).isfinite().all()
    monkeypatch.undo()
    train(net, optimizer, batches[:1])
    assert not torch.equal(factor.process.estimate.lowrank.D, before["estimate"]["D"])


def test_an_overwriting_whose_brand_update_fails_is_undone(monkeypatch):
    net = mlp()
    optimizer = KFAC(net, "B-R-KFAC", **{**BUSY, "T_updt": 1, "T_brand": 1, "T_rsvd": 2})
    train(net, optimizer, [vectors(k) for k in range(2)])
    factor = optimizer.layers["0"].factors["A"]
    before = factor.process.state_dict()

    def fails(*args):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(processes, "symmetric_brand", fails)
    with pytest.warns(RuntimeWarning) as caught:
        train(net, optimizer, [vectors(2)])
    assert "layer '0', factor A, step 2: the decomposition failed" in str(caught[0].message)
    assert same(_leaves(factor.process.state_dict(), ""), _leaves(before, ""))
    monkeypatch.undo()
    train(net, optimizer, [vectors(3)])
    assert factor.process.taken == before["taken"] + 1  # what failed is made up for


def test_without_any_estimate_the_step_is_the_plain_gradient(monkeypatch, caplog):
    _failing_eigh(monkeypatch, lambda K: True)
    net, other = mlp(), mlp()
    plain = {"lr": 0.1, "clip": None, "weight_decay": 0}
    with pytest.warns(RuntimeWarning, match="decomposition failed"):
        train(net, KFAC(net, "K-FAC", **plain), [vectors(0)])
    train(other, torch.optim.SGD(other.parameters(), 0.1), [vectors(0)])
    assert relative(parameters(net), parameters(other)) <= 1e-15
    assert "layer '0', step 0: no estimate yet" in caplog.text


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_dead_layer_gets_the_plain_gradient_and_no_nan(algorithm, caplog):
    net = mlp()
    with torch.no_grad():
        net[2].weight.zero_()  # no gradient comes through to layer 0
    first = net[0].weight.detach().clone()
    optimizer = KFAC(net, algorithm, **{**BUSY, "T_updt": 1}, weight_decay=0, policy={"2": "SGD"})
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, [vectors(k) for k in range(3)])
    assert torch.equal(net[0].weight, first)
    assert caplog.text.count("plain gradient") == 1
    optimizer.param_groups[0]["lr"] = 0.1
    train(net, optimizer, [vectors(k) for k in range(3, 12)])
    assert parameters(net).isfinite().all()
    assert not torch.equal(net[0].weight, first)


@pytest.mark.parametrize("k", [0, 2, 3], ids=["first step", "update step", "other step"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_all_state_as_it_was(value, k, caplog):
    net = convnet()
    optimizer = KFAC(net, "B-R-KFAC", **BUSY)
    train(net, optimizer, [images(j) for j in range(k)])
    weights, state = parameters(net), snapshot(optimizer)
    x, y = images(99)
    x[0, 0, 0, 0] = value
    for _ in range(7):
        train(net, optimizer, [(x, y)])
    assert torch.equal(parameters(net), weights)
    assert same(state, snapshot(optimizer))
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition("skipped")[2] for text in said] == ["", " (2 so far)", " (4 so far)"]
    assert all(text.startswith(f"step {k}: NaN or Inf") for text in said)
    train(net, optimizer, [images(j) for j in range(k, 6)])
    assert torch.equal(parameters(net), _reference_run())


# ---- precision and amp --------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, ["0", "3", "5"]], ids=["Algorithm 1", "Algorithm 8"])
def test_gradscaler_gives_the_unscaled_steps_and_an_overflow_is_skipped(linear, caplog):
    net = convnet(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    optimizer = KFAC(net, "B-R-KFAC", **BUSY, loss_scale=scaler.get_scale, linear_application=linear)
    other = convnet(torch.float32)
    plain = KFAC(other, "B-R-KFAC", **BUSY)
    for k in range(8):
        x, y = images(k)
        x = x.float()
        if k == 4:  # the scaler sees an overflow, and calls no step()
            optimizer.zero_grad()
            scaler.scale(loss_of(net, (x * math.inf, y))).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        scaler.scale(loss_of(net, (x, y))).backward()
        scaler.step(optimizer)
        scaler.update()
        train(other, plain, [(x, y)])
    assert scaler.get_scale() != 2.0**12
    assert "Algorithm 1" not in caplog.text
    assert optimizer.k == plain.k == 8
    assert relative(parameters(net), parameters(other)) <= 1e-5


@pytest.mark.parametrize("linear", [False, True])
def test_factors_are_float32_under_bfloat16_autocast(linear, caplog):
    net = mlp(torch.float32)
    optimizer = KFAC(net, "B-R-KFAC", **BUSY, linear_application=linear)
    for k in range(6):
        x, y = vectors(k, dtype=torch.float32)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()  # inside, where products would be bfloat16
    other = mlp(torch.float32)
    train(other, KFAC(other, "B-R-KFAC", **BUSY), [vectors(k, dtype=torch.float32) for k in range(6)])
    assert relative(parameters(net) - parameters(mlp()), parameters(other) - parameters(mlp())) <= 0.05
    for key, value in snapshot(optimizer).items():
        assert not isinstance(value, Tensor) or value.dtype == torch.float32, key
    x = torch.cat([vectors(4)[0].float(), torch.ones(4, 1)], dim=1).T / 2
    lowrank = optimizer.layers["0"].factors["A"].process.estimate.lowrank
    assert relative(lowrank.project(x), lowrank.U.T @ x) <= 1e-6
    assert "Algorithm 1" not in caplog.text


def test_a_bfloat16_model_is_stepped_from_float32_factors():
    net = mlp(torch.bfloat16)
    optimizer = KFAC(net, "B-KFAC", **BUSY)
    train(net, optimizer, [vectors(k, dtype=torch.bfloat16) for k in range(6)])
    assert parameters(net).dtype == torch.bfloat16 and parameters(net).isfinite().all()
    assert optimizer.layers["0"].factors["A"].process.estimate.lowrank.D.dtype == torch.float32


def test_the_precision_of_products_is_the_users_again_after_a_step():
    net = mlp(torch.float32)
    optimizer = KFAC(net, "K-FAC", **BUSY)
    torch.set_float32_matmul_precision("high")
    try:
        train(net, optimizer, [vectors(0, dtype=torch.float32)])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- memory -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("linear", [False, True], ids=["Algorithm 1", "Algorithm 8"])
def test_brand_kfac_of_a_wide_layer_allocates_nothing_larger_than_its_weight(linear):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16384, 48, bias=False), nn.Tanh(), nn.Linear(48, 10))
    optimizer = KFAC(net, "B-KFAC", rank=8, T_updt=1, T_brand=1, linear_application=linear)
    with Largest() as largest:
        for k in range(4):
            g = torch.Generator().manual_seed(k)
            batch = torch.randn(16, 16384, generator=g), torch.randint(10, (16,), generator=g)
            train(net, optimizer, [batch])
    assert type(optimizer.layers["0"].factors["A"].process).__name__ == "Brand"
    assert largest.numel == 48 * 16384  # of 16384^2 = 2.7e8 for one factor
    held = [v.numel() for key, v in snapshot(optimizer).items() if "/layers/0/" in key and isinstance(v, Tensor)]
    assert max(held) <= 16384 * (8 + 16)


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "S-KFAC"}, "algorithm 'S-KFAC' is not one of K-FAC, R-KFAC"),
        ({"policy": {"7": "K-FAC"}}, "the model has no layer '7'"),
        ({"policy": {"1": "K-FAC"}}, "layer '1' is a Tanh, not a Linear or Conv2d"),
        ({"policy": {"0": "Z-KFAC"}}, "layer '0': .*'Z-KFAC' is not one of"),
        ({"policy": {"0": {"A": "K-FAC"}}}, "layer '0': a policy by factor needs the keys 'A' and 'G'"),
        ({"policy": {"0": 3}}, "layer '0': a process is named or made by a function, got 3"),
        ({"linear_application": True, "fisher": "sampled"}, "needs fisher='empirical'"),
        ({"linear_application": ["5"]}, "the model has no layer '5'"),
        ({"linear_application": ["1"]}, "Algorithm 8 cannot apply"),
        ({"rho": 1.0}, r"rho must lie in \(0, 1\), got 1.0"),
        ({"phi_lambda": 0.0}, "phi must be positive"),
        ({"phi_corct": 2}, r"phi_corct must lie in \(0, 1\]"),
        ({"T_updt": 0}, "T_updt must be a whole number of at least 1, got 0"),
        ({"T_updt": math.nan}, "T_updt must be a whole number of at least 1, got nan"),
        ({"T_inv": math.inf}, "T_inv must be a whole number of at least 1, got inf"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": None}, "rank must be a whole number of at least 1, got None"),
        ({"rho": "a"}, "rho must be a number, got 'a'"),
        ({"lr": "a"}, "lr must be a number, got 'a'"),
        ({"policy": "K-FAC"}, "policy must map layer names to choices, got 'K-FAC'"),
        ({"model": mlp().requires_grad_(False)}, "no trainable parameters"),
        ({"model": mlp().parameters()}, "the model must be an nn.Module"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip_by": "norm"}, "clip_by 'norm'"),
        ({"momentum": -1}, "momentum must not be negative"),
        ({"weight_decay": math.nan}, "weight_decay must not be negative"),
        ({"lr": -0.1}, "lr must not be negative"),
        ({"continuation": "max"}, "continuation 'max' is not one of none, min, trace"),
        ({"fisher": "true"}, "fisher 'true'"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        KFAC(**{"model": mlp(), **options})


def test_schedules_without_an_epoch_are_refused_at_the_step():
    net = mlp()
    optimizer = KFAC(net, "K-FAC", rank=lambda epoch: 5)
    loss_of(net, vectors(0)).backward()
    with pytest.raises(InputError, match=r"pass steps_per_epoch, or set optimizer\.epoch"):
        optimizer.step()
    optimizer.epoch = 0
    optimizer.step()
    assert optimizer.k == 1


def test_sampled_labels_that_were_not_asked_for_are_missed():
    net = mlp()
    optimizer = KFAC(net, "K-FAC", fisher="sampled")
    loss_of(net, vectors(0)).backward()
    with pytest.raises(InputError, match=r"layer '0', step 0: no sampled labels; call sample_fisher"):
        optimizer.step()
    with pytest.raises(InputError, match="made with fisher='sampled'"):
        KFAC(mlp(), "K-FAC").sample_fisher(torch.zeros(2, 3))


def test_sampled_labels_cost_a_backward_only_where_factors_are_updated():
    net = mlp()
    optimizer = KFAC(net, "K-FAC", fisher="sampled", T_updt=3)
    drawn = []

    def likelihood(out, generator):
        drawn.append(optimizer.k)
        return F.cross_entropy(out, torch.randint(6, (len(out),), generator=generator))

    for k in range(5):
        x, y = vectors(k)
        out = net(x)
        optimizer.zero_grad()
        optimizer.sample_fisher(out, likelihood)
        F.cross_entropy(out, y).backward()
        optimizer.step()
    assert drawn == [0, 3]


def test_a_gradient_without_columns_is_applied_plainly_and_the_log_says_so(caplog):
    net, other = mlp(), mlp()
    optimizer = KFAC(net, "K-FAC", lr=0.1, clip=None, weight_decay=0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert relative(parameters(net), parameters(other) - 0.1) <= 1e-15
    assert "layer '0', step 0: a gradient but no columns" in caplog.text


def test_no_warning_and_no_log_in_an_ordinary_run(caplog):
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _reference_run(8, "B-KFAC-C")
    assert not caplog.records
    assert np.isfinite(_reference_run(8).numpy()).all()
