"""`KFAC` in use: what is of K-FAC alone; what any optimizer promises is in `test_contract`."""

import importlib
import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacerr import inverse as inverses
from kfacerr import processes
from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC
from kfacerr.torch._kfac_layer import process_of
from tests.kfacerr.torch.cases import (
    ALGORITHMS,
    BUSY,
    New,
    convnet,
    images,
    leaves,
    loss_of,
    mlp,
    parameters,
    relative,
    same,
    snapshot,
    train,
    vectors,
)

decompositions = importlib.import_module("kfacerr.rsvd")
ALL_MODES = {**BUSY, "rank": 50}  # so many that R-KFAC's RSVD is the EVD


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": True, "linear_application": False}], ids=["plain", "options"]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_state_of_every_algorithm_resumes_bit_for_bit(algorithm, options):
    batches = [images(k, dtype=torch.float32) for k in range(14)]
    net, again = convnet(torch.float32), convnet(torch.float32)
    optimizer, resumed = (KFAC(model, algorithm, **BUSY, **options) for model in (net, again))
    train(net, optimizer, batches[:7])
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for model, its in ((net, optimizer), (again, resumed)):
        train(model, its, batches[7:])
    assert torch.equal(parameters(again), parameters(net))
    assert same(snapshot(resumed), snapshot(optimizer))


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


def test_columns_are_caught_only_in_steps_that_update_the_factors():
    net = convnet()
    optimizer = KFAC(net, "R-KFAC", **{**BUSY, "T_updt": 3}, linear_application=False)
    caught = []
    for k in range(7):
        optimizer.zero_grad()
        loss_of(net, images(k)).backward()
        caught.append(len(optimizer._follower.reached))
        optimizer.step()
    assert caught == [3, 0, 0, 3, 0, 0, 3]


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


def test_attentions_output_projection_is_not_the_first_fully_connected_layer():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 64, batch_first=True), nn.Flatten(), nn.Linear(24, 3))
    optimizer = KFAC(net, "B-KFAC", rank=1)
    assert {name: layer.policy for name, layer in optimizer.layers.items()} == {
        "0.linear1": "B-KFAC", "0.linear2": "R-KFAC", "2": "R-KFAC"
    }  # fmt: skip


def test_a_model_converted_after_its_first_step_is_refused_by_the_layers_name():
    net = mlp(torch.float32)
    optimizer = KFAC(net, "K-FAC", **BUSY)
    train(net, optimizer, [vectors(0, dtype=torch.float32), vectors(1, dtype=torch.float32)])
    net.double()
    with pytest.raises(
        InputError, match=r"'0', step 2: columns A of 41 rows in torch.float64 .* of 41 rows in torch.float32"
    ):
        train(net, optimizer, [vectors(2)])


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
    loud, quiet = (r.getMessage() for r in sorted(caplog.records, key=lambda r: -r.levelno))
    assert "'grouped'" in loud and "'tied'" in loud and "'norm'" in quiet and "'out'" in quiet


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
    assert [type(process_of(factors[side])).__name__ for side in "AG"] == ["Brand", "Rsvd"]
    assert caplog.text.count("r + n >= d (25 + 5 >= 30), R-KFAC in place of B-KFAC") == 1
    assert len(caplog.records) == 1


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
    train(net, KFAC(net, "R-KFAC", **ALL_MODES), batches)
    _failing_eigh(monkeypatch, lambda K: K.dtype == torch.float32)
    optimizer = KFAC(other, "R-KFAC", **ALL_MODES)
    train(other, optimizer, batches)
    assert relative(parameters(other), parameters(net)) <= 1e-5
    factor = optimizer.layers["0"].factors["A"]
    assert process_of(factor).estimate.lowrank.D.dtype == factor.average.M.dtype == torch.float32


