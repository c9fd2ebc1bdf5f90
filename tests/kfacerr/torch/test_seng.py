"""SENG against dense per-sample gradients: the step, the sampling, and what an optimizer has to put up with."""

import copy
import itertools
import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from kfacerr.exceptions import InputError
from kfacerr.torch import SENG, _curvature
from kfacerr.torch._curvature import (
    FactoredGradients,
    compressed,
    dense_gradients,
    gram_by_gradients,
    gram_by_positions,
)
from kfacerr.torch.seng import seng_learning_rate

LAM = 0.3
EXACT = {"fim_col_sample_size": None, "svd_rank": None}
PLAIN = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "damping": LAM}
F64 = torch.float64


@pytest.fixture(autouse=True)
def _float64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(default)


# ---- references ---------------------------------------------------------------------------------------------


def _loss(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(1), y)


def _batch(model_input: tuple[int, ...], classes: int, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, *model_input, generator=generator),
        torch.randint(classes, (n,), generator=generator),
    )


def _per_sample_loss_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of each sample's own loss (n, *shape), by parameter name."""

    def loss(parameters, sample, label):
        return _loss(functional_call(model, parameters, (sample[None],)), label[None])

    model = copy.deepcopy(model)  # whose hooks are inert
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)


def _per_sample_shares(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """n times the gradient of <layer(x)_i, dLoss/dy_i> with x and dLoss/dy fixed, one sample at a time."""
    frozen = copy.deepcopy(layer)  # running statistics must not move
    rows = []
    for i in range(len(x)):
        weight = torch.zeros_like(dy)
        weight[i] = dy[i]
        shares = torch.autograd.grad(frozen(x), list(frozen.parameters()), weight)
        rows.append([len(x) * share.detach() for share in shares])
    return [torch.stack(rows_of_p) for rows_of_p in zip(*rows, strict=True)]


def _dense_step(per_sample: list[Tensor], grads: list[Tensor], lam: float) -> list[Tensor]:
    """(W^T W + lam I)^-1 g with W formed, for the parameters of one layer."""
    n = len(per_sample[0])
    W = torch.cat([p.reshape(n, -1) for p in per_sample], dim=1) / math.sqrt(n)
    g = torch.cat([p.reshape(-1) for p in grads])
    step = torch.linalg.solve(W.T @ W + lam * torch.eye(len(g)), g)
    return [part.reshape(p.shape) for part, p in zip(step.split([p.numel() for p in grads]), grads, strict=True)]


def _followed(optimizer: SENG) -> set[str]:
    """The layers that have a curvature."""
    return {name for name, layer in optimizer.layers.items() if layer.curvature is not None}


def _taken(model: nn.Module, optimizer: SENG, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What one step at lr 1 subtracts from each parameter; leaves the parameters where they were."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    _loss(model(x), y).backward()
    optimizer.step()
    step = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return step


def _expected(model: nn.Module, x: Tensor, y: Tensor, lam: float = LAM) -> dict[str, Tensor]:
    """The dense step of a model without BatchNorm, from the gradients of each sample's own loss."""
    per_sample = _per_sample_loss_gradients(model, x, y)
    model.zero_grad()
    _loss(model(x), y).backward()
    expected = {}
    for name, module in model.named_modules():
        names = [f"{name}.{p}" for p, _ in module.named_parameters(recurse=False)]
        if names:
            grads = [model.get_parameter(p).grad for p in names]
            expected |= dict(zip(names, _dense_step([per_sample[p] for p in names], grads, lam), strict=True))
    model.zero_grad()
    return expected


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0
        assert (actual[name] - value).norm() <= rtol * value.norm(), name


def _mlp(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 5, bias=bias), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    )


def _cnn(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, **options),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, (2, 1), bias=options.get("bias", True)),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def _built(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        model(x)
    return model


def _columns(n: int, positions: int, d_A: int, d_G: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(d_A, n * positions, generator=generator) / math.sqrt(n),
        torch.randn(d_G, n * positions, generator=generator) / math.sqrt(n),
    )


# ---- the step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_step_of_linear_layers_is_the_dense_natural_gradient_step(bias):
    model, (x, y) = _mlp(bias), _batch((7,), 3)
    _assert_same(_taken(model, SENG(model, **PLAIN, **EXACT), x, y), _expected(model, x, y))


CONVOLUTIONS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
    {"padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("threshold", [700_000, 0], ids=["dense", "factored"])
def test_step_of_convolutions_is_the_dense_natural_gradient_step(options, threshold):
    x, y = _batch((2, 6, 5), 3)
    model = _built(_cnn(**options), x)
    optimizer = SENG(model, **PLAIN, **EXACT, im_size_threshold=threshold)
    _assert_same(_taken(model, optimizer, x, y), _expected(model, x, y))


def test_step_of_a_linear_layer_on_sequences_sums_over_the_positions():
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), _batch((5, 4), 3)
    for threshold in (700_000, 0):
        optimizer = SENG(model, **PLAIN, **EXACT, im_size_threshold=threshold)
        _assert_same(_taken(model, optimizer, x, y), _expected(model, x, y))


def test_default_settings_are_exact_for_layers_below_the_threshold():
    x, y = _batch((2, 6, 5), 3)
    model = _built(_cnn(), x)
    _assert_same(_taken(model, SENG(model, **PLAIN), x, y), _expected(model, x, y))


NORMED = {
    "BatchNorm2d": (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), (2, 5, 4)),
    "BatchNorm1d": (nn.Linear(4, 3), nn.BatchNorm1d(3), (4,)),
    "BatchNorm1d of sequences": (nn.Identity(), nn.BatchNorm1d(4), (4, 3)),
    "BatchNorm1d without running statistics": (nn.Identity(), nn.BatchNorm1d(4, track_running_stats=False), (4,)),
}


