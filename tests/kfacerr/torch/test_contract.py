"""What a torch training loop may expect of an optimizer, kept by K-FAC, Algorithm 8, `factored` and SENG alike."""

import copy
import gc
import io
import logging
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC, SENG
from tests.kfacerr.torch.cases import CASES, Case, leaves, loss_of, parameters, relative, same, snapshot, train
from tests.kfacerr.torch.test_columns import Conv1D


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def saved(state: Any) -> Any:
    """Written to a file and read again."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- checkpoints --------------------------------------------------------------------------------------------


def test_a_checkpoint_resumes_bit_for_bit(case):
    """In the middle of all periods, from a file, whatever the seed of the new optimizer."""
    batches = [case.batch(k, dtype=torch.float32) for k in range(14)]
    net = case.make(torch.float32)
    optimizer = case.optimizer(net)
    train(net, optimizer, batches[:7])
    state = saved({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    losses = train(net, optimizer, batches[7:])
    again = case.make(torch.float32)
    resumed = case.optimizer(again, seed=99)
    again.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    assert train(again, resumed, batches[7:]) == losses
    assert torch.equal(parameters(again), parameters(net))
    assert same(snapshot(resumed), snapshot(optimizer))


def test_a_loaded_state_is_not_shared(case):
    net, other = case.make(), case.make()
    optimizer, second = case.optimizer(net), case.optimizer(other)
    train(net, optimizer, [case.batch(0)])
    second.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    train(other, second, [case.batch(k) for k in range(1, 4)])
    assert same(before, snapshot(optimizer))


def test_a_state_that_is_refused_leaves_the_optimizer_as_it_was(case):
    net = case.make()
    optimizer = case.optimizer(net)
    train(net, optimizer, [case.batch(0)])
    before = snapshot(optimizer)
    with pytest.raises(InputError, match=f"not of a {type(optimizer).__name__} optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())
    other = case.make()
    groups = [{"params": list(part.parameters())} for part in (other[:1], other[1:])]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(case.optimizer(other, params=groups).state_dict())
    assert same(before, snapshot(optimizer))


def test_the_users_hooks_see_the_state_and_may_change_it(case):
    net, other = case.make(), case.make()
    optimizer, second = case.optimizer(net), case.optimizer(other)
    train(net, optimizer, [case.batch(k) for k in range(3)])
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1, "held": seen.append(state)})
    state = optimizer.state_dict()
    assert same(leaves(seen[0]), {k: v for k, v in snapshot(optimizer).items() if k not in ("/note", "/held")})
    second.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"], prepend=True)
    second.load_state_dict({"wrapped": state})
    other.load_state_dict(net.state_dict())
    optimizer = case.optimizer(net)
    optimizer.load_state_dict(state)
    for model, its in ((net, optimizer), (other, second)):
        train(model, its, [case.batch(k) for k in range(3, 6)])
    assert torch.equal(parameters(net), parameters(other))


@pytest.mark.parametrize("momentum", [0.5, 0.0])
def test_distributed_checkpoints_hold_all_of_the_state(case, momentum):
    """By parameter name; taking one, before the first step too, changes nothing."""
    net, other = case.make(), case.make()
    optimizer, second = case.optimizer(net, momentum=momentum), case.optimizer(other, momentum=momentum)
    get_optimizer_state_dict(net, optimizer)
    train(net, optimizer, [case.batch(k) for k in range(3)])
    state = saved(get_optimizer_state_dict(net, optimizer))
    assert "0.weight" in state["param_groups"][0]["params"]
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, second, state)
    assert same(snapshot(second), snapshot(optimizer))
    train(net, optimizer, [case.batch(k) for k in range(3, 8)])
    train(other, second, [case.batch(k) for k in range(3, 8)])
    assert torch.equal(parameters(net), parameters(other))
    assert torch.equal(parameters(net), case.run(8, momentum=momentum))


# ---- copies and lifetime ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_optimizer_is_independent_and_goes_on_alike(case, how):
    net = case.make()
    optimizer = case.optimizer(net)
    train(net, optimizer, [case.batch(k) for k in range(3)])
    twin, copied = how((net, optimizer))
    before = snapshot(optimizer)
    train(twin, copied, [case.batch(k) for k in range(3, 8)])
    assert same(before, snapshot(optimizer))
    train(net, optimizer, [case.batch(k) for k in range(3, 8)])
    assert torch.equal(parameters(twin), parameters(net))
    assert all(layer.module is twin.get_submodule(name) for name, layer in copied.layers.items())


def test_the_copy_of_an_optimizer_with_a_scheduler_steps_itself(case):
    net = case.make()
    optimizer = case.optimizer(net)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    twin, copied = copy.deepcopy((net, optimizer))
    before = parameters(net)
    train(twin, copied, [case.batch(0)])
    assert torch.equal(parameters(net), before) and not torch.equal(parameters(twin), before)
    assert (optimizer.k, copied.k) == (0, 1)


def test_deepcopy_of_the_model_alone_leaves_the_optimizer_with_the_original(case):
    net = case.make()
    optimizer = case.optimizer(net)
    twin = copy.deepcopy(net)
    for k in range(6):
        loss_of(twin, case.batch(10 + k)).backward()
        train(net, optimizer, [case.batch(k)])
    assert torch.equal(parameters(net), case.run())


def test_an_optimizer_that_is_gone_has_taken_its_hooks_with_it(case):
    net = case.make()
    for how in ("closed", "deleted"):
        optimizer = case.optimizer(net)
        train(net, optimizer, [case.batch(0)])
        assert any(module._forward_hooks for module in net.modules())
        if how == "closed":
            optimizer.close()
        del optimizer
        gc.collect()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# ---- around the step ----------------------------------------------------------------------------------------


def test_evaluation_between_the_steps_and_their_parts_changes_nothing(case):
    net = case.make()
    optimizer = case.optimizer(net)
    for k in range(6):
        optimizer.zero_grad()
        with torch.no_grad():
            net(case.batch(100)[0])
        loss = loss_of(net, case.batch(k))
        with torch.no_grad():
            net(case.batch(101, b=7)[0])
        loss.backward()
        net(case.batch(102, b=5)[0])  # with gradients, but no backward
        net[:1](case.batch(103, b=5)[0])
        optimizer.step()
    assert torch.equal(parameters(net), case.run())


@pytest.mark.parametrize("order", ["after the forward", "of the model", "to zeros", "by hand", "after the step"])
def test_gradients_may_be_cleared_anywhere_before_the_backward(case, order):
    net = case.make()
    optimizer = case.optimizer(net)
    for k in range(6):
        if order == "of the model":
            net.zero_grad()
        if order == "to zeros":
            optimizer.zero_grad(set_to_none=False)
        if order == "by hand" and k:
            for p in net.parameters():
                if p.grad is not None:
                    p.grad.zero_()
        loss = loss_of(net, case.batch(k))
        if order == "after the forward":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if order == "after the step":
            optimizer.zero_grad(set_to_none=True)
    assert relative(parameters(net), case.run()) <= 1e-13  # a gradient that is added to zeros has been formed


@pytest.mark.parametrize("how", ["optimizer", "zeros", "model", "by hand"])
def test_a_backward_whose_gradients_are_cleared_leaves_no_columns(case, how):
    net = case.make()
    optimizer = case.optimizer(net)
    for k in range(6):
        loss_of(net, case.batch(50 + k, b=3)).backward()  # no step: given up, or a GradScaler's overflow
        if how == "model":
            net.zero_grad()
        elif how == "by hand":
            for p in net.parameters():
                p.grad = None
        else:
            optimizer.zero_grad(set_to_none=how == "optimizer")
        loss_of(net, case.batch(k)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative(parameters(net), case.run()) <= 1e-13


def test_a_closure_is_a_forward_and_a_backward(case):
    net = case.make()
    optimizer = case.optimizer(net)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, case.batch(optimizer.k))
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(6)]
    assert torch.equal(parameters(net), case.run())
    assert all(loss.requires_grad for loss in losses)


def test_a_learning_rate_scheduler_drives_it(case):
    net, other = case.make(), case.make()
    optimizer, second = case.optimizer(net, lr=0.1), case.optimizer(other)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    for k in range(5):
        train(net, optimizer, [case.batch(k)])
        scheduler.step()
        second.param_groups[0]["lr"] = 0.1 * 0.1 ** (k // 2)
        train(other, second, [case.batch(k)])
    assert relative(parameters(net), parameters(other)) <= 1e-13


def test_an_inplace_activation_behind_a_layer_changes_nothing(case):
    results = []
    for inplace in (False, True):
        net = case.make()
        for i in (1, 4):
            if i < len(net):
                net[i] = nn.ReLU(inplace)
        train(net, case.optimizer(net), [case.batch(k) for k in range(5)])
        results.append(parameters(net))
    assert torch.equal(*results)


def test_gradients_of_inputs_taken_between_micro_batches_change_nothing(case):
    results = []
    for between in (False, True):
        net = case.make()
        optimizer = case.optimizer(net)
        for k in range(3):
            optimizer.zero_grad()
            for j in range(2):
                x, y = case.batch(2 * k + j)
                if between:
                    inputs = x.clone().requires_grad_()
                    torch.autograd.grad(100 * loss_of(net, (inputs, y)), inputs)
                (loss_of(net, (x, y)) / 2).backward()
            optimizer.step()
        results.append(parameters(net))
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="aot_eager"), nn.DataParallel])
def test_wrapped_models_keep_the_names_of_their_layers(case, wrap):
    torch._dynamo.reset()
    net = case.make()
    wrapped = wrap(net)
    optimizer = case.optimizer(wrapped)
    assert all(name in dict(net.named_modules()) for name in optimizer.layers) and optimizer.layers
    train(wrapped, optimizer, [case.batch(k) for k in range(4)])
    assert relative(parameters(net), case.run(4)) <= 1e-12


def test_a_model_converted_before_the_first_step_is_followed(case):
    net, other = case.make(torch.float32), case.make(torch.float32)
    optimizer = case.optimizer(net)
    net.double()
    other.double()
    train(net, optimizer, [case.batch(k) for k in range(3)])
    train(other, case.optimizer(other), [case.batch(k) for k in range(3)])
    assert torch.equal(parameters(net), parameters(other))


def test_no_warning_and_no_log_in_an_ordinary_run(case, caplog):
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert case.run(8).isfinite().all()
    assert not [record for record in caplog.records if record.name.startswith("kfacerr")]


# ---- micro-batches, and whoever calls the layers ------------------------------------------------------------


def test_micro_batches_are_the_full_batch(case):
    results = []
    for sizes in ([12], [5, 4, 3]):
        net = case.make()
        optimizer = case.optimizer(net)
        for k in range(4):
            x, y = case.batch(k, b=12)
            optimizer.zero_grad()
            for part in torch.arange(12).split(sizes):
                (loss_of(net, (x[part], y[part])) * len(part) / 12).backward()
            optimizer.step()
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-9


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "root never called", "forwards first"])
def test_it_does_not_matter_who_calls_the_layers_and_when(case, way):
    """Recomputed activations; a model whose parts alone are called (Lightning); interleaved micro-batches."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.make()

    results = []
    for plain in (True, False):
        holder = Holder()
        optimizer = case.optimizer(holder)
        for k in range(4):
            optimizer.zero_grad()
            losses = []
            for j in range(2):
                x, y = case.batch(2 * k + j)
                if plain or way in ("root never called", "forwards first"):
                    out = holder.net(x)
                else:
                    out = checkpoint(holder.net, x.requires_grad_(), use_reentrant=way == "reentrant")
                losses.append(F.cross_entropy(out, y) / 2)
                if plain or way != "forwards first":
                    losses.pop().backward()
            for loss in losses:
                loss.backward()
            optimizer.step()
        results.append(parameters(holder))
    assert relative(results[1], results[0]) <= 1e-12


