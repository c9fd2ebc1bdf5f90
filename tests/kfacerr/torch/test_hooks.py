"""The live stream reproduces autograd's own gradient, eq. (20), and refuses what would give wrong columns."""

import copy
import io

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kfacerr.exceptions import InputError
from kfacerr.torch import ColumnHooks
from kfacerr.torch.hooks import conv2d_columns, followable_layers, linear_columns

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def _gradient(layer: nn.Module) -> Tensor:
    """Mat(g): the weight's gradient and the bias's as a last column."""
    parts = [layer.weight.grad.flatten(1)]
    if layer.bias is not None:
        parts.append(layer.bias.grad[:, None])
    return torch.cat(parts, dim=1)


def _assert_reproduces(layer: nn.Module, columns, rtol: float = 1e-12) -> None:
    expected = _gradient(layer)
    error = (columns.G @ columns.A.T - expected).norm()
    assert error <= rtol * expected.norm()
    assert expected.norm() > 0


def _net(**kwargs) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(48, 8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(8, 4, bias=False),
    )
    return net.to(**kwargs)


NAMES = ("0", "3", "6")


def _batch(dtype: torch.dtype = torch.float64, b: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(b, 2, 4, 4, dtype=dtype), torch.randint(4, (b,))


def _loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


# ------------------------------------------------------------------------------------------- eq. (20)


@FAST
@given(
    extra=st.lists(st.integers(1, 3), max_size=2),
    b=st.integers(1, 4),
    d_in=st.integers(1, 5),
    d_out=st.integers(1, 4),
    bias=st.booleans(),
)
def test_columns_reproduce_autograd_gradient_of_linear(extra, b, d_in, d_out, bias):
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out, bias=bias).double()
    x = torch.randn(b, *extra, d_in, dtype=torch.float64)
    with ColumnHooks(layer, [""]) as hooks:
        out = layer(x)
        (out * torch.randn_like(out)).sum().backward()
        columns = hooks.pop()[""]
    n = x[..., 0].numel()
    assert columns.A.shape == (d_in + bias, n)
    assert columns.G.shape == (d_out, n)
    _assert_reproduces(layer, columns)


