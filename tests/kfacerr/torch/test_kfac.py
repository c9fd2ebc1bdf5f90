"""`KFAC` takes the paper's steps: against a naive dense evaluation, the exact natural gradient, and itself.

What any optimizer promises is in `test_contract`.
"""

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacerr import processes
from kfacerr.damping import Damping, Scale
from kfacerr.inverse import DenseInverse
from kfacerr.process import Estimate, Process
from kfacerr.rsvd import evd
from kfacerr.torch import KFAC, PAPER
from kfacerr.torch._direction import Product
from kfacerr.torch._kfac_layer import process_of
from kfacerr.torch.distributed import Job
from tests import reference
from tests.kfacerr.torch.cases import (
    convnet,
    images,
    mlp,
    parameters,
    relative,
    train,
    vectors,
    wide_convnet,
    wide_images,
)

STEP_ONLY = {"lr": 1.0, "clip": None, "momentum": 0.0, "T_updt": 1, "T_inv": 1, "T_brand": 1}
"""Under these the parameters change by exactly -S."""


def is_brand(factor) -> bool:
    return "Brand" in type(process_of(factor)).__name__


def step_of(
    net: nn.Module, x: Tensor, y: Tensor, algorithm: str = "K-FAC", scale: float = 1.0, **options
) -> Tensor:
    """S of the first step on `scale` times the loss, over all parameters."""
    before = parameters(net)
    optimizer = KFAC(net, algorithm, **{**STEP_ONLY, **options})
    (scale * F.cross_entropy(net(x), y)).backward()
    optimizer.step()
    return before - parameters(net)


# ---- Algorithms 1, 4, 5 and 7, densely ----------------------------------------------------------------------