def test_backwards_through_one_graph_add_up(case):
    results = []
    for twice in (False, True):
        net = case.make()
        optimizer = case.optimizer(net)
        for k in range(3):
            optimizer.zero_grad()
            loss = loss_of(net, case.batch(k))
            if twice:
                (0.25 * loss).backward(retain_graph=True)
                (0.75 * loss).backward()
            else:
                loss.backward()
            optimizer.step()
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-11


def test_a_layer_used_twice_is_refused_and_the_error_shows_a_way_out(case):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.inner(torch.tanh(self.inner(x))))

    net, batch = Twice(), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    out = {"policy": {"inner": "SGD"}}
    for optimizer in (KFAC(net, "K-FAC"), SENG(net)):
        for _ in range(2):  # not in the first step alone
            with pytest.raises(InputError, match=r"layer 'inner' is used twice in one backward.*; leave it"):
                loss_of(net, batch).backward()
        optimizer.close()
    for optimizer in (KFAC(net, "K-FAC", **out), SENG(net, layers=["last"])):
        train(net, optimizer, [batch])
        optimizer.close()
    assert parameters(net).isfinite().all()


def test_an_input_overwritten_in_place_is_refused(case):
    net = case.make()
    optimizer = case.optimizer(net)
    x, y = case.batch(0)
    loss_of(net, (x, y)).backward()
    x.add_(1)
    with pytest.raises(
        InputError, match="layer '0' had its input overwritten in place after the forward; leave it"
    ):
        optimizer.step()