@pytest.mark.parametrize("kind", NORMED)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_step_of_batch_norm_is_the_dense_step_of_the_samples_shares(kind, training):
    below, norm, shape = copy.deepcopy(NORMED[kind])
    model = nn.Sequential(below.double(), norm.double(), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3))
    x, y = _batch(shape, 3)
    _built(model, x + 0.1)  # moves the running statistics
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    model.train(training)

    seen: dict[str, Tensor] = {}

    def keep(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda dy: seen.__setitem__("dy", dy))

    handle = norm.register_forward_hook(keep)
    reference = copy.deepcopy(norm)
    _loss(model(x), y).backward()
    handle.remove()
    norm.load_state_dict(reference.state_dict())  # the running statistics before the forward
    shares, grads = _per_sample_shares(reference, seen["x"], seen["dy"]), [norm.weight.grad, norm.bias.grad]
    for share, gradient in zip(shares, grads, strict=True):
        torch.testing.assert_close(share.mean(0), gradient, rtol=1e-12, atol=1e-14)

    taken = _taken(model, SENG(model, **PLAIN), x, y)
    weight, bias = _dense_step(shares, grads, LAM)
    torch.testing.assert_close(taken["1.weight"], weight, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(taken["1.bias"], bias, rtol=1e-10, atol=1e-13)


def test_batch_norm_in_eval_mode_has_the_gradients_of_the_samples_own_losses():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    x, y = _batch((4,), 3)
    _built(model, x).eval()
    _assert_same(_taken(model, SENG(model, **PLAIN), x, y), _expected(model, x, y))


def test_frozen_bias_leaves_the_block_of_the_weight():
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval()), _batch((4,), 3)
    for layer in model:
        layer.bias.requires_grad_(False)
    _loss(model(x), y).backward()
    per_sample = _per_sample_loss_gradients(model, x, y)
    taken = _taken(model, SENG(model, **PLAIN), x, y)
    for i in (0, 1):
        (expected,) = _dense_step([per_sample[f"{i}.weight"]], [model[i].weight.grad], LAM)
        torch.testing.assert_close(taken[f"{i}.weight"], expected)
        assert not taken[f"{i}.bias"].any()


def test_damping_is_read_at_every_step():
    """One K serves any damping, for it is kept as its EVD."""
    model, (x, y) = _mlp(), _batch((7,), 3)
    optimizer = SENG(model, **PLAIN)
    for lam in (LAM, 2.0, 1e-3):
        optimizer.param_groups[0]["damping"] = lam
        _assert_same(_taken(model, optimizer, x, y), _expected(model, x, y, lam), rtol=1e-10)