def columns_of(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A and G with A A^T = Omega, G G^T = Gamma of Grosse & Martens, column by column."""
    b = x.shape[0]
    A, G = [], []
    for i in range(b):
        if isinstance(layer, nn.Linear):
            places = [(x[i].numpy(), grad[i].numpy())]
        else:
            padded = np.pad(x[i].numpy(), ((0, 0), (1, 1), (1, 1)))
            places = [
                (padded[:, 2 * s : 2 * s + 3, 2 * t : 2 * t + 3].ravel(), grad[i, :, s, t].numpy())
                for s in range(grad.shape[2])
                for t in range(grad.shape[3])
            ]
        for a, g in places:
            A.append((np.append(a, 1.0) if layer.bias is not None else a) / math.sqrt(b))
            G.append(g * math.sqrt(b) / math.sqrt(len(places)))
    return np.array(A).T, np.array(G).T


class Dense:
    """One K-factor by the paper's schedules, as full matrices."""

    def __init__(
        self, algorithm: str, periods: dict[str, int], r: int, rho: float, choices: list[np.ndarray]
    ) -> None:
        self.algorithm, self.periods, self.r, self.rho, self.choices = algorithm, periods, r, rho, choices
        self.columns: list[np.ndarray] = []
        self.pair: reference.Pair | None = None
        self.trace = 0.0
        self.last = dict.fromkeys(periods, -1)

    def due(self, period: str, k: int) -> bool:
        """The first call of each interval of the period."""
        interval = k // self.periods[period]
        new = interval != self.last[period]
        self.last[period] = interval
        return new

    def update(self, k: int, X: np.ndarray) -> None:
        before = reference.ea_factor(self.columns, self.rho) if self.columns else None
        self.columns.append(X)
        M = reference.ea_factor(self.columns, self.rho)
        if self.algorithm in ("K-FAC", "R-KFAC"):
            if self.due("T_inv", k):
                self.pair = reference.evd(M, None if self.algorithm == "K-FAC" else self.r)
                self.trace = np.trace(M)
            return
        if not self.due("T_brand", k):
            return
        if self.algorithm == "B-R-KFAC" and self.due("T_rsvd", k) and before is not None:
            self.pair, self.trace = reference.evd(before, self.r), np.trace(before)
        if self.pair is None:
            self.pair, self.trace = reference.evd(X @ X.T, X.shape[1]), np.trace(X @ X.T)
        else:
            U, D = self.pair[0][:, : self.r], self.pair[1][: self.r]
            rank = len(D) + X.shape[1]
            self.pair = reference.evd(self.rho * reference.dense((U, D)) + (1 - self.rho) * X @ X.T, rank)
            self.trace = self.rho * self.trace + (1 - self.rho) * np.trace(X @ X.T)
        if self.algorithm == "B-KFAC-C" and self.due("T_corct", k):
            U, D = reference.correct(*self.pair, M, self.choices.pop(0))
            order = np.argsort(-D, kind="stable")
            self.pair = U[:, order], D[order]

    def inverse(self, phi: float, continuation: str) -> np.ndarray:
        D = self.pair[1]
        tau = reference.level(D, len(self.columns[0]), continuation, self.trace)
        return reference.damped_inverse(self.pair, phi * D[0], tau)


def dense_training(
    net, batches, algorithms, drawn, *, r, rho, phi, lr, clip, decay, momentum, continuation, periods, T_updt
):
    """Trains `net` by the formulas of the paper; yields its parameters after each step.

    Args:
        algorithms: one for each layer.
        drawn: the choices of Algorithm 6, in the order of their use.
    """
    layers = [module for module in net if isinstance(module, nn.Linear | nn.Conv2d)]
    sides = [
        (Dense(algorithm, periods, r, rho, drawn), Dense(algorithm, periods, r, rho, drawn))
        for algorithm in algorithms
    ]
    buffers: dict[nn.Parameter, Tensor] = {}
    clipped: list[bool] = []
    for k, (x, y) in enumerate(batches):
        inputs, outputs = [], []
        for module in net:
            if module in layers:
                inputs.append(x.detach())
            x = module(x)
            if module in layers:
                outputs.append(x)
        grads = torch.autograd.grad(F.cross_entropy(x, y), outputs)
        for module, a, g, (side_A, side_G) in zip(layers, inputs, grads, sides, strict=True):
            A, G = columns_of(module, a, g)
            J = G @ A.T * math.sqrt(g[0, 0].numel())
            if k % T_updt == 0:
                side_A.update(k, A)
                side_G.update(k, G)
            S = side_G.inverse(phi, continuation) @ J @ side_A.inverse(phi, continuation)
            rms = math.sqrt(np.mean(S**2))
            clipped.append(rms > clip)
            S = torch.from_numpy(S * min(1, clip / rms))
            weight = module.weight
            steps = {weight: S[:, : weight[0].numel()].reshape(weight.shape)}
            if module.bias is not None:
                steps[module.bias] = S[:, -1]
            for p, s in steps.items():
                u = s + decay * p.detach()
                buffers[p] = u if p not in buffers else momentum * buffers[p] + u
                p.data -= lr * buffers[p]
        yield parameters(net)
    assert 0.2 < np.mean(clipped) < 0.8  # both branches of the clip are compared


@pytest.mark.parametrize("continuation", ["min", "trace"])
@pytest.mark.parametrize("algorithm", ["K-FAC", "R-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C"])
def test_twenty_steps_equal_a_dense_evaluation_of_the_papers_formulas(algorithm, continuation, monkeypatch):
    drawn: list[np.ndarray] = []
    correct = processes.correct

    def recorded(X, M, idx):
        drawn.append(idx)
        return correct(X, M, idx)

    monkeypatch.setattr(processes, "correct", recorded)
    net, twin = convnet(), convnet()
    periods = {"T_inv": 6, "T_brand": 4, "T_rsvd": 6, "T_corct": 6}
    # r + r_o >= d: an RSVD is the exact truncation, and steps can be compared to rounding.
    options = {
        "rank": 4,
        "oversampling": 30,
        "rho": 0.8,
        "phi_lambda": 0.2,
        "phi_corct": 0.75,
        "T_updt": 2,
        **periods,
    }
    optimizer = KFAC(
        net, algorithm, lr=0.2, clip=1.0, weight_decay=0.01, momentum=0.5, continuation=continuation, **options
    )
    batches = [images(k) for k in range(20)]
    start, path = parameters(net), []
    for batch in batches:
        train(net, optimizer, [batch])
        path.append(parameters(net))
    brand = [is_brand(factor) for factor in optimizer.layers["3"].factors.values()]
    assert brand == 2 * [algorithm.startswith("B-")]  # d = 28 and 12, r + n = 8
    assert relative(path[-1], start) > 0.05
    assert len(drawn) == (6 if algorithm == "B-KFAC-C" else 0)
    rest = algorithm if algorithm == "K-FAC" else "R-KFAC"
    dense = dense_training(
        twin,
        batches,
        (rest, algorithm, rest),  # B- variants on the first FC layer only
        drawn,
        r=4,
        rho=0.8,
        phi=0.2,
        lr=0.2,
        clip=1.0,
        decay=0.01,
        momentum=0.5,
        continuation=continuation,
        periods=periods,
        T_updt=2,
    )
    for k, (ours, theirs) in enumerate(zip(path, dense, strict=True)):
        assert relative(ours, theirs) <= 1e-10, k


# ---- the natural gradient -----------------------------------------------------------------------------------


def _orthonormal_residuals(out: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The Gaussian likelihood's mean loss, the residuals of each input running over sqrt(d) e_1, ..., sqrt(d) e_d.

    Their second moment given the input is I, exactly that of targets drawn from the model.
    """
    d = out.shape[1]
    residual = math.sqrt(d) * torch.eye(d, dtype=out.dtype).repeat(len(out) // d, 1)
    return 0.5 * (out - (out.detach() - residual)).square().sum() / len(out)


def _fisher(net: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """E[J^T J] over the inputs, J the Jacobian of the output by the named parameters: unit-variance Gaussian."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def out(chosen, xi):
        return torch.func.functional_call(net, {**params, **chosen}, (xi,))

    chosen = {name: params[name] for name in names}
    J = torch.func.vmap(torch.func.jacrev(out), in_dims=(None, 0))(chosen, x)
    J = torch.cat([J[name].flatten(2) for name in names], dim=2)
    return torch.einsum("bop,boq->pq", J, J) / len(x)


def _deep_linear(sizes: list[int]) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False).double() for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers), torch.randn(9, sizes[0], dtype=torch.float64).repeat_interleave(
        sizes[-1], dim=0
    )