# ---- which parameters ---------------------------------------------------------------------------------------


def test_param_groups_have_their_own_settings(case):
    net, whole = case.make(), case.make()
    weights = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim == 1]
    optimizer = case.optimizer(net, params=[{"params": weights}, {"params": biases, "lr": 0.0, "momentum": 0.0}])
    before = [b.detach().clone() for b in biases]
    train(net, optimizer, [case.batch(0)])
    train(whole, case.optimizer(whole), [case.batch(0)])
    assert all(torch.equal(a, b) for a, b in zip(before, biases, strict=True))
    others = [p for p in whole.parameters() if p.ndim > 1]
    assert all(torch.equal(p, q) for p, q in zip(weights, others, strict=True))  # the factors saw the bias


def test_layers_that_are_unfrozen_later_are_preconditioned_from_then_on(case):
    """And a frozen layer is left as it is."""
    net, other = case.make(), case.make()
    net[-1].requires_grad_(False)
    before = net[-1].weight.detach().clone()
    optimizer = case.optimizer(net)
    train(net, optimizer, [case.batch(k) for k in range(2)])
    assert torch.equal(net[-1].weight, before)
    other.load_state_dict(net.state_dict())
    net[-1].requires_grad_(True)
    period = {"update_every": 1} if isinstance(optimizer, SENG) else {}
    fresh = case.optimizer(other, **period)
    for k in range(2, 8):
        train(net, optimizer, [case.batch(k)])
    train(other, fresh, [case.batch(2)])
    assert not torch.equal(net[-1].weight, before)
    layer = optimizer.layers[str(len(net) - 1)]
    assert (layer.factors if isinstance(optimizer, KFAC) else layer.curvature) is not None