# ---- the two forms of K, blocks, compression ----------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 40, 1 << 24])
@pytest.mark.parametrize("positions", [1, 3])
def test_both_forms_of_the_small_matrix_are_that_of_the_dense_gradients(monkeypatch, block, positions):
    monkeypatch.setattr(_curvature, "_BLOCK", block)
    n = 5
    A, G = _columns(n, positions, 7, 4)
    K = dense_gradients(A, G, n).gram()
    torch.testing.assert_close(n * gram_by_positions(A, G, n), K)
    torch.testing.assert_close(n * gram_by_gradients(A, G, n), K)
    torch.testing.assert_close(FactoredGradients(A, G, n).gram(), K)


def test_small_matrix_of_a_fully_connected_layer_is_the_hadamard_product_of_gram_matrices():
    A, G = _columns(5, 1, 7, 4)
    torch.testing.assert_close(FactoredGradients(A, G, 5).gram(), 5 * (A.T @ A) * (G.T @ G))


@pytest.mark.parametrize("positions", [1, 3])
def test_products_with_factored_gradients_are_those_with_the_dense_ones(positions):
    n = 5
    A, G = _columns(n, positions, 7, 4)
    g, v = torch.randn(4, 7), torch.randn(n)
    dense, factored = dense_gradients(A, G, n), FactoredGradients(A, G, n)
    assert dense.weights == factored.weights == 28
    torch.testing.assert_close(factored.product(g), dense.product(g))
    torch.testing.assert_close(factored.adjoint(v, g.shape), dense.adjoint(v, g.shape))


def test_compression_is_exact_at_the_rank_of_the_samples_gradients():
    n = 4
    A, G = _columns(n, 6, 7, 3)  # G_i (3, 6) has rank 3
    W = dense_gradients(A, G, n).W
    small = compressed(A, G, n, 3)
    assert [X.shape for X in small] == [(7, 3 * n), (3, 3 * n)]
    torch.testing.assert_close(dense_gradients(*small, n).W, W)
    assert compressed(A, G, n, 6)[0] is A


def test_compression_keeps_the_leading_singular_vectors_of_each_samples_G():
    n, rank = 4, 2
    A, G = _columns(n, 6, 7, 5)
    small = dense_gradients(*compressed(A, G, n, rank), n).W
    for i in range(n):
        A_i, G_i = A[:, 6 * i : 6 * (i + 1)], G[:, 6 * i : 6 * (i + 1)]
        U, s, Vh = torch.linalg.svd(G_i, full_matrices=False)
        truncated = U[:, :rank] * s[:rank] @ Vh[:rank]
        torch.testing.assert_close(small[i].reshape(5, 7), math.sqrt(n) * truncated @ A_i.T)


# ---- sampling -----------------------------------------------------------------------------------------------


def test_sampled_estimates_averaged_over_all_draws_are_exact():
    """Unbiasedness as it is defined: every subset of rows is equally likely."""
    n, d_A, d_G, c = 4, 5, 4, 2
    A, G = _columns(n, 2, d_A, d_G)
    g = torch.randn(d_G, d_A)
    estimates = [
        FactoredGradients(A, G, n, torch.tensor(rows_A), torch.tensor(rows_G))
        for rows_A in itertools.combinations(range(d_A), c)
        for rows_G in itertools.combinations(range(d_G), c)
    ]
    exact = FactoredGradients(A, G, n)
    torch.testing.assert_close(torch.stack([e.gram() for e in estimates]).mean(0), exact.gram())
    torch.testing.assert_close(torch.stack([e.product(g) for e in estimates]).mean(0), exact.product(g))
    assert estimates[0].ratio == d_A * d_G / c**2


