"""The columns of every kind of layer reproduce autograd's own gradient, eq. (20)."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from kfacerr.exceptions import InputError
from kfacerr.torch import ColumnHooks
from kfacerr.torch.columns import conv2d_columns, layer_columns, linear_columns, weight_matrix
from tests.conftest import examples

FAST = examples(40)


class Conv1D(nn.Module):
    """What transformers calls so: a Linear whose weight is (d_in, d_out)."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view(*x.size()[:-1], self.nf)


def gradient(layer: nn.Module) -> Tensor:
    """Mat(g): the weight's gradient and the bias's as a last column."""
    parts = [weight_matrix(layer, layer.weight.grad)]
    if layer.bias is not None:
        parts.append(layer.bias.grad[:, None])
    return torch.cat(parts, dim=1)


def assert_reproduces(layer: nn.Module, columns, rtol: float = 1e-12) -> None:
    expected = gradient(layer)
    error = (columns.G @ columns.A.T - expected).norm()
    assert error <= rtol * expected.norm()
    assert expected.norm() > 0


def columns_of(layer: nn.Module, x: Tensor):
    """Those of one backward, and the layer's output."""
    with ColumnHooks(layer, [""]) as hooks:
        out = layer(x)
        (out * torch.randn_like(out)).sum().backward()
        return hooks.pop()[""], out


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
    columns, _ = columns_of(layer, x)
    n = x[..., 0].numel()
    assert columns.A.shape == (d_in + bias, n)
    assert columns.G.shape == (d_out, n)
    assert_reproduces(layer, columns)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@FAST
@given(data=st.data())
@pytest.mark.parametrize("dimensions", [1, 2])
def test_columns_reproduce_autograd_gradient_of_convolutions(dimensions, data):
    def sizes(least: int, most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(least, most), min_size=dimensions, max_size=dimensions)))

    kernel, dilation = sizes(1, 3), sizes(1, 3)
    padding = data.draw(st.sampled_from([sizes(0, 2), "same", "valid"]))
    stride = (1,) * dimensions if padding == "same" else sizes(1, 3)
    bias = data.draw(st.booleans())
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    b, c_in, c_out = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    lengths = sizes(4, 8)
    padded = padding if isinstance(padding, tuple) else (0,) * dimensions
    assume(
        all(size + 2 * p > d * (k - 1) for size, p, d, k in zip(lengths, padded, dilation, kernel, strict=True))
    )
    torch.manual_seed(0)
    kind = nn.Conv1d if dimensions == 1 else nn.Conv2d
    layer = kind(
        c_in, c_out, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias, padding_mode=mode
    ).double()
    columns, out = columns_of(layer, torch.randn(b, c_in, *lengths, dtype=torch.float64))
    n = b * out[0, 0].numel()
    assert columns.A.shape == (layer.weight[0].numel() + bias, n)
    assert columns.G.shape == (c_out, n)
    assert_reproduces(layer, columns)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_a_linear_layer_with_a_transposed_weight_is_one_like_others(shape):
    torch.manual_seed(0)
    layer = Conv1D(2, 3).double()
    columns, _ = columns_of(layer, torch.randn(shape, dtype=torch.float64))
    assert columns.A.shape[0] == 4 and columns.G.shape[0] == 2
    assert_reproduces(layer, columns)


def test_unbatched_inputs_are_a_batch_of_one():
    torch.manual_seed(0)
    layers = ((nn.Linear(3, 2), (3,)), (nn.Conv2d(2, 3, 2), (2, 4, 4)), (nn.Conv1d(2, 3, 2), (2, 4)))
    for layer, shape in layers:
        columns, _ = columns_of(layer, torch.randn(shape))
        assert_reproduces(layer, columns, rtol=1e-5)
        assert torch.equal(columns.A[-1], torch.ones(columns.A.shape[1]))


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


def test_layers_of_another_kind_have_no_columns():
    with pytest.raises(InputError, match="not for LayerNorm"):
        layer_columns(nn.LayerNorm(3), torch.ones(2, 3), torch.ones(2, 3))