def test_a_group_that_comes_later_brings_its_layers(case):
    net, whole = case.make(), case.make()
    last = list(net[-1].parameters())
    optimizer = case.optimizer(net, params=list(net[:-1].parameters()))
    assert str(len(net) - 1) not in optimizer.layers
    optimizer.add_param_group({"params": last})
    train(net, optimizer, [case.batch(k) for k in range(4)])
    train(whole, case.optimizer(whole), [case.batch(k) for k in range(4)])
    assert relative(parameters(net), parameters(whole)) <= 1e-13
    with pytest.raises(InputError, match="lr must not be negative"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0})
    assert len(optimizer.param_groups) == 2


def test_a_bias_that_is_frozen_is_no_part_of_the_layer(case):
    results = []
    for explicit in (False, True):
        net = case.make()
        net[-1].bias.requires_grad_(False)
        own = [p for p in net.parameters() if p.requires_grad]
        optimizer = case.optimizer(net, params=own if explicit else None, weight_decay=0)
        train(net, optimizer, [case.batch(k) for k in range(4)])
        assert optimizer.layers[str(len(net) - 1)].dimensions[0] == net[-1].in_features
        results.append(parameters(net))
    assert torch.equal(*results)


def test_a_bias_that_two_layers_share_is_a_part_of_none(case):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.make()
            self.other = copy.deepcopy(self.net[-1])
            self.other.bias = self.net[-1].bias

        def forward(self, x):
            h = self.net[:-1](x)
            return self.net[-1](h) + self.other(h)

    net = Tied()
    optimizer = case.optimizer(net, momentum=0.0, weight_decay=0.0, lr=0.1)
    before = net.other.bias.detach().clone()
    loss_of(net, case.batch(0)).backward()
    step = 0.1 * net.other.bias.grad / (1 + optimizer.param_groups[0].get("damping", 0.0))
    optimizer.step()
    torch.testing.assert_close(net.other.bias.detach(), before - step)
    assert optimizer.layers["other"].dimensions[0] == net.other.in_features