@FAST
@given(data=st.data())
def test_columns_reproduce_autograd_gradient_of_conv2d(data):
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, dilation = data.draw(pair), data.draw(pair)
    padding = data.draw(
        st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"]))
    )
    stride = (1, 1) if padding == "same" else data.draw(pair)
    layer_options = {
        "bias": data.draw(st.booleans()),
        "padding_mode": data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    b, c_in, c_out = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    height, width = data.draw(st.tuples(st.integers(4, 8), st.integers(4, 8)))
    assume(
        all(
            size + (0 if isinstance(padding, str) else 2 * p) > d * (k - 1)
            for size, p, d, k in zip((height, width), padding, dilation, kernel, strict=False)
        )
    )
    torch.manual_seed(0)
    layer = nn.Conv2d(
        c_in, c_out, kernel, stride=stride, padding=padding, dilation=dilation, **layer_options
    ).double()
    x = torch.randn(b, c_in, height, width, dtype=torch.float64)
    with ColumnHooks(layer, [""]) as hooks:
        out = layer(x)
        (out * torch.randn_like(out)).sum().backward()
        columns = hooks.pop()[""]
    n = b * out[0, 0].numel()
    assert columns.A.shape == (c_in * kernel[0] * kernel[1] + layer_options["bias"], n)
    assert columns.G.shape == (c_out, n)
    _assert_reproduces(layer, columns)


def test_unbatched_inputs_are_a_batch_of_one():
    torch.manual_seed(0)
    for layer, shape in ((nn.Linear(3, 2), (3,)), (nn.Conv2d(2, 3, 2), (2, 4, 4))):
        with ColumnHooks(layer, [""]) as hooks:
            layer(torch.randn(shape)).square().sum().backward()
            _assert_reproduces(layer, hooks.pop()[""], rtol=1e-5)


def test_factors_are_batch_means_of_the_per_sample_quantities():
    """A A^T = Omega and G G^T = |T| Gamma of Grosse & Martens, from one sample at a time."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 2).double()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64)  # dLoss_i/do of each sample's own loss
    A, G = conv2d_columns(layer, x, weight / 4)
    omega, gamma = torch.zeros(9, 9, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    positions = [(i, j) for i in range(2) for j in range(2)]
    for sample, ds in zip(x, weight, strict=True):
        for i, j in positions:
            a = torch.cat([sample[:, i : i + 2, j : j + 2].reshape(-1), torch.ones(1, dtype=torch.float64)])
            omega += torch.outer(a, a) / 4
            gamma += torch.outer(ds[:, i, j], ds[:, i, j]) / (4 * len(positions))
    torch.testing.assert_close(A @ A.T, omega)
    torch.testing.assert_close(G @ G.T, len(positions) * gamma)


def test_linear_column_i_is_the_scaled_input_and_gradient_of_sample_i():
    layer = nn.Linear(2, 2)
    x, grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    A, G = linear_columns(layer, x, grad)
    torch.testing.assert_close(A * 2**0.5, torch.tensor([[1.0, 3.0], [2.0, 4.0], [1.0, 1.0]]))
    torch.testing.assert_close(G / 2**0.5, torch.tensor([[5.0, 7.0], [6.0, 8.0]]))


# ------------------------------------------------------------------------------- models as they are


def test_several_layers_with_inplace_relu_and_dropout_behind_them():
    net = _net(dtype=torch.float64)
    with ColumnHooks(net, NAMES) as hooks:
        for _ in range(3):
            net.zero_grad()
            _loss(net, *_batch()).backward()
            columns = hooks.pop()
            assert tuple(columns) == NAMES
            for name in NAMES:
                _assert_reproduces(net.get_submodule(name), columns[name])


def test_hooks_leave_the_gradient_bit_for_bit_as_it_was():
    plain, hooked = _net(), _net()
    x, y = _batch(torch.float32)
    torch.manual_seed(3)
    _loss(plain, x, y).backward()
    with ColumnHooks(hooked, NAMES) as hooks:
        torch.manual_seed(3)
        _loss(hooked, x, y).backward()
        hooks.pop()
    for p, q in zip(plain.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_columns_are_detached_and_at_least_float32(dtype, expected):
    net = _net(dtype=dtype)
    with ColumnHooks(net, NAMES) as hooks:
        _loss(net, *_batch(dtype)).backward()
        for columns in hooks.pop().values():
            for array in columns:
                assert array.dtype == expected
                assert not array.requires_grad
                assert array.is_contiguous()


def test_bfloat16_autocast_gives_float32_columns_close_to_the_gradient():
    net = _net()
    x, y = _batch(torch.float32)
    with ColumnHooks(net, NAMES) as hooks:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(net, x, y)
        loss.backward()
        for name, columns in hooks.pop().items():
            assert columns.A.dtype == columns.G.dtype == torch.float32
            _assert_reproduces(net.get_submodule(name), columns, rtol=2e-2)


def test_loss_scale_is_taken_out_of_G():
    net = _net(dtype=torch.float64).eval()
    with ColumnHooks(net, ["3"]) as hooks:
        _loss(net, *_batch()).backward()
        A, G = hooks.pop()["3"]
        (1024 * _loss(net, *_batch())).backward()
        A2, G2 = hooks.pop(loss_scale=1024)["3"]
    torch.testing.assert_close(A, A2)
    torch.testing.assert_close(G, G2)


def test_layer_called_with_a_keyword_argument():
    layer = nn.Linear(2, 2)
    with ColumnHooks(layer, [""]) as hooks:
        layer(input=torch.ones(3, 2)).sum().backward()
        _assert_reproduces(layer, hooks.pop()[""], rtol=1e-6)


def test_frozen_layer_is_followed_as_long_as_its_output_needs_a_gradient():
    net = _net(dtype=torch.float64)
    net[3].requires_grad_(False)
    with ColumnHooks(net, ["3"]) as hooks:
        _loss(net, *_batch()).backward()
        assert hooks.pop()["3"].G.shape == (8, 5)


# ------------------------------------------------------------------------ evaluation, switch, copies


def test_evaluation_without_gradient_disturbs_nothing():
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, NAMES) as hooks:
        loss = _loss(net, x, y)
        with torch.no_grad():
            net(torch.zeros_like(x))
        loss.backward()
        with torch.no_grad():
            net(torch.zeros_like(x))
        for name, columns in hooks.pop().items():
            _assert_reproduces(net.get_submodule(name), columns)


def test_forward_without_backward_is_forgotten():
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, NAMES) as hooks:
        net(2 * x)
        _loss(net, x, y).backward()
        for name, columns in hooks.pop().items():
            _assert_reproduces(net.get_submodule(name), columns)


def test_nothing_is_captured_while_disabled():
    net = _net(dtype=torch.float64)
    with ColumnHooks(net, NAMES) as hooks:
        hooks.enabled = False
        _loss(net, *_batch()).backward()
        with pytest.raises(InputError, match=r"'0' was not reached.*disabled"):
            hooks.pop()
        hooks.enabled = True
        _loss(net, *_batch()).backward()
        assert set(hooks.pop()) == set(NAMES)


def test_close_removes_every_hook():
    net = _net(dtype=torch.float64)
    hooks = ColumnHooks(net, NAMES)
    loss = _loss(net, *_batch())
    hooks.close()
    hooks.close()
    loss.backward()  # its tensor hooks are still in the graph and must be inert
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(InputError, match="closed"):
        hooks.pop()


@pytest.mark.parametrize("when", ["before", "after forward", "after backward"])
def test_deepcopy_of_a_hooked_model_is_independent(when):
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, NAMES) as hooks:
        clone = copy.deepcopy(net)
        loss = _loss(net, x, y)
        if when == "after forward":
            clone = copy.deepcopy(net)
        loss.backward()
        if when == "after backward":
            clone = copy.deepcopy(net)
        _loss(clone, 2 * x, y).backward()
        for name, columns in hooks.pop().items():
            _assert_reproduces(net.get_submodule(name), columns)


def test_hooked_model_can_be_pickled():
    net = _net()
    with ColumnHooks(net, NAMES):
        buffer = io.BytesIO()
        torch.save(net, buffer)
    buffer.seek(0)
    clone = torch.load(buffer, weights_only=False)
    assert clone(_batch(torch.float32)[0]).shape == (5, 4)


def test_second_backward_through_a_retained_graph_after_pop_is_ignored():
    """Labels drawn from the model first, the true gradient second: the Fisher's columns stay."""
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, NAMES) as hooks:
        out = net(x)
        F.cross_entropy(out, y).backward(retain_graph=True)
        hooks.pop()
        F.cross_entropy(out, y).backward()
        _loss(net, x, y).backward()
        assert set(hooks.pop()) == set(NAMES)