@pytest.mark.parametrize("sizes", [[4, 3], [5, 4, 4], [5, 3, 3, 3]], ids=["1 layer", "2 layers", "3 layers"])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_kfac_is_the_exact_natural_gradient_of_each_layer_of_a_deep_linear_net(sizes, fisher):
    """With squared error a layer's Fisher block is A (x) Gamma exactly, as Gamma does not depend on the input.

    Between layers the Fisher is not block diagonal, so only for one layer is this the whole natural gradient. The
    factors must be regular: hidden layers no wider than the output. With damping phi = 1e-8 the two agree to phi
    times the factors' condition numbers.
    """
    net, x = _deep_linear(sizes)
    names = [name for name, _ in net.named_parameters()]
    blocks = {name: _fisher(net, x, [name]) for name in names}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = KFAC(net, "K-FAC", phi_lambda=1e-8, fisher=fisher, **STEP_ONLY)
    out = net(x)
    if fisher == "sampled":
        optimizer.sample_fisher(out, _orthonormal_residuals)
        torch.manual_seed(1)
        loss = 0.5 * (out - torch.randn_like(out)).square().sum() / len(out)  # any labels at all
    else:
        loss = _orthonormal_residuals(out)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    for name, p in net.named_parameters():
        natural = torch.linalg.solve(blocks[name], grads[name].flatten())
        assert relative((before[name] - p.detach()).flatten(), natural) <= 1e-5
    if len(names) == 1:
        natural = torch.linalg.solve(_fisher(net, x, names), grads[names[0]].flatten())
        assert relative((before[names[0]] - net[0].weight.detach()).flatten(), natural) <= 1e-5


@pytest.mark.parametrize(("likelihood", "tolerance"), [("gaussian", 0.05), ("categorical", 0.05)])
def test_sampled_labels_give_the_expected_gamma(likelihood, tolerance):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    x = torch.randn(1, 4, dtype=torch.float64).expand(20_000, 4)
    optimizer = KFAC(net, "K-FAC", fisher="sampled")
    out = net(x)
    optimizer.sample_fisher(out, likelihood)
    assert all(p.grad is None for p in net.parameters())
    F.cross_entropy(out, torch.zeros(20_000, dtype=torch.long)).backward()
    optimizer.step()
    p = out[0].detach().softmax(0)
    expected = torch.eye(3, dtype=torch.float64) if likelihood == "gaussian" else torch.diag(p) - torch.outer(p, p)
    assert relative(optimizer.layers["1"].factors["G"].average.M, expected) <= tolerance