def test_a_weight_that_is_pruned_later_is_trained_plainly_and_the_log_says_so(case, caplog):
    net = case.make()
    optimizer = case.optimizer(net, momentum=0.0, weight_decay=0.0, lr=0.1)
    train(net, optimizer, [case.batch(0)])
    prune.random_unstructured(net[-1], "weight", 0.5)
    before = net[-1].weight_orig.detach().clone()
    train(net, optimizer, [case.batch(1)])
    divided = 1 + optimizer.param_groups[0].get("damping", 0.0)
    torch.testing.assert_close(net[-1].weight_orig.detach(), before - 0.1 * net[-1].weight_orig.grad / divided)
    assert caplog.text.count("its weight is computed from other parameters now") == 1
    prune.remove(net[-1], "weight")
    train(net, optimizer, [case.batch(k) for k in range(2, 6)])
    assert parameters(net).isfinite().all()


def test_a_weight_that_is_replaced_is_not_trained_and_the_log_says_so(case, caplog):
    net = case.make()
    optimizer = case.optimizer(net)
    train(net, optimizer, [case.batch(0)])
    new = net[-1].weight = nn.Parameter(net[-1].weight.detach().clone())
    before = new.detach().clone()
    train(net, optimizer, [case.batch(k) for k in range(1, 4)])
    assert torch.equal(new, before)
    assert caplog.text.count("its weight is not the one that is optimized now") == 1
    optimizer.add_param_group({"params": [new]})
    train(net, optimizer, [case.batch(k) for k in range(4, 8)])
    assert not torch.equal(new, before) and parameters(net).isfinite().all()


def test_sparse_gradients_are_stepped_with_weight_decay_and_momentum(case):
    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(9, 40, sparse=sparse, dtype=torch.float64)
            self.net = CASES["factored"].make()

        def forward(self, x):
            return self.net(self.words(x))

    results = []
    for sparse in (False, True):
        net = Words(sparse)
        make = SENG if case is CASES["SENG"] else KFAC
        options = {} if make is SENG else {"T_updt": 2, "T_inv": 2}
        optimizer = make(net, momentum=0.5, weight_decay=0.01, **options)
        train(net, optimizer, [(torch.tensor([k, k + 1, k]), torch.tensor([0, 1, 2])) for k in range(4)])
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-13


def test_what_nothing_can_precondition_is_said_once_and_loudly(case, caplog):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0][:, 0]

    net = Attention()
    optimizer = (SENG if case is CASES["SENG"] else KFAC)(net)
    assert not optimizer.layers
    for k in range(2):
        x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(k))
        train(net, optimizer, [(x, torch.tensor([0, 1, 2, 3]))])
    loud = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("layer 'attention' is a MultiheadAttention" in text for text in loud) == 1
    assert sum("layer 'attention.out_proj' is part of a MultiheadAttention" in text for text in loud) == 1
    assert sum("no layer of the model is preconditioned" in text for text in loud) == 1
    assert len(loud) == 2


def test_a_layer_the_backward_does_not_reach_is_left_alone(case):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = case.make(), case.make()

        def forward(self, x, both=False):
            return self.used(x) + self.idle(x) if both else self.used(x)

    net = Branches()
    optimizer = case.optimizer(net)
    before = parameters(net.idle)
    train(net, optimizer, [case.batch(k) for k in range(6)])
    assert torch.equal(parameters(net.idle), before)
    optimizer.zero_grad()
    x, y = case.batch(6)
    F.cross_entropy(net(x, both=True), y).backward()
    optimizer.step()
    assert not torch.equal(parameters(net.idle), before)


def _transposed(net: nn.Sequential) -> nn.Sequential:
    """Its Linear layers as transformers' Conv1D, whose weight is (d_in, d_out)."""
    twin = copy.deepcopy(net)
    for i, layer in enumerate(twin):
        if isinstance(layer, nn.Linear):
            twin[i] = Conv1D(layer.out_features, layer.in_features).to(layer.weight.dtype)
            twin[i].weight.data, twin[i].bias.data = layer.weight.detach().T.contiguous(), layer.bias.detach()
    return twin