# ------------------------------------------------------------------------------------------- refusals


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.fc(x))


def test_layer_used_twice_in_one_forward_is_refused():
    net = _Twice()
    with ColumnHooks(net, ["fc"]) as hooks:
        with pytest.raises(InputError, match="'fc' is used twice in one forward"):
            net(torch.ones(2, 3))
        with torch.no_grad():
            net(torch.ones(2, 3))
        hooks.enabled = False
        net(torch.ones(2, 3))


def test_layer_that_is_never_reached_is_named():
    net = _Twice()
    with ColumnHooks(net, ["spare"]) as hooks:
        net(torch.ones(2, 3)).sum().backward()
        with pytest.raises(InputError, match="'spare' was not reached by a forward"):
            hooks.pop()


def test_pop_between_forward_and_backward_is_refused():
    net = _net()
    with ColumnHooks(net, ["3"]) as hooks:
        net(_batch(torch.float32)[0])
        with pytest.raises(InputError, match="'3' was reached by the forward but by no backward"):
            hooks.pop()


def test_gradient_accumulation_pops_after_each_micro_batch():
    net = _net(dtype=torch.float64).eval()
    x, y = _batch(b=6)
    with ColumnHooks(net, ["3"]) as hooks:
        total = torch.zeros(8, 49, dtype=torch.float64)
        for part in (slice(0, 3), slice(3, 6)):
            (_loss(net, x[part], y[part]) / 2).backward()
            A, G = hooks.pop(loss_scale=0.5)["3"]
            total += G @ A.T / 2
        torch.testing.assert_close(total, _gradient(net[3]))
        _loss(net, x, y).backward()
        with pytest.raises(InputError, match=r"'3'.*call pop\(\) after each backward"):
            net(x)
        assert set(hooks.pop()) == {"3"}  # the refusal lost nothing


def test_two_backwards_without_pop_are_refused():
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, ["3"]):
        loss = _loss(net, x, y)
        loss.backward(retain_graph=True)
        with pytest.raises(InputError, match=r"call pop\(\) after each backward"):
            loss.backward()


def test_two_forwards_in_one_backward_are_refused():
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, ["3"]):
        loss = _loss(net, x, y) + _loss(net, 2 * x, y)
        with pytest.raises(InputError, match="one forward per backward"):
            loss.backward()


def test_a_backward_without_the_weights_gradient_leaves_no_columns():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3, requires_grad=True)
    with ColumnHooks(net, ["0", "2"]) as hooks:
        torch.autograd.grad(net(x).sum(), x)
        assert not hooks.pending()
        loss = net(x).square().sum()
        loss.backward(inputs=[net[2].weight], retain_graph=True)
        assert list(hooks.pending()) == ["2"]
        hooks.forget()
        torch.autograd.grad(net(x).sum(), [net[0].weight, net[2].weight])
        assert list(hooks.pending()) == ["0", "2"]


def test_the_output_projection_of_attention_cannot_be_followed():
    net = nn.MultiheadAttention(4, 2)
    assert followable_layers(net) == []
    with pytest.raises(InputError, match="'out_proj' is part of a MultiheadAttention"):
        ColumnHooks(net, ["out_proj"])


def test_input_overwritten_before_pop_is_refused():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)  # autograd itself does not need the input then
    x = torch.ones(4, 3)
    with ColumnHooks(layer, [""]) as hooks:
        loss = layer(x).sum()
        x.zero_()
        loss.backward()
        with pytest.raises(InputError, match="overwritten in place"):
            hooks.pop()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["fc9"], "no layer 'fc9'; the model's Linear and Conv2d layers: conv, fc"),
        (["norm"], "'norm' is a BatchNorm2d, not a Linear or Conv2d; .*: conv, fc"),
        (["grouped"], r"'grouped' is a grouped convolution \(groups=2\).*: conv, fc"),
        (["fc", "fc"], "'fc' is named twice"),
        ([], "no layer is named; .*: conv, fc"),
    ],
)
def test_bad_layer_names_are_refused_and_the_candidates_listed(layers, message):
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 2, 3),
            "norm": nn.BatchNorm2d(2),
            "grouped": nn.Conv2d(2, 2, 3, groups=2),
            "fc": nn.Linear(2, 2),
        }
    )
    with pytest.raises(InputError, match=message) as caught:
        ColumnHooks(net, layers)
    assert "\n" not in str(caught.value)
    assert followable_layers(net) == ["conv", "fc"]
    assert not net["fc"]._forward_hooks
