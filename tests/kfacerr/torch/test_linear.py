"""`FactoredLinear`: the steps of `nn.Linear` without its gradient, and that gradient for whoever reads it."""

import copy
import importlib
import io
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC, FactoredLinear, factored
from kfacerr.torch._direction import Product, norm, reach
from kfacerr.torch.linear import FactoredParameter, formed, has_gradient, held
from tests.kfacerr.torch.cases import (
    New,
    loss_of,
    mlp,
    parameters,
    relative,
    train,
    vectors,
    wide_convnet,
    wide_images,
)

BUSY = {"rank": 4, "lr": 0.1, "T_updt": 3, "T_inv": 3, "T_brand": 3, "T_corct": 6, "T_rsvd": 6, "momentum": 0.5}


def drop_in() -> nn.Sequential:
    """`mlp()`, 40-30-6, whose first layer's factors are smaller than its gradient at batches of 4."""
    return factored(mlp())


def is_deferred(p: nn.Parameter) -> bool:
    return bool(held(p)) and formed(p) is None


@pytest.fixture
def never_formed(monkeypatch):
    """Fails the test where a gradient is formed from its factors; the 6 x 30 output layer's may be."""
    original = FactoredParameter.form

    def form(self, loss_scale=1.0):
        assert not held(self) or len(self) == 6, "the gradient was formed"
        original(self, loss_scale)

    monkeypatch.setattr(FactoredParameter, "form", form)


# ---- the gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40)], ids=str)
def test_gradients_are_those_of_a_linear_layer(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(40, 30, bias=bias, dtype=torch.float64)
    layer = factored(copy.deepcopy(plain))
    x = torch.randn(shape, dtype=torch.float64)
    grads = []
    for module in (plain, layer):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        if module is layer:
            assert all(is_deferred(p) for p in layer.parameters())
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a.shape == b.shape and (a - b).abs().sum() <= 1e-13 * (1 + b.abs().sum())


def test_the_backward_makes_nothing_of_the_weights_size():
    layer = FactoredLinear(300, 200)
    x = torch.randn(5, 300, requires_grad=True)
    with New(300 * 200) as new:
        layer(x).square().sum().backward()
    assert new.count == 0 and x.grad is not None


@pytest.mark.parametrize("make", ["SGD", "Adam", "foreach", "fused"])
def test_a_plain_optimizer_trains_it_like_a_linear_layer(make):
    optimizers = {
        "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
        "Adam": lambda p: torch.optim.Adam(p, 0.01),
        "foreach": lambda p: torch.optim.SGD(p, 0.1, foreach=True),
        "fused": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    }
    nets = [mlp(), drop_in()]
    for net in nets:
        train(net, optimizers[make](net.parameters()), [vectors(k) for k in range(4)])
    assert relative(parameters(nets[1]), parameters(nets[0])) <= 1e-13
    assert relative(parameters(nets[1]), parameters(mlp())) > 1e-3


def test_an_optimizer_made_before_the_swap_goes_on_with_the_same_parameters():
    net, other = mlp(), mlp()
    before = list(net.parameters())
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    factored(net)
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    train(net, sgd, [vectors(0)])
    train(other, torch.optim.SGD(other.parameters(), 0.1), [vectors(0)])
    assert relative(parameters(net), parameters(other)) <= 1e-14


def test_accumulated_gradients_are_formed_when_their_factors_outgrow_them():
    layer, plain = FactoredLinear(40, 30).double(), nn.Linear(40, 30).double()
    plain.load_state_dict(layer.state_dict())
    most = 0
    for k in range(40):
        for module in (layer, plain):
            module(vectors(k)[0]).square().sum().backward()
        most = max(most, sum(share.numel for share in held(layer.weight)))
    assert 0 < most <= 40 * 30
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        assert relative(a.grad, b.grad) <= 1e-13


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_are_frozen_get_no_gradient(name):
    layer, plain = FactoredLinear(40, 30).double(), nn.Linear(40, 30).double()
    plain.load_state_dict(layer.state_dict())
    for module in (layer, plain):
        getattr(module, name).requires_grad_(False)
        module(vectors(0)[0]).square().sum().backward()
    assert getattr(layer, name).grad is None
    other = "bias" if name == "weight" else "weight"
    assert relative(getattr(layer, other).grad, getattr(plain, other).grad) <= 1e-14


def test_weights_that_are_shared_sum_their_gradients():
    net, tied = (nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)).double() for _ in range(2))
    net.load_state_dict(tied.state_dict())
    for model in (net, tied):
        model[2].weight = model[0].weight
    factored(tied)
    x = torch.randn(3, 20, dtype=torch.float64)
    for model in (net, tied):
        model(x).square().sum().backward()
    assert is_deferred(tied[0].weight)
    assert relative(tied[0].weight.grad, net[0].weight.grad) <= 1e-13