def _flattened(net: nn.Sequential) -> nn.Sequential:
    """Its convolutions over images of height 1 as convolutions over sequences."""
    twin = copy.deepcopy(net)
    first = nn.Conv1d(2, 3, 3, padding=1).double()
    first.weight.data, first.bias.data = twin[0].weight.detach()[:, :, 0], twin[0].bias.detach()
    twin[0] = first
    return twin


def _images_of_height_1() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(18, 5)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("kind", ["Conv1D of transformers", "Conv1d"])
def test_layers_of_another_layout_take_the_same_steps(case, kind):
    sequences = kind == "Conv1d"
    plain = _images_of_height_1() if sequences else case.make()
    twin = (_flattened if sequences else _transposed)(plain)
    for net in (plain, twin):
        optimizer = case.optimizer(net, weight_decay=0.01)
        for k in range(6):
            x, y = case.batch(k)
            if sequences:
                x = torch.randn(4, 2, 1, 6, generator=torch.Generator().manual_seed(k), dtype=x.dtype)
                x = x[:, :, 0] if net is twin else x
            train(net, optimizer, [(x, y % 5)])
        assert len(optimizer.layers) == sum(hasattr(layer, "weight") for layer in net)
    for p, q in zip(plain.parameters(), twin.parameters(), strict=True):
        q = q.T if q.ndim == 2 and not sequences else q
        assert relative(q.detach().reshape(p.shape), p.detach()) <= 1e-11


# ---- numbers that are not finite, precision -----------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_all_state_as_it_was(case, value, k, caplog):
    net = case.make()
    optimizer = case.optimizer(net)
    train(net, optimizer, [case.batch(j) for j in range(k)])
    weights, state = parameters(net), snapshot(optimizer)
    x, y = case.batch(99)
    x.view(-1)[0] = value
    train(net, optimizer, 7 * [(x, y)])
    assert torch.equal(parameters(net), weights)
    assert same(state, snapshot(optimizer)) and optimizer.k == k
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition("skipped")[2] for text in said] == ["", " (2 so far)", " (4 so far)"]
    assert all(f"step {k}: NaN or Inf" in text for text in said)
    train(net, optimizer, [case.batch(j) for j in range(k, 6)])
    assert torch.equal(parameters(net), case.run())


@pytest.mark.parametrize("way", ["told", "declared", "declared, clipped"])
def test_gradscaler_gives_the_unscaled_steps_and_an_overflow_is_skipped(case, way, caplog):
    net, other = case.make(torch.float32), case.make(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    declared = {} if way == "told" else {"loss_scale": scaler.get_scale}
    optimizer, plain = case.optimizer(net, **declared), case.optimizer(other)
    for k in range(8):
        x, y = case.batch(k, dtype=torch.float32)
        if k == 4:  # the scaler sees an overflow
            before, state = parameters(net), snapshot(optimizer)
            optimizer.zero_grad()
            scaler.scale(loss_of(net, (x * math.inf, y))).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(parameters(net), before) and same(snapshot(optimizer), state)
        optimizer.zero_grad()
        scaler.scale(loss_of(net, (x, y))).backward()
        if way.endswith("clipped"):
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        loss_of(other, (x, y)).backward()
        if way.endswith("clipped"):
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        plain.step()
        torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])
    assert scaler.get_scale() != 2.0**12
    assert not [record for record in caplog.records if record.name.startswith("kfacerr")]
    assert optimizer.k == plain.k == 8
    assert relative(parameters(net), parameters(other)) <= 1e-5


def test_gradients_that_a_gradscaler_unscaled_before_the_step_are_refused_without_the_scale(case):
    """And what the scaler had said of that step is not taken for the next one's."""
    net = case.make(torch.float32)
    before, optimizer = parameters(net), case.optimizer(net)
    batch = case.batch(0, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, batch)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    with pytest.raises(
        InputError, match=r"step 0: scaler\.unscale_\(\) came .* pass loss_scale=scaler\.get_scale$"
    ):
        scaler.step(optimizer)
    assert torch.equal(parameters(net), before)
    train(net, optimizer, [batch])
    assert torch.equal(parameters(net), parameters(_trained(case, [batch])))