# ---- the algorithms against each other ----------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["R-KFAC", "SRE-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C"])
def test_every_variant_is_kfac_while_nothing_is_truncated(algorithm):
    """r = 24 holds all of 5 updates of 4 columns. With B- variants this is Brand's update, no fallback: d > r + n.

    Without continuation: the exact factor is continued by nothing.
    """
    batches = [vectors(k) for k in range(5)]
    nets = {name: mlp() for name in ("K-FAC", algorithm)}
    for name, net in nets.items():
        options = {**STEP_ONLY, "lr": 0.1, "clip": 0.3, "T_rsvd": 2, "T_corct": 2}
        optimizer = KFAC(net, name, rank=24, oversampling=4, rho=0.9, continuation="none", **options)
        train(net, optimizer, batches)
        brand = [is_brand(factor) for factor in optimizer.layers["0"].factors.values()]
        assert brand == 2 * [name.startswith("B-")]
    assert relative(parameters(nets[algorithm]), parameters(nets["K-FAC"])) <= 1e-9


@pytest.mark.parametrize("algorithm", ["K-FAC", "B-KFAC"])
@pytest.mark.parametrize("exponent", [-20, 3, 10])
def test_a_loss_scaled_by_a_power_of_two_scales_the_step_by_its_inverse(algorithm, exponent):
    """lam follows lambda_max: Gamma^-1 shrinks by 4^e, the gradient grows by 2^e."""
    x, y = vectors(0)
    plain = step_of(mlp(), x, y, algorithm, rank=4)
    scaled = step_of(mlp(), x, y, algorithm, scale=2.0**exponent, rank=4)
    assert relative(scaled * 2.0**exponent, plain) <= 1e-12


@pytest.mark.parametrize("linear", [False, True], ids=["Algorithm 1", "Algorithm 8"])
@pytest.mark.parametrize("algorithm", ["K-FAC", "R-KFAC", "B-KFAC"])
@pytest.mark.parametrize("exponent", [-50, -35, 35, 50])
def test_so_it_is_over_the_range_of_float32(algorithm, exponent, linear):
    """Gamma, of squares, is in range to 2^+-50; the step of the loss itself is the one to compare with."""
    x, y = vectors(0, dtype=torch.float32)
    S = []
    for scale in (1.0, 2.0**exponent):
        net = mlp(torch.float32)
        for p in net.parameters():
            p.data.mul_(0.5)
        optimizer = KFAC(net, algorithm, **STEP_ONLY, rank=4, linear_application=linear, loss_scale=lambda: 1.0)
        taken = []
        optimizer._descend = lambda directions, taken=taken: taken.extend(d for _, d in directions)
        (scale * F.cross_entropy(net(x), y)).backward()
        optimizer.step()
        formed = [t.formed() if isinstance(t, Product) else t for t in taken]
        S.append(torch.cat([t.double().flatten() for t in formed]) * scale)
    assert relative(S[1], S[0]) <= 1e-4


def test_a_step_that_leaves_the_range_is_left_out_and_the_next_one_says_so(caplog):
    net = mlp(torch.float32)
    optimizer = KFAC(net, "K-FAC", **{**STEP_ONLY, "T_updt": 10, "T_inv": 10})
    train(net, optimizer, [vectors(0, dtype=torch.float32)])
    before = parameters(net)
    layer = optimizer.layers["0"]
    inverses = layer.inverses
    layer.inverses = lambda *args: (inverses(*args)[0], DenseInverse(inverses(*args)[1].dense() * math.inf))
    train(net, optimizer, [vectors(0, dtype=torch.float32)])
    assert torch.equal(parameters(net)[:1230], before[:1230]) and parameters(net).isfinite().all()
    assert not torch.equal(parameters(net)[1230:], before[1230:]) and not caplog.records
    layer.inverses = inverses
    train(net, optimizer, [vectors(0, dtype=torch.float32)])
    assert [record.getMessage()[:61] for record in caplog.records] == [
        "layer '0', step 1: the preconditioned step left the range of "
    ]
    assert not torch.equal(parameters(net)[:1230], before[:1230])