def test_setting_or_deleting_the_gradient_drops_the_factors():
    layer = FactoredLinear(40, 30)
    for how in ("set to None", "deleted", "zero_grad"):
        layer(torch.randn(2, 40)).sum().backward()
        if how == "set to None":
            layer.weight.grad = None
        elif how == "deleted":
            del layer.weight.grad
        else:
            layer.zero_grad()
        assert not has_gradient(layer.weight)
        layer.bias.grad = None


# ---- what is formed at once ---------------------------------------------------------------------------------


def test_hooks_on_the_parameters_see_the_gradient():
    layer = FactoredLinear(40, 30)
    seen = []
    layer.weight.register_hook(lambda g: seen.append(g.shape))
    layer.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    layer(torch.randn(2, 40)).sum().backward()
    assert sorted(seen) == [(30,), (30, 40)]


def test_autograd_grad_hands_out_the_gradient_and_leaves_none():
    layer = FactoredLinear(40, 30).double()
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    g, gx = torch.autograd.grad(layer(x).square().sum(), [layer.weight, x])
    torch.autograd.grad(layer(x).square().sum(), x)
    layer(x).square().sum().backward(inputs=[x])
    assert not has_gradient(layer.weight) and not has_gradient(layer.bias)
    layer(x).square().sum().backward(inputs=[layer.weight])
    assert is_deferred(layer.weight) and not has_gradient(layer.bias)
    assert relative(layer.weight.grad, g) <= 1e-14 and gx.shape == x.shape


def test_a_double_backward_is_that_of_a_linear_layer():
    results = []
    for net in (mlp(), drop_in()):
        x = vectors(0)[0].requires_grad_()
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        (loss_of(net, (x, vectors(0)[1])) + g.square().sum()).backward()
        results.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert relative(results[1], results[0]) <= 1e-13


def test_a_backward_that_builds_a_graph_leaves_a_gradient_with_one():
    seconds = []
    for net in (mlp(), drop_in()):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.* with create_graph=True")  # torch says it once
            loss_of(net, vectors(0)).backward(create_graph=True)
        g = net[0].weight.grad
        seconds.append(torch.autograd.grad(g.square().sum(), net[2].weight)[0])
        net[0].weight.grad = net[0].bias.grad = net[2].weight.grad = net[2].bias.grad = None
    assert relative(seconds[1], seconds[0]) <= 1e-12


def test_a_layer_switched_off_or_with_a_computed_weight_is_a_linear_layer():
    off = FactoredLinear(40, 30)
    off.defer = False
    computed = nn.utils.parametrizations.weight_norm(FactoredLinear(40, 30))
    for layer in (off, computed):
        layer(torch.randn(2, 40)).sum().backward()
        assert all(formed(p) is not None for p in layer.parameters())


def test_an_input_overwritten_before_the_gradient_is_used_is_refused():
    layer = FactoredLinear(40, 30)
    x = torch.randn(2, 40)
    layer(x).sum().backward()
    x.zero_()
    with pytest.raises(InputError, match="overwritten in place before the gradient was used"):
        _ = layer.weight.grad


# ---- as a module --------------------------------------------------------------------------------------------