def test_a_decomposition_that_fails_for_good_keeps_the_previous_inverse_and_warns(monkeypatch):
    net = mlp()
    optimizer = KFAC(net, "R-KFAC", **{**ALL_MODES, "T_updt": 1, "T_inv": 2})
    train(net, optimizer, [vectors(0), vectors(1)])
    kept = {side: process_of(f).estimate.lowrank.D.clone() for side, f in optimizer.layers["0"].factors.items()}
    _failing_eigh(monkeypatch, lambda K: len(K) == 41)
    with pytest.warns(RuntimeWarning, match="layer '0', factor A, step 2: .* previous inverse is kept") as caught:
        train(net, optimizer, [vectors(2)])
    assert len(caught) == 1 and "failed to converge" in str(caught[0].message)
    now = {side: process_of(f).estimate.lowrank.D for side, f in optimizer.layers["0"].factors.items()}
    assert torch.equal(now["A"], kept["A"]) and not torch.equal(now["G"], kept["G"])
    monkeypatch.undo()
    train(net, optimizer, [vectors(3)])  # not due before step 4, but the failed one is made up for
    assert not torch.equal(process_of(optimizer.layers["0"].factors["A"]).estimate.lowrank.D, kept["A"])


def _failing_cholesky(monkeypatch, fails) -> None:
    original = inverses.cholesky_inverse

    def cholesky(M, **options):
        if fails(M):
            raise InputError("matrix is not positive definite")
        return original(M, **options)

    monkeypatch.setattr(inverses, "cholesky_inverse", cholesky)


def test_exact_kfac_inverts_in_float64_where_float32_fails(monkeypatch):
    batches = [(x.float(), y) for x, y in (vectors(k) for k in range(6))]
    net, other = mlp(torch.float32), mlp(torch.float32)
    train(net, KFAC(net, "K-FAC", **BUSY), batches)
    _failing_cholesky(monkeypatch, lambda M: M.dtype == torch.float32)
    train(other, KFAC(other, "K-FAC", **BUSY), batches)
    assert relative(parameters(other), parameters(net)) <= 1e-5


def test_exact_kfac_keeps_the_previous_inverse_where_there_is_none(monkeypatch):
    net = mlp()
    optimizer = KFAC(net, "K-FAC", **{**BUSY, "T_updt": 1, "T_inv": 2, "phi_lambda": 0.1}, continuation="min")
    train(net, optimizer, [vectors(0), vectors(1)])
    factor = optimizer.layers["0"].factors["A"]
    (name,) = factor.processes
    kept = factor.inverse(name, phi=0.1)
    _failing_cholesky(monkeypatch, lambda M: len(M) == factor.d)
    with pytest.warns(RuntimeWarning, match="layer '0', factor A, step 2: .* previous inverse is kept") as caught:
        train(net, optimizer, [vectors(2), vectors(3)])
    assert len(caught) == 1, "it is not tried again before something changes"
    assert factor.inverse(name, phi=0.1) is kept
    monkeypatch.undo()
    train(net, optimizer, [vectors(4)])
    assert factor.inverse(name, phi=0.1) is not kept


@pytest.mark.parametrize("part", ["w", "V"])
@pytest.mark.parametrize("algorithm", ["R-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C"])
def test_an_evd_that_gives_nan_is_a_failed_one(algorithm, part, monkeypatch):
    import array_api_compat.torch.linalg as linalg

    original = linalg.eigh
    net = mlp(torch.float32)
    batches = [vectors(k, dtype=torch.float32) for k in range(3)]
    every = {**ALL_MODES, "T_updt": 1, "T_inv": 1, "T_brand": 1, "T_rsvd": 1, "T_corct": 1}
    optimizer = KFAC(net, algorithm, **every)
    train(net, optimizer, batches[:2])
    factor = optimizer.layers["0"].factors["A"]
    before = process_of(factor).state_dict()

    def spoilt(M):
        w, V = (X.clone() for X in original(M))
        (w if part == "w" else V)[..., 0] = math.nan
        return w, V

    monkeypatch.setattr(linalg, "eigh", spoilt)
    with pytest.warns(RuntimeWarning) as caught:
        train(net, optimizer, batches[2:])
    said = {str(w.message).partition(", step 2: the decomposition failed")[0] for w in caught}
    assert said >= {"layer '0', factor A", "layer '0', factor G"}
    assert same(leaves(process_of(factor).state_dict(), ""), leaves(before))
    assert parameters(net).isfinite().all()
    monkeypatch.undo()
    train(net, optimizer, batches[:1])
    assert not torch.equal(process_of(factor).estimate.lowrank.D, before["estimate"]["lowrank"]["D"])