@pytest.mark.parametrize(
    "change", ["global clip", "long global clip", "clip by value", "penalty", "said to be meant"]
)
def test_a_gradient_that_is_smaller_on_purpose_is_no_lost_scale(change):
    net = mlp(torch.float32)
    meant = {"loss_scale": lambda: 1.0} if change == "meant" else {}
    optimizer = KFAC(net, "K-FAC", **STEP_ONLY, **meant)
    loss = F.cross_entropy(net(vectors(0, dtype=torch.float32)[0]), vectors(0)[1])
    (loss + 100 * net[0].weight.square().sum() if change == "penalty" else loss).backward()
    if change.endswith("global clip"):
        nn.utils.clip_grad_norm_(net.parameters(), 1e-4 if "long" in change else 0.1)
    elif change == "clip by value":
        nn.utils.clip_grad_value_(net.parameters(), 1e-5)
    elif change == "meant":
        for p in net.parameters():
            p.grad /= 2.0**12
    optimizer.step()
    assert optimizer.k == 1


@pytest.mark.parametrize("make", [convnet, mlp], ids=["convolution", "linear"])
def test_micro_batches_with_sampled_labels_are_the_full_batch(make):
    results = []
    for sizes in ([12], [5, 4, 3]):
        net = make()
        optimizer = KFAC(net, "K-FAC", lr=0.1, rho=0.8, T_updt=1, T_inv=2, fisher="sampled")
        for k in range(4):
            x, y = (images if make is convnet else vectors)(k, b=12)
            optimizer.zero_grad()
            for part in torch.arange(12).split(sizes):
                out = net(x[part])
                optimizer.sample_fisher(out, _first_class)
                (F.cross_entropy(out, y[part]) * len(part) / 12).backward()
            optimizer.step()
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-10


def _first_class(out: Tensor, generator: torch.Generator) -> Tensor:
    return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.long))


# ---- Algorithm 8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, wide_convnet], ids=["linear", "convolution"])
@pytest.mark.parametrize("algorithm", ["K-FAC", "B-KFAC", "B-KFAC-C"])
def test_algorithm_8_takes_the_steps_of_algorithm_1(make, algorithm, caplog):
    results = []
    for linear in (False, True):
        net = make()
        optimizer = KFAC(
            net, algorithm, rank=4, lr=0.1, T_updt=3, T_inv=3, T_brand=3, T_corct=6, linear_application=linear
        )
        train(net, optimizer, [(wide_images if make is wide_convnet else vectors)(k) for k in range(8)])
        assert optimizer.layers["0"].linear is linear
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-11
    assert "Algorithm 1" not in caplog.text


def test_algorithm_8_is_used_for_the_layers_with_fewer_columns_than_dimensions():
    net = mlp()
    optimizer = KFAC(net, "B-KFAC", rank=4, T_updt=10)
    train(net, optimizer, [vectors(0, b=10)])
    assert {name: layer.linear for name, layer in optimizer.layers.items()} == {"0": True, "2": False}
    assert optimizer._follower.active == {"0"}


@pytest.mark.parametrize(("rank", "cheaper"), [(1, False), (20, True)])
def test_algorithm_8_is_not_used_where_it_takes_more_flops(rank, cheaper):
    """A convolution's gradient is formed all the same: with one mode a side nothing is left to save."""
    net = wide_convnet()
    optimizer = KFAC(net, "R-KFAC", rank=rank)
    train(net, optimizer, [wide_images(0)])
    assert optimizer.layers["0"].linear is cheaper


@pytest.mark.parametrize("change", ["clip", "clip by value", "penalty", "small penalty"])
def test_algorithm_8_gives_way_where_the_gradient_is_no_multiple_of_the_columns(change, caplog):
    caplog.set_level(logging.INFO)
    results = []
    for linear in (False, True):
        net = mlp()
        optimizer = KFAC(net, "B-KFAC", rank=4, lr=0.1, linear_application=linear)
        for k in range(3):
            x, y = vectors(k)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            if change == "penalty":
                loss = loss + 0.1 * net[0].weight.square().sum()
            elif change == "small penalty":
                loss = loss + 1e-7 * net[0].weight.square().sum()
            loss.backward()
            if change == "clip":
                assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
            elif change == "clip by value":
                nn.utils.clip_grad_value_(net.parameters(), 0.01)
            optimizer.step()
        results.append(parameters(net))
    assert relative(results[1], results[0]) <= 1e-12
    assert caplog.text.count("layer '0', step 0: .grad is no multiple of G A^T") == (change != "clip")