def test_under_torch_func_it_is_a_linear_layer():
    net = drop_in()
    x, y = vectors(0)

    def loss(parameters, x):
        return F.cross_entropy(functional_call(net, parameters, (x,)), y)

    own = {name: p.detach() for name, p in net.named_parameters()}
    gradients = torch.func.grad(loss)(own, x)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: net(x[None]).sum()))(x)
    loss_of(net, (x, y)).backward()
    assert relative(gradients["0.weight"].detach(), net[0].weight.grad) <= 1e-14
    inputs = x.clone().requires_grad_()
    assert relative(per_sample.detach(), torch.autograd.grad(net(inputs).sum(), inputs)[0]) <= 1e-14


def test_state_dicts_go_both_ways():
    net, other = mlp(), drop_in()
    with torch.no_grad():
        net[0].weight.add_(1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(parameters(net), parameters(other))
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    mlp().load_state_dict(torch.load(file, weights_only=True))
    other.load_state_dict(net.state_dict(), assign=True)
    loss_of(other, vectors(0)).backward()
    assert is_deferred(other[0].weight)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "double"])
def test_a_copy_taken_after_a_backward_is_independent_and_still_defers(way):
    net = factored(mlp(torch.float32))
    x, y = vectors(0, dtype=torch.float32)
    loss_of(net, (x, y)).backward()
    if way == "deepcopy":
        twin = copy.deepcopy(net)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    else:
        twin, x = copy.deepcopy(net).double(), x.double()
    assert is_deferred(net[0].weight) and not has_gradient(twin[0].weight)
    loss_of(twin, (x, y)).backward()
    assert isinstance(twin[0], FactoredLinear) and is_deferred(twin[0].weight)
    assert len(held(net[0].weight)) == 1 and twin[0].weight.grad.dtype == x.dtype


def test_a_forward_without_gradients_keeps_nothing():
    layer = FactoredLinear(40, 30).eval()
    with torch.no_grad():
        assert layer(torch.randn(2, 40)).grad_fn is None
    with torch.inference_mode():
        layer(torch.randn(2, 40))
    layer.requires_grad_(False)
    assert layer(torch.randn(2, 40)).grad_fn is None


def test_factored_swaps_the_named_layers_in_place_and_no_others():
    net = nn.Sequential(mlp(), nn.MultiheadAttention(8, 2), nn.Conv2d(1, 1, 1))
    layer = net[0][2]
    assert factored(net, "0.2") is net
    assert net[0][2] is layer and type(layer) is FactoredLinear and type(net[0][0]) is nn.Linear
    factored(net)
    assert type(net[0][0]) is FactoredLinear
    assert not isinstance(net[1].out_proj, FactoredLinear)  # attention reads its weight past any forward
    for name, message in (("9", "no layer '9'"), ("2", "'2' is a Conv2d"), ("1.out_proj", "not an nn.Linear")):
        with pytest.raises(InputError, match=message):
            factored(net, [name])


# ---- the optimizer's steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["K-FAC", "R-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C"])
@pytest.mark.parametrize("clip_by", ["layer", "kl"])
def test_kfac_takes_the_steps_of_algorithm_1_and_forms_no_gradient(algorithm, clip_by, never_formed, caplog):
    results = []
    for by_columns in (False, True):
        net = mlp()
        optimizer = KFAC(
            net, algorithm, **BUSY, clip_by=clip_by, continuation="trace", linear_application=by_columns
        )
        assert isinstance(net[0], FactoredLinear) == by_columns
        train(net, optimizer, [vectors(k) for k in range(8)])
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-11
    assert not caplog.records
    assert optimizer.layers["0"].linear is True


@pytest.mark.parametrize("cleared", [True, False])
def test_after_a_step_the_gradient_is_there_until_it_is_cleared_and_else_sums_up(cleared):
    results = []
    for by_columns in (False, True):
        net = mlp()
        optimizer = KFAC(net, "B-KFAC", **BUSY, linear_application=by_columns)
        for k in range(3):
            if cleared:
                optimizer.zero_grad()
            loss_of(net, vectors(k)).backward()
            assert is_deferred(net[0].weight) == (by_columns and (cleared or k < 2))
            optimizer.step()
            if k == 2:
                gradient = net[0].weight.grad.flatten()
        results.append(torch.cat([parameters(net), gradient]))
    assert relative(results[1], results[0]) <= 1e-11


