"""The columns `(A_k, G_k)` of a layer from its input and the gradient of its output, eq. (20).

**Scaling.** With b the batch size and a loss that is averaged over the batch, column i of A is
`[a_i; 1]/sqrt(b)` and column i of G is `sqrt(b) dLoss/do_i`, so that eq. (20), `Mat(g) = G A^T`, holds
exactly: `G A^T = [weight_matrix(layer, weight.grad), bias.grad]`. Further dimensions of a Linear's input (a
sequence) and the spatial positions T of a convolution are extra columns, n = b |T|, as in Grosse & Martens (2016),
"A Kronecker-factored approximate Fisher matrix for convolution layers". Their factors are
`Omega = E[sum_t a_t a_t^T]` and `Gamma = (1/|T|) E[sum_t ds_t ds_t^T]`, E the mean over the batch and ds the
gradient of one sample's own loss. Here `A A^T = Omega` and `G G^T = |T| Gamma`. Damping by a share of the
largest eigenvalue scales with the factor, so the constant |T| only divides the inverse of G by |T|: no
relative error, and no angle, sees it.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..exceptions import InputError
from ..stream import Columns

__all__ = [
    "batch_size",
    "conv1d_columns",
    "conv2d_columns",
    "is_linear",
    "is_transposed",
    "layer_columns",
    "linear_columns",
    "weight_from_matrix",
    "weight_matrix",
]


def linear_columns(layer: nn.Module, x: Tensor, grad: Tensor) -> Columns:
    """The columns of a fully connected layer; see the module docstring for the scaling.

    Args:
        layer: the layer; only whether it has a bias is used.
        x: its input (b, ..., d_in); the first dimension is the batch, the others are positions.
        grad: dLoss/do (b, ..., d_out), o the layer's output and the loss averaged over the batch.

    Returns:
        A (d_in + bias, n) and G (d_out, n), n = b times the number of positions, in float32, or float64 if
        either input is.
    """
    a, g = x.reshape(-1, x.shape[-1]).T, grad.reshape(-1, grad.shape[-1]).T
    return _scaled(a, g, batch_size(layer, x), layer.bias is not None)


def conv2d_columns(layer: nn.Conv2d, x: Tensor, grad: Tensor) -> Columns:
    """The columns of a 2-D convolution (Grosse & Martens 2016, §3); scaling in the module docstring.

    Args:
        layer: the layer, with groups = 1; kernel, stride, padding (numbers, "same" or "valid"), padding mode
            and dilation are honoured.
        x: its input (b, c_in, h, w) or, unbatched, (c_in, h, w).
        grad: dLoss/do (b, c_out, h', w'), o the layer's output and the loss averaged over the batch.

    Returns:
        A (c_in * kh * kw + bias, n), its rows in the order of `layer.weight.flatten(1)`, and G (c_out, n),
        n = b h' w' with the positions of one image side by side; float32, or float64 if either input is.
    """
    return _conv_columns(layer, x, grad)


def conv1d_columns(layer: nn.Conv1d, x: Tensor, grad: Tensor) -> Columns:
    """The columns of a 1-D convolution: those of a 2-D one on images of height 1.

    Args:
        layer: the layer, with groups = 1.
        x: its input (b, c_in, l) or, unbatched, (c_in, l).
        grad: dLoss/do (b, c_out, l'), o the layer's output and the loss averaged over the batch.

    Returns:
        A (c_in * k + bias, n) and G (c_out, n), n = b l'; float32, or float64 if either input is.
    """
    return _conv_columns(layer, x, grad)


def layer_columns(layer: nn.Module, x: Tensor, grad: Tensor) -> Columns:
    """The columns of a layer of any kind that is followed.

    Args:
        layer: a Linear, Conv1d, Conv2d, or the Conv1D of transformers.
        x: its input.
        grad: dLoss/do, of the shape of its output.

    Returns:
        A (d_A, n) and G (d_G, n), as the function of its kind gives them.

    Raises:
        InputError: for a layer of another kind.
    """
    if is_linear(layer):
        return linear_columns(layer, x, grad)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return _conv_columns(layer, x, grad)
    raise InputError(f"columns are defined for Linear, Conv1d and Conv2d, not for {type(layer).__name__}")


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is fully connected: `nn.Linear`, or the Conv1D of transformers."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D (of GPT-2): a Linear whose weight is (d_in, d_out)."""
    if type(layer).__name__ != "Conv1D":
        return False
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    return isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.ndim == 2


def weight_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight, its gradient or its step as the matrix (d_G, d_in) of (20); a view where there is one."""
    return weight.T if is_transposed(layer) else weight.reshape(weight.shape[0], -1)


def weight_from_matrix(layer: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of `weight_matrix`."""
    return matrix.T if is_transposed(layer) else matrix.reshape(cast(Tensor, layer.weight).shape)


def batch_size(layer: nn.Module, x: Tensor) -> int:
    """b, the samples of an input; one without a batch dimension is a batch of one."""
    unbatched = len(layer.kernel_size) + 1 if isinstance(layer, nn.Conv1d | nn.Conv2d) else 1
    return x.shape[0] if x.ndim > unbatched else 1


def _conv_columns(layer: nn.Conv1d | nn.Conv2d, x: Tensor, grad: Tensor) -> Columns:
    dimensions = len(layer.kernel_size)
    if x.ndim == dimensions + 1:
        x, grad = x.unsqueeze(0), grad.unsqueeze(0)
    # im2col has no half-precision kernel everywhere, so the cast comes first.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x.to(_common_dtype(x, grad)), _pad_widths(layer), mode=mode)
    above = (1,) * (2 - dimensions)  # a sequence is an image of height 1
    kernel, dilation, stride = (above + size for size in (layer.kernel_size, layer.dilation, layer.stride))
    patches = F.unfold(x.unsqueeze(2) if above else x, kernel, dilation, 0, stride)
    a = patches.transpose(0, 1).flatten(1)  # (b, c kh kw, T) -> (c kh kw, b T)
    g = grad.transpose(0, 1).flatten(1)  # (b, c_out, h', w') -> (c_out, b T)
    return _scaled(a, g, x.shape[0], layer.bias is not None)


def _scaled(a: Tensor, g: Tensor, batch: int, bias: bool) -> Columns:
    """[a; 1]/sqrt(b) and sqrt(b) g from a (d_in, n) and g (d_out, n), in the common dtype, by rows in memory."""
    dtype = _common_dtype(a, g)
    scale = math.sqrt(max(batch, 1))  # an empty batch has no columns to scale
    A, G = a.new_empty((a.shape[0] + bias, a.shape[1]), dtype=dtype), g.new_empty(g.shape, dtype=dtype)
    torch.div(a.to(dtype), scale, out=A[: a.shape[0]])
    A[a.shape[0] :] = 1 / scale
    return Columns(A, torch.mul(g.to(dtype), scale, out=G))


def _common_dtype(x: Tensor, grad: Tensor) -> torch.dtype:
    """float64 if either is; otherwise float32, for bf16 would spoil the second moments."""
    return torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)


def _pad_widths(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """The padding as `F.pad` takes it: before and after, the last dimension first."""
    if layer.padding == "same":
        # The odd one of the d (k - 1) zeros is at the end.
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    elif layer.padding == "valid":
        pairs = [(0, 0)] * len(layer.kernel_size)
    else:
        pairs = [(width, width) for width in cast(tuple[int, ...], layer.padding)]
    return [width for pair in reversed(pairs) for width in pair]