# ---- a process of your own, hyper-parameters ----------------------------------------------------------------


class Newest(Process):
    """Forgets everything but the newest columns."""

    needs_factor = False

    def update(self, k, X, factor):
        self.estimate = Estimate(evd(X @ X.T), (X * X).sum())


def test_a_process_of_your_own_drives_one_factor():
    seen = []

    def make(info):
        seen.append(info)
        return Newest()

    x, y = vectors(3)
    net, other = mlp(), mlp()
    optimizer = KFAC(net, "K-FAC", policy={"0": {"A": make, "G": "K-FAC"}}, **STEP_ONLY, rho=0.5)
    train(net, optimizer, [vectors(0)])
    assert [tuple(info) for info in seen] == [("0", "A", 41, 4)]
    assert optimizer.layers["0"].factors["A"].average.M is None  # its process does not read the dense factor
    job = Job(optimizer.layers["0"].factors["A"], torch.ones(41, 4), [4, 4], print)
    assert job.cost == 9 * 41**3  # over several devices: it does not say what it costs, and is taken for an EVD
    # On the first step every process sees the same columns.
    train(other, KFAC(other, "K-FAC", **STEP_ONLY, rho=0.5), [vectors(0)])
    assert relative(parameters(net), parameters(other)) <= 1e-10
    train(net, optimizer, [(x, y)])
    A = torch.cat([x, torch.ones(4, 1, dtype=x.dtype)], dim=1).T / 2
    assert relative(process_of(optimizer.layers["0"].factors["A"]).estimate.lowrank.dense(), A @ A.T) <= 1e-12


def test_hyper_parameters_follow_the_epoch():
    net = mlp()
    optimizer = KFAC(
        net,
        "B-R-KFAC",
        steps_per_epoch=4,
        rank=lambda epoch: 3 + epoch,
        phi_lambda=lambda epoch: 0.1 / (1 + epoch),
        T_updt=lambda epoch: 2 - epoch,
        T_rsvd=lambda epoch: 4 - 2 * epoch,
        T_brand=1,
        oversampling=lambda epoch: 5 + epoch,
        weight_decay=lambda epoch: 0.5 * epoch,
        momentum=lambda epoch: 0.1 * epoch,
        clip=lambda epoch: 0.2 / (1 + epoch),
        linear_application=False,
    )
    train(net, optimizer, [vectors(k) for k in range(3)])
    process = process_of(optimizer.layers["0"].factors["G"])
    inverse, _ = optimizer.layers["0"].inverses(3, 0.1, "min")
    settings = process.settings
    assert (settings.rank, settings.oversampling, process.clocks["T_rsvd"].period) == (3, 5, 4)
    assert inverse.lam == pytest.approx(0.1 * float(process.estimate.lowrank.lambda_max))
    assert optimizer._follower.active == set()
    train(net, optimizer, [vectors(k) for k in range(3, 5)])
    settings = process.settings
    assert (settings.rank, settings.oversampling, process.clocks["T_rsvd"].period) == (4, 6, 2)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"], group["clip"]) == (0.5, 0.1, 0.1)
    optimizer.epoch = 0
    assert optimizer.hyper.settings.rank == 3


def test_the_damping_follows_its_schedule_also_between_decompositions():
    net = mlp()
    optimizer = KFAC(
        net, "K-FAC", steps_per_epoch=1, phi_lambda=lambda epoch: 0.1 / (1 + epoch), T_updt=1, T_inv=9
    )
    train(net, optimizer, [vectors(k) for k in range(3)])
    factor = optimizer.layers["0"].factors["G"]
    low = process_of(factor).estimate.lowrank
    lam = 0.1 / 3 * low.lambda_max
    expected = torch.linalg.inv(low.dense() + lam * torch.eye(low.d))
    torch.testing.assert_close(optimizer.layers["0"].inverses(3, 0.1 / 3, "min")[0].dense(), expected)
    assert process_of(factor).clocks["T_inv"].last == 0