@pytest.mark.parametrize("change", ["clip", "penalty", "tiny penalty", "read", "bias", "hook on the output"])
def test_whatever_reads_or_changes_the_gradient_gets_what_a_linear_layer_gives(change, caplog):
    caplog.set_level(logging.INFO)
    results = []
    for by_columns in (False, True):
        net = mlp()
        optimizer = KFAC(net, "B-KFAC", **BUSY, linear_application=by_columns)
        for k in range(4):
            optimizer.zero_grad()
            x, y = vectors(k)
            if change == "hook on the output":
                h = net[0](x)
                h.register_hook(lambda g: 2 * g)  # after the columns' own hook, which sees g
                loss = F.cross_entropy(net[2](net[1](h)), y)
            else:
                loss = loss_of(net, (x, y))
            if change == "penalty":
                loss = loss + 0.1 * net[0].weight.square().sum()
            elif change == "tiny penalty":
                loss = loss + 1e-14 * net[0].weight.square().sum()  # below any tolerance
            loss.backward()
            if change == "clip":
                assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
            elif change == "read":
                assert net[0].weight.grad.shape == (30, 40)
            elif change == "bias":
                net[0].bias.grad.zero_()
            optimizer.step()
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-11
    by_1 = caplog.text.count("layer '0', step 0: .grad is no multiple of G A^T of the columns")
    assert by_1 == (change not in ("read", "clip", "hook on the output"))


def test_a_gradient_that_the_optimizer_forms_is_unscaled():
    results = []
    for scale in (1, 64):
        net = drop_in()
        optimizer = KFAC(net, "B-KFAC", **BUSY, clip=None, loss_scale=scale, fisher="sampled")
        for k in range(3):
            optimizer.zero_grad()
            out = net(vectors(k)[0])
            optimizer.sample_fisher(out)
            (scale * F.cross_entropy(out, vectors(k)[1])).backward()
            assert all(is_deferred(p) for p in net.parameters())
            optimizer.step()
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-12


def test_sampled_labels_take_algorithm_1_and_the_log_says_so(caplog):
    results = []
    for make in (mlp, drop_in):
        net = make()
        optimizer = KFAC(net, "B-KFAC", **BUSY, fisher="sampled")
        for k in range(4):
            x, y = vectors(k)
            out = net(x)
            optimizer.zero_grad()
            optimizer.sample_fisher(out)
            F.cross_entropy(out, y).backward()
            optimizer.step()
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-12
    assert caplog.text.count("layer '0': fisher='sampled'") == 1


def test_without_any_estimate_the_step_is_the_plain_gradient(monkeypatch):
    def eigh(K, what="matrix"):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(importlib.import_module("kfacerr.rsvd"), "eigh_descending", eigh)
    net, other = drop_in(), mlp()
    with pytest.warns(RuntimeWarning, match="decomposition failed"):
        train(net, KFAC(net, "R-KFAC", lr=0.1, clip=None, weight_decay=0), [vectors(0)])
    train(other, torch.optim.SGD(other.parameters(), 0.1), [vectors(0)])
    assert relative(parameters(net), parameters(other)) <= 1e-14


@pytest.mark.parametrize("policy", ["B-KFAC", "SGD"])
def test_zero_grad_forms_nothing(policy, never_formed):
    net = drop_in()
    optimizer = KFAC(net, "B-KFAC", policy={"0": policy})
    loss_of(net, vectors(0)).backward()
    optimizer.zero_grad()
    assert not any(has_gradient(p) for p in net.parameters())