def test_sampled_estimates_over_many_seeds_approach_the_exact_ones():
    """Through the optimizer's own draws, within five standard errors of the mean in every entry."""
    n, d_A, d_G, seeds = 3, 12, 9, 2000
    A, G = _columns(n, 2, d_A, d_G)
    g = torch.randn(d_G, d_A)
    optimizer = SENG(nn.Linear(1, 1), fim_col_sample_size=4, im_size_threshold=0)
    grams, products = [], []
    for seed in range(seeds):
        optimizer._drawn = torch.Generator().manual_seed(seed).get_state()
        sketch = optimizer._sketched(A, G, n)
        assert len(sketch.rows_A) == len(set(sketch.rows_A.tolist())) == 4
        assert len(sketch.rows_G) == len(set(sketch.rows_G.tolist())) == 4
        grams.append(sketch.gram())
        products.append(sketch.product(g))
    exact = FactoredGradients(A, G, n)
    for draws, expected in ((torch.stack(grams), exact.gram()), (torch.stack(products), exact.product(g))):
        error = (draws.mean(0) - expected).abs()
        assert (error <= 5 * draws.std(0) / math.sqrt(seeds)).all()
        assert (draws.std(0) > 0).all()


def test_sampled_small_matrix_is_positive_semidefinite():
    A, G = _columns(8, 2, 12, 9)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(d, generator=generator)[:2] for d in (12, 9)]
        eigenvalues = torch.linalg.eigvalsh(FactoredGradients(A, G, 8, *rows).gram())
        assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]


def test_sampled_step_is_the_formula_with_the_sampled_parts():
    model, (x, y) = nn.Sequential(nn.Linear(9, 6)), _batch((9,), 6)
    optimizer = SENG(model, **PLAIN, fim_col_sample_size=3, im_size_threshold=0)
    taken = _taken(model, optimizer, x, y)
    sketch = optimizer.layers["0"].curvature.gradients
    rows = torch.zeros(6, 10, dtype=torch.bool)
    rows[sketch.rows_G[:, None], sketch.rows_A] = True
    rho = 6 * 10 / 9
    per_sample = _per_sample_loss_gradients(model, x, y)
    model.zero_grad()
    _loss(model(x), y).backward()
    W = torch.cat([per_sample["0.weight"], per_sample["0.bias"][:, :, None]], 2).flatten(1) / math.sqrt(len(x))
    g = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1).flatten()
    W_S, g_S = W[:, rows.flatten()], g[rows.flatten()]
    small = LAM * torch.eye(len(x)) + rho * W_S @ W_S.T
    expected = (g - W.T @ torch.linalg.solve(small, rho * W_S @ g_S)) / LAM
    torch.testing.assert_close(torch.cat([taken["0.weight"], taken["0.bias"][:, None]], 1).flatten(), expected)


def test_only_layers_above_the_threshold_are_sampled_and_compressed():
    x, y = _batch((2, 6, 5), 3)
    model = _built(_cnn(), x)
    optimizer = SENG(model, **PLAIN, fim_col_sample_size=2, svd_rank=2, im_size_threshold=28)
    _taken(model, optimizer, x, y)
    kept = {name: layer.curvature.gradients for name, layer in optimizer.layers.items()}
    assert kept["0"].A.shape[1] == 2 * len(x)  # 3 x 19 weights
    assert kept["0"].ratio == 57 / 4
    assert kept["2"].W.shape == (len(x), 28)  # 4 x 7 weights
    assert kept["5"].ratio == 3 * 37 / 4  # one position a sample


def test_sampling_leaves_the_global_random_numbers_alone():
    model, (x, y) = nn.Sequential(nn.Linear(9, 6)), _batch((9,), 6)
    optimizer = SENG(model, fim_col_sample_size=3, im_size_threshold=0)
    before = torch.get_rng_state()
    _taken(model, optimizer, x, y)
    assert torch.equal(torch.get_rng_state(), before)


# ---- momentum, weight decay, schedule -----------------------------------------------------------------------


def test_updates_are_those_of_sgd_on_the_preconditioned_gradient():
    """Momentum and the coupled, unpreconditioned weight decay are torch.optim.SGD's."""
    model, (x, y) = _mlp(), _batch((7,), 3)
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    optimizer = SENG(model, **options, damping=LAM, update_every=1)
    sgd = torch.optim.SGD(twin.parameters(), **options)
    for _ in range(4):
        directions = _expected(twin, x, y)
        for name, p in twin.named_parameters():
            p.grad = directions[name]
        sgd.step()
        optimizer.zero_grad()
        _loss(model(x), y).backward()
        optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0.05), (37.5, 0.05 / 64), (15, 0.05 * 0.8**6), (75, 0.0), (80, 0.0)]
)
def test_learning_rate_is_that_of_the_supplement_and_zero_after_it(epoch, lr):
    assert seng_learning_rate(epoch) == pytest.approx(lr, rel=1e-12)