@pytest.mark.parametrize("damping", ["phi=0.2", "mean=0.5", "lam=1e-3", "pi=1e-4"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-80])
@pytest.mark.parametrize("linear", [True, False])
def test_another_damping_is_that_of_the_dense_factors(damping, scale, linear):
    """Gradients of 1e-26 are held in a unit of their own, which an absolute damping must not see."""
    torch.manual_seed(0)
    net = nn.Linear(7, 5).double()
    for p in net.parameters():
        nn.init.zeros_(p)  # a step of 1e-23 is nothing beside 1
    x, y = torch.randn(3, 7, dtype=torch.float64), torch.randint(5, (3,))
    absolute = {"lam=1e-3": 1e-3, "pi=1e-4": 1e-4 * scale**2}
    kind = Damping.parse(damping)
    kind = Damping(kind.kind, absolute.get(damping, kind.value))
    options = {**STEP_ONLY, "linear_application": linear}
    optimizer = KFAC(net, "K-FAC", damping=kind, **options)
    before = parameters(net)
    (scale * F.cross_entropy(net(x), y)).backward()
    J = torch.cat([net.weight.grad, net.bias.grad[:, None]], dim=1).numpy().copy()
    optimizer.step()
    (layer,) = optimizer.layers.values()
    M = {side: f.average.M.numpy() / f.squared_unit for side, f in layer.factors.items()}
    levels = kind.levels(*(Scale.of(np.linalg.eigvalsh(M[side])[::-1]) for side in "AG"))
    inverses = [
        np.linalg.inv(M[side] + level * np.eye(len(M[side]))) for side, level in zip("AG", levels, strict=True)
    ]
    S = inverses[1] @ J @ inverses[0]
    got = (before - parameters(net)).numpy()
    expected = np.concatenate([S[:, :-1].ravel(), S[:, -1]])
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


def test_a_setting_in_a_process_name_stands_against_the_schedules():
    net = mlp()
    optimizer = KFAC(net, "R-KFAC", rank=9, T_inv=7, policy={"0": "R-KFAC T_inv=2 rank=5", "2": "SRE-KFAC"})
    train(net, optimizer, [vectors(0)])
    process = process_of(optimizer.layers["0"].factors["A"])
    assert (process.settings.rank, process.clocks["T_inv"].period, process.estimate.lowrank.m) == (5, 2, 5)
    assert process_of(optimizer.layers["2"].factors["A"]).settings.rank == 9


def test_skipped_batches_are_dropped_by_brand_or_fed_all_at_once():
    estimates = {}
    for accumulate in (False, True):
        net = mlp()
        optimizer = KFAC(net, "B-KFAC", rank=12, lr=0, rho=0.7, T_updt=1, T_brand=3, accumulate=accumulate)
        train(net, optimizer, [vectors(k) for k in range(4)])
        estimates[accumulate] = process_of(optimizer.layers["0"].factors["A"]).estimate
    X = [torch.cat([vectors(k)[0], torch.ones(4, 1, dtype=torch.float64)], 1).T.numpy() / 2 for k in range(4)]
    for accumulate, taken in ((False, [X[0], X[3]]), (True, X)):
        M = torch.from_numpy(reference.ea_factor(taken, 0.7))
        assert relative(estimates[accumulate].lowrank.dense(), M) <= 1e-12
        assert float(estimates[accumulate].trace) == pytest.approx(float(M.trace()))


def test_an_overwriting_forgets_the_batches_that_wait_for_brand():
    """M_{k-1} holds them already."""
    net = mlp()
    options = {"T_updt": 1, "T_brand": 3, "T_rsvd": 3, "rank": 16, "oversampling": 30, "accumulate": True}
    optimizer = KFAC(net, "B-R-KFAC", lr=0, rho=0.7, **options)
    train(net, optimizer, [vectors(k) for k in range(4)])
    factor = optimizer.layers["0"].factors["A"]
    assert relative(process_of(factor).estimate.lowrank.dense(), factor.average.M) <= 1e-12


def test_the_clip_bounds_the_rms_of_each_layers_step_and_leaves_shorter_ones():
    x, y = vectors(0)
    free = step_of(mlp(), x, y)
    clipped = step_of(mlp(), x, y, clip=0.05)
    layers = (slice(0, 41 * 30), slice(41 * 30, None))
    for part in layers:
        rms = float(free[part].square().mean().sqrt())
        assert rms > 0.05
        assert relative(clipped[part], free[part] * 0.05 / rms) <= 1e-12
    assert torch.equal(step_of(mlp(), x, y, clip=1e6), free)