def test_an_error_in_the_step_leaves_nothing_of_what_the_scaler_said(case, monkeypatch):
    net = case.make(torch.float32)
    optimizer = case.optimizer(net)
    batch = case.batch(0, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_advance", lambda *_: 1 / 0)
        scaler.scale(loss_of(net, batch)).backward()
        with pytest.raises(ZeroDivisionError):
            scaler.step(optimizer)
    optimizer.zero_grad()
    scaler.scale(loss_of(net, batch)).backward()
    scaler.step(optimizer)
    assert relative(parameters(net), parameters(_trained(case, [batch]))) <= 1e-6


def _trained(case: Case, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    net = case.make(torch.float32)
    train(net, case.optimizer(net), batches)
    return net


def test_float16_parameters_under_a_gradscaler_are_refused(case):
    net = case.make(torch.float16)
    optimizer, scaler = case.optimizer(net), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(net, case.batch(0, dtype=torch.float16)).float()).backward()
    with pytest.raises(InputError, match="needs float32 parameters and autocast"):
        scaler.step(optimizer)


def test_a_scale_that_nobody_declared_is_refused_at_the_first_step(case):
    """Scaled and unscaled by hand, or by a scaler that tells the optimizer nothing."""
    net = case.make(torch.float32)
    before, optimizer = parameters(net), case.optimizer(net)
    for _ in range(2):
        optimizer.zero_grad()
        (2.0**16 * loss_of(net, case.batch(0, dtype=torch.float32))).backward()
        for p in net.parameters():
            p.grad /= 2.0**16
        with pytest.raises(InputError, match=r"step 0: .grad is 65536 times smaller .* as loss_scale"):
            optimizer.step()
    assert torch.equal(parameters(net), before)


def test_a_loss_scale_that_is_declared_does_not_change_the_step(case):
    results = []
    for scale in (1.0, 1024.0):
        net = case.make()
        optimizer = case.optimizer(net, loss_scale=scale)
        for k in range(3):
            optimizer.zero_grad()
            (scale * loss_of(net, case.batch(k))).backward()
            for p in net.parameters():
                p.grad /= scale
            optimizer.step()
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-12


def test_all_state_is_float32_under_bfloat16_autocast(case):
    net, other = case.make(torch.float32), case.make(torch.float32)
    optimizer = case.optimizer(net)
    for k in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(net, case.batch(k, dtype=torch.float32)).backward()
            optimizer.step()  # inside, where products would be bfloat16
    train(other, case.optimizer(other), [case.batch(k, dtype=torch.float32) for k in range(6)])
    start = parameters(case.make(torch.float32))
    assert relative(parameters(net) - start, parameters(other) - start) <= 0.05
    for key, value in snapshot(optimizer).items():
        assert not isinstance(value, Tensor) or value.dtype in (torch.float32, torch.int64, torch.uint8), key


def test_a_bfloat16_model_is_stepped_from_float32(case):
    net = case.make(torch.bfloat16)
    optimizer = case.optimizer(net)
    train(net, optimizer, [case.batch(k, dtype=torch.bfloat16) for k in range(6)])
    assert parameters(net).dtype == torch.bfloat16 and parameters(net).isfinite().all()
    own = {
        key: v for key, v in snapshot(optimizer).items() if key.startswith("/param_groups") and "/layers/" in key
    }
    floats = {v.dtype for v in own.values() if isinstance(v, Tensor) and v.is_floating_point()}
    assert floats == {torch.float32}
    again = case.make(torch.bfloat16)
    resumed = case.optimizer(again)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert same(snapshot(resumed), snapshot(optimizer))


def test_the_precision_of_products_is_the_users_again_after_a_step(case):
    net = case.make(torch.float32)
    optimizer = case.optimizer(net)
    torch.set_float32_matmul_precision("high")
    try:
        train(net, optimizer, [case.batch(0, dtype=torch.float32)])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "a"}, "lr must be a number, got 'a'"),
        ({"lr": -0.1}, "lr must not be negative"),
        ({"momentum": -1}, "momentum must not be negative"),
        ({"weight_decay": math.nan}, "weight_decay must not be negative"),
    ],
)
def test_settings_of_groups_out_of_range_are_named(case, options, message):
    with pytest.raises(InputError, match=message):
        case.optimizer(case.make(), **options)


def test_a_model_with_nothing_to_train_and_what_is_no_model_are_refused(case):
    with pytest.raises(InputError, match="no trainable parameters"):
        case.optimizer(case.make().requires_grad_(False))
    with pytest.raises(InputError, match=r"the model must be an nn\.Module, got generator"):
        case.optimizer(case.make().parameters())