def test_groups_have_their_own_options():
    """A layer's block is that of the parameters that are optimized."""
    model, (x, y) = _mlp(), _batch((7,), 3)
    groups = [{"params": model[0].parameters()}, {"params": [model[2].weight], "lr": 0.5, "damping": 2.0}]
    optimizer = SENG(model, **PLAIN, params=groups)
    taken = _taken(model, optimizer, x, y)
    torch.testing.assert_close(taken["0.weight"], _expected(model, x, y)["0.weight"])
    per_sample = _per_sample_loss_gradients(model, x, y)
    _loss(model(x), y).backward()
    (step,) = _dense_step([per_sample["2.weight"]], [model[2].weight.grad], 2.0)
    torch.testing.assert_close(taken["2.weight"], 0.5 * step)
    assert not taken["2.bias"].any()
    assert not taken["4.weight"].any()


# ---- refresh ------------------------------------------------------------------------------------------------


def test_curvature_is_captured_at_refreshes_only_and_reused_in_between():
    model, (x, y) = nn.Sequential(nn.Linear(7, 3)), _batch((7,), 3)
    optimizer = SENG(model, **PLAIN, update_every=3)
    stale = None
    for k in range(7):
        batch = torch.randn_like(x), y
        optimizer.zero_grad()
        _loss(model(batch[0]), y).backward()
        assert bool(optimizer._follower.reached) == (k % 3 == 0)
        if k % 3 == 0:
            stale = list(_per_sample_loss_gradients(model, *batch).values())
        before = [p.detach().clone() for p in model.parameters()]
        expected = _dense_step(stale, [p.grad for p in model.parameters()], LAM)
        optimizer.step()
        for p, old, step in zip(model.parameters(), before, expected, strict=True):
            torch.testing.assert_close(old - p, step)


def test_curvature_may_come_from_a_batch_of_another_size():
    model, (x, y) = _mlp(), _batch((7,), 3)
    optimizer = SENG(model, update_every=2)
    for size in (2, 6, 5):
        _taken(model, optimizer, x[:size], y[:size])
    assert optimizer.layers["0"].curvature.gradients.n == 5


def test_micro_batches_of_different_lengths_are_filled_up():
    layer = nn.Linear(4, 3)
    xs = [torch.randn(2, 5, 4), torch.randn(3, 2, 4)]
    for threshold in (700_000, 0):
        layer.zero_grad()
        optimizer = SENG(layer, **{**PLAIN, "lr": 0.0}, **EXACT, im_size_threshold=threshold)
        for x in xs:
            layer(x).square().sum().backward()
        optimizer.step()
        K = optimizer.layers[""].curvature.gradients.gram()
        rows = []
        for sample in itertools.chain(*xs):
            share = torch.autograd.grad(layer(sample).square().sum(), list(layer.parameters()))
            rows.append(math.sqrt(5) * torch.cat([part.flatten() for part in share]))
        torch.testing.assert_close(K, torch.stack(rows) @ torch.stack(rows).T)


# ---- what is not preconditioned, and what is refused --------------------------------------------------------


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.conv = nn.Conv2d(2, 2, 2, groups=2)
        self.norm = nn.LayerNorm(8)
        self.tied, self.also_tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.also_tied.weight = self.tied.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).flatten(1))
        return self.last(self.also_tied(torch.tanh(self.tied(h)))) * self.scale


def test_gradients_of_other_parameters_are_divided_by_one_plus_damping_and_logged_once(caplog):
    torch.manual_seed(0)
    model, (x, y) = _Odd(), _batch((2, 3, 3), 3)
    _loss(model(x), y).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    with caplog.at_level(logging.INFO, logger="kfacerr"):
        optimizer = SENG(model, **PLAIN)
        taken = _taken(model, optimizer, x, y)
        _taken(model, optimizer, x, y)
    for name, gradient in grads.items():
        if not name.startswith("last"):
            torch.testing.assert_close(taken[name], gradient / (1 + LAM))
    assert _followed(optimizer) == {"last"}
    loud, quiet = (record.getMessage() for record in sorted(caplog.records, key=lambda record: -record.levelno))
    assert "layer 'conv' is a grouped convolution (groups=2)" in loud
    assert "layer 'tied' shares its weight with another layer" in loud
    assert "the model itself is a _Odd" in quiet and "layer 'norm' is a LayerNorm" in quiet