def test_the_kl_clip_shortens_all_layers_by_one_factor():
    x, y = vectors(0)
    free = step_of(mlp(), x, y)
    net = mlp()
    F.cross_entropy(net(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in net.parameters()])
    clipped = step_of(mlp(), x, y, clip=1e-3, clip_by="kl")
    assert relative(clipped, free * math.sqrt(1e-3 / float(free @ g))) <= 1e-12


def test_every_variant_trains_an_ill_conditioned_problem_faster_than_sgd():
    """48 steps, each with the best of three learning rates. What tells the classes apart lies in small inputs."""
    x, _ = vectors(0, b=64)
    y = x[:, 30:36].argmax(1)
    x = x * torch.logspace(0, -1.5, 40, dtype=x.dtype)
    batches = [(x[i], y[i]) for i in torch.arange(64).reshape(4, 16).repeat(12, 1)]

    def final_loss(make) -> float:
        net = mlp()
        train(net, make(net), batches)
        with torch.no_grad():
            return float(F.cross_entropy(net(x), y))

    def kfac(name, lr):
        return lambda net: KFAC(net, name, lr=lr, T_updt=1, T_inv=5, T_brand=5, rank=12)

    sgd = min(final_loss(lambda net, lr=lr: torch.optim.SGD(net.parameters(), lr=lr)) for lr in (0.3, 1.0, 3.0))
    for name in ("K-FAC", "R-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C"):
        assert min(final_loss(kfac(name, lr)) for lr in (0.1, 0.3, 1.0)) < 0.5 * sgd, name


def test_periods_that_are_not_given_warm_up():
    """No period is longer than a quarter of the steps taken, until it is what it is."""
    net = mlp()
    optimizer = KFAC(net, "B-KFAC", rank=4)
    seen = []
    for k in range(64):
        if optimizer.k % optimizer.hyper.T_updt == 0:
            seen.append(k)
        settings = optimizer.hyper.settings
        longest = max(1, 2 ** (k.bit_length() - 3))
        assert (settings.T_inv, settings.T_brand, settings.T_corct) == (
            min(100, longest),
            min(50, longest),
            min(200, longest),
        )
        optimizer.k += 1
    assert seen == [*range(8), *range(8, 16, 2), *range(16, 32, 4), *range(32, 64, 8)]
    optimizer.k = 10**4
    assert optimizer.hyper.configuration().items() >= {"T_inv": 100, "T_brand": 50, "T_corct": 200}.items()
    assert optimizer.hyper.T_updt == 10


@pytest.mark.parametrize(
    ("given", "T_inv"), [({"T_updt": 5}, 100), ({"T_updt": 5, "warm_up": True}, 1), ({"warm_up": False}, 100)]
)
def test_periods_that_are_given_hold_from_the_first_step(given, T_inv):
    optimizer = KFAC(mlp(), "R-KFAC", **given)
    assert optimizer.hyper.settings.T_inv == T_inv


def test_the_papers_settings_are_to_be_had_by_name():
    optimizer = KFAC(mlp(), "B-KFAC", **PAPER)
    hyper, settings = optimizer.hyper, optimizer.hyper.settings
    (group,) = optimizer.param_groups
    assert (group["lr"], group["clip"], group["momentum"], group["weight_decay"]) == (0.3, 0.07, 0.0, 7e-4)
    assert (hyper.T_updt, settings.T_inv, settings.T_brand, settings.T_rsvd, settings.T_corct) == (
        25,
        250,
        125,
        250,
        500,
    )
    assert (hyper.phi_lambda, settings.rank, settings.continuation, settings.rho) == (0.1, 220, "min", 0.95)
    assert KFAC(mlp(), "B-R-KFAC", **PAPER).hyper.settings.T_brand == 25


def test_a_warm_up_that_was_interrupted_goes_on():
    batches = [vectors(k) for k in range(20)]
    straight, first, resumed = mlp(), mlp(), mlp()
    train(straight, KFAC(straight, "R-KFAC", rank=4), batches)
    before, after = KFAC(first, "R-KFAC", rank=4), KFAC(resumed, "R-KFAC", rank=4)
    train(first, before, batches[:9])
    resumed.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    train(resumed, after, batches[9:])
    assert torch.equal(parameters(resumed), parameters(straight))