def test_an_overwriting_whose_brand_update_fails_is_undone(monkeypatch):
    net = mlp()
    optimizer = KFAC(net, "B-R-KFAC", **{**BUSY, "T_updt": 1, "T_brand": 1, "T_rsvd": 2})
    train(net, optimizer, [vectors(k) for k in range(2)])
    factor = optimizer.layers["0"].factors["A"]
    before = process_of(factor).state_dict()

    def fails(*args, **options):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(processes, "symmetric_brand", fails)
    with pytest.warns(RuntimeWarning) as caught:
        train(net, optimizer, [vectors(2)])
    assert "layer '0', factor A, step 2: the decomposition failed" in str(caught[0].message)
    assert same(leaves(process_of(factor).state_dict(), ""), leaves(before))
    monkeypatch.undo()
    train(net, optimizer, [vectors(3)])
    assert process_of(factor).clocks["T_rsvd"].last > before["clocks"]["T_rsvd"]["last"]  # it is made up for


def test_without_any_estimate_the_step_is_the_plain_gradient(monkeypatch, caplog):
    _failing_eigh(monkeypatch, lambda K: True)
    net, other = mlp(), mlp()
    plain = {"lr": 0.1, "clip": None, "weight_decay": 0}
    with pytest.warns(RuntimeWarning, match="decomposition failed"):
        train(net, KFAC(net, "R-KFAC", **plain), [vectors(0)])
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


@pytest.mark.parametrize("linear", [False, True], ids=["Algorithm 1", "Algorithm 8"])
@pytest.mark.parametrize(("algorithm", "process"), [("B-KFAC", "Brand"), ("N-KFAC", "StreamingNystrom")])
def test_a_wide_layer_allocates_nothing_larger_than_its_weight(algorithm, process, linear):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16384, 48, bias=False), nn.Tanh(), nn.Linear(48, 10))
    optimizer = KFAC(net, algorithm, rank=8, T_updt=1, T_brand=1, momentum=0.0, linear_application=linear)
    with New(1) as new:
        for k in range(7):  # N-KFAC re-bases at the sixth update
            g = torch.Generator().manual_seed(k)
            batch = torch.randn(16, 16384, generator=g), torch.randint(10, (16,), generator=g)
            train(net, optimizer, [batch])
    assert type(process_of(optimizer.layers["0"].factors["A"])).__name__ == process
    assert new.largest <= (16384 * (8 + 2 * 16) if linear else 48 * 16384)  # of 16384^2 = 2.7e8 for one factor
    held = [v.numel() for key, v in snapshot(optimizer).items() if "/layers/0/" in key and isinstance(v, Tensor)]
    assert max(held) <= 16384 * (8 + 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "S-KFAC"}, "algorithm 'S-KFAC' is not one of K-FAC, R-KFAC"),
        ({"policy": {"7": "K-FAC"}}, "the model has no layer '7'"),
        ({"policy": {"1": "K-FAC"}}, "layer '1' is a Tanh, not a Linear, Conv1d or Conv2d"),
        ({"policy": {"0": "Z-KFAC"}}, "layer '0': .*'Z-KFAC' is not one of"),
        ({"policy": {"0": {"A": "K-FAC"}}}, "layer '0': a policy by factor needs the keys 'A' and 'G'"),
        ({"policy": {"0": 3}}, "layer '0': a process is named or made by a function, got 3"),
        ({"rho": 1.0}, r"rho must lie in \(0, 1\), got 1.0"),
        ({"phi_lambda": 0.0}, "phi must be positive"),
        ({"phi_corct": 2}, r"phi_corct must lie in \(0, 1\]"),
        ({"T_updt": 0}, "T_updt must be a whole number of at least 1, got 0"),
        ({"T_updt": math.nan}, "T_updt must be a whole number of at least 1, got nan"),
        ({"T_inv": math.inf}, "T_inv must be a whole number of at least 1, got inf"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": None}, "rank must be a whole number of at least 1, got None"),
        ({"rho": "a"}, "rho must be a number, got 'a'"),
        ({"policy": "K-FAC"}, "policy must map layer names to choices, got 'K-FAC'"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip_by": "norm"}, "clip_by 'norm'"),
        ({"continuation": "max"}, "continuation 'max' is not one of none, min, trace"),
        ({"fisher": "true"}, "fisher 'true'"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number of at least 1"),
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