def test_layers_can_be_chosen():
    model, (x, y) = _mlp(), _batch((7,), 3)
    optimizer = SENG(model, **PLAIN, layers=["2"])
    expected = _expected(model, x, y)
    taken = _taken(model, optimizer, x, y)
    torch.testing.assert_close(taken["2.weight"], expected["2.weight"])
    model.zero_grad()
    _loss(model(x), y).backward()
    torch.testing.assert_close(taken["0.weight"], model[0].weight.grad / (1 + LAM))


def test_layer_that_no_backward_reached_is_logged_once(caplog):
    model, (x, y) = _mlp(), _batch((7,), 3)
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    with caplog.at_level(logging.WARNING, logger="kfacerr"):
        optimizer = SENG(model, **PLAIN, update_every=1)
        for _ in range(2):
            _loss(model(x), y).backward()
            optimizer.step()
    (record,) = caplog.records
    assert "no backward reached layer 'unused'" in record.getMessage()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping must be above 0, got 0.0"),
        ({"update_every": 0}, "update_every must be a whole number of at least 1"),
        ({"fim_col_sample_size": 0}, "fim_col_sample_size must be a whole number of at least 1"),
        ({"svd_rank": 0}, "svd_rank must be a whole number of at least 1"),
        ({"im_size_threshold": -1}, "im_size_threshold must be a whole number of at least 0"),
        ({"layers": ["9"]}, "the model has no layer '9'"),
        ({"layers": ["1"]}, "layer '1' is a ReLU, not a Linear, Conv1d or Conv2d: SENG cannot"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        SENG(_mlp(), **settings)


# ---- training -----------------------------------------------------------------------------------------------


def _normed_cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)
    )


def test_foreign_state_is_refused():
    model = _mlp()
    optimizer = SENG(model)
    _taken(model, optimizer, *_batch((7,), 3))
    with pytest.raises(InputError, match=r"not followed: \['0', '2'\]"):
        SENG(model, layers=["4"]).load_state_dict(optimizer.state_dict())


def test_per_sample_gradients_that_overflow_keep_the_curvature(caplog):
    layer = nn.Linear(2, 2, dtype=torch.float32)
    optimizer = SENG(layer, update_every=1)
    layer(torch.ones(3, 2, dtype=torch.float32)).sum().backward()
    optimizer.step()
    kept = optimizer.layers[""].curvature
    optimizer.zero_grad()
    layer(torch.full((3, 2), 1e30, dtype=torch.float32)).sum().backward()  # a gradient of 3e30, K of 1e60
    optimizer.step()
    assert optimizer.layers[""].curvature is kept
    assert "keeps its curvature at step 1" in caplog.text


def test_an_evd_that_gives_nan_keeps_the_curvature(caplog, monkeypatch):
    model, (x, y) = _mlp(), _batch((7,), 3)
    optimizer = SENG(model, update_every=1)
    _loss(model(x), y).backward()
    optimizer.step()
    kept = {name: layer.curvature for name, layer in optimizer.layers.items()}
    monkeypatch.setattr(torch.linalg, "eigh", lambda K: (K[0] * math.nan, K))
    _loss(model(x), y).backward()
    optimizer.step()
    assert all(optimizer.layers[name].curvature is curvature for name, curvature in kept.items())
    assert "keeps its curvature at step 1: the EVD gave NaN or Inf" in caplog.text


def test_trains_a_small_network_with_the_settings_of_the_paper():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 2, 6, 5, generator=generator)
    y = (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).long()
    model = _normed_cnn()
    optimizer = SENG(model, update_every=20)
    for k in range(120):
        for group in optimizer.param_groups:
            group["lr"] = seng_learning_rate(k / 6)
        optimizer.zero_grad()
        loss = _loss(model(x), y)
        loss.backward()
        optimizer.step()
        if k == 0:
            first = loss.item()
    assert loss.item() < 0.25 * first