def test_a_checkpoint_of_linear_layers_resumes_with_the_drop_in_and_back():
    batches = [vectors(k) for k in range(8)]
    straight = mlp()
    train(straight, KFAC(straight, "B-KFAC", **BUSY, linear_application=False), batches)
    for first, second in ((False, True), (True, False), (True, True)):
        net, resumed = mlp(), mlp()
        optimizer, again = (
            KFAC(model, "B-KFAC", **BUSY, linear_application=by_columns)
            for model, by_columns in ((net, first), (resumed, second))
        )
        train(net, optimizer, batches[:4])
        resumed.load_state_dict(net.state_dict())
        again.load_state_dict(optimizer.state_dict())
        train(resumed, again, batches[4:])
        assert relative(parameters(resumed), parameters(straight)) <= 1e-11
        assert again.layers["0"].linear is second


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}], ids=["no momentum", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_is_not_formed_is_the_step(dtype, options):
    """Clip, weight decay and momentum of a product, against those of a matrix."""
    nets = [mlp(dtype), mlp(dtype)]
    given = {"rank": 4, "lr": 0.1, "clip": 0.05, "weight_decay": 0.1, "T_updt": 1, "T_brand": 1}
    given |= {"momentum": 0.0, "phi_lambda": 0.1, "continuation": "min", **options}
    for net, by_columns in zip(nets, (False, True), strict=True):
        optimizer = KFAC(net, "B-KFAC", **given, linear_application=by_columns)
        train(net, optimizer, [vectors(k, dtype=dtype) for k in range(4)])
    start = parameters(mlp(dtype))
    steps = [parameters(net) - start for net in nets]
    assert relative(steps[1], steps[0]) <= {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]


def test_a_product_is_measured_without_being_formed():
    g = torch.Generator().manual_seed(0)
    P, G = torch.randn(2, 30, 4, generator=g)
    Q, A = torch.randn(2, 50, 4, generator=g) * 1e18
    assert Product(P, Q).numel() == 1500
    S = Product(P, Q).formed().double()
    assert float(Product(P, Q).norm()) == pytest.approx(float(S.norm()), rel=1e-6)
    assert float(S.norm()) <= float(reach(Product(P, Q))) * (1 + 1e-6)
    assert float(reach(Product(P[:, :1], Q[:, :1]))) == pytest.approx(float(norm(P[:, :1] @ Q[:, :1].T)), rel=1e-6)
    inner = float((S * (G @ A.T).double()).sum())
    assert float(Product(P, Q).inner(Product(G, A))) == pytest.approx(inner, rel=1e-4)


def test_channels_last_weights_take_algorithm_8_too():
    nets = [wide_convnet(), wide_convnet().to(memory_format=torch.channels_last)]
    for net in nets:
        optimizer = KFAC(net, "B-KFAC", rank=4, lr=0.1, momentum=0.5)
        train(net, optimizer, [wide_images(k) for k in range(3)])
        assert optimizer.layers["0"].linear
    assert relative(parameters(nets[1]), parameters(nets[0])) <= 1e-12


# ---- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_columns", [True, False], ids=["Algorithm 8", "Algorithm 1"])
def test_a_training_step_of_a_wide_layer_allocates_nothing_of_its_weights_size(by_columns):
    """With d_A = 16384 a dense factor would be 64 times the weight. Algorithm 1 has the gradient and the step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16384, 256, bias=False), nn.Tanh(), nn.Linear(256, 10))
    optimizer = KFAC(net, "B-KFAC", rank=8, T_updt=1, T_brand=1, momentum=0.0, linear_application=by_columns)
    counts, largest = [], 0
    for k in range(3):
        g = torch.Generator().manual_seed(k)
        batch = torch.randn(16, 16384, generator=g), torch.randint(10, (16,), generator=g)
        with New(256 * 16384) as new:
            train(net, optimizer, [batch])
        counts.append(new.count)
        largest = max(largest, new.largest)
    if by_columns:
        assert counts == [0, 0, 0]
        assert largest <= 16384 * (8 + 2 * 16)  # the columns of a Brand update
    else:
        assert min(counts) >= 2 and largest == 256 * 16384
