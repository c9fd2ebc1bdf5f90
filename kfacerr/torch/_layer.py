"""A layer as the optimizers hold it: its gradient and its step as matrices (d_G, d_A), eq. (20)."""

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from ..stream import Columns
from ._direction import Product
from ._micro_batches import MicroBatch, micro_batch
from ._scaling import ScaleProbe, probe
from .columns import is_transposed, weight_from_matrix, weight_matrix
from .follower import Capture
from .linear import FactoredParameter, formed, has_gradient, held, spend

__all__ = ["Layer"]


class Layer:
    """A layer that an optimizer preconditions.

    Args:
        name: as in `model.named_modules()`.
        module: the layer.
        mine: the optimizer's parameters, a container that it keeps up to date.
        shared: parameters that belong to several modules: a bias among them is no part of the layer.

    Attributes:
        name, module: as given.
        parts: what the micro-batches of the coming step left.
        loss_scale: in gradients that are held as factors.
    """

    def __init__(self, name: str, module: nn.Module, mine: Container[Tensor], shared: Container[Tensor]) -> None:
        self.name = name
        self.module = module
        self._mine = mine
        self._shared = shared
        self.parts: list[MicroBatch] = []
        self.loss_scale = 1.0

    # ---------------------------------------------------------------------------------------- parameters

    @property
    def weight(self) -> nn.Parameter:
        """The weight; there must be one, see `is_optimized`."""
        return self.module._parameters["weight"]  # type: ignore[return-value]

    @property
    def is_optimized(self) -> bool:
        """Whether its weight is a parameter of the optimizer: it may have been replaced, or pruned, meanwhile."""
        weight = self.module._parameters.get("weight")
        return weight is not None and weight in self._mine

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if the optimizer has it and no other layer has."""
        bias = self.module._parameters.get("bias")
        return bias if bias is not None and bias in self._mine and bias not in self._shared else None

    @property
    def with_bias(self) -> bool:
        """Whether the bias is a column of Mat(g)."""
        return self.bias is not None and self.bias.requires_grad

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if it is a column of Mat(g)."""
        return [self.weight, self.bias] if self.with_bias and self.bias is not None else [self.weight]

    @property
    def width(self) -> int:
        """d_A without the bias."""
        return weight_matrix(self.module, self.weight).shape[1]

    @property
    def dimensions(self) -> tuple[int, int]:
        """d_A, d_G."""
        return self.width + self.with_bias, weight_matrix(self.module, self.weight).shape[0]

    # ------------------------------------------------------------------------------------------- columns

    def collect(self, captures: Iterable[Capture]) -> None:
        """Forms the columns of captures, and releases these; of none if the weight is not optimized any more."""
        for capture in captures if self.is_optimized else ():
            part = micro_batch(capture, self.loss_scale)
            if self.module.bias is not None and not self.with_bias:
                A, G = part.columns
                part = part._replace(columns=Columns(A[:-1], G))  # a bias that is not trained is no row of Mat(g)
            self.parts.append(part)
            capture.release()

    def discard(self) -> None:
        """Drops the columns. Gradients stay until they are cleared, but are not taken for the next step's."""
        self.parts.clear()
        if self.is_optimized:
            spend(self.parameters)

    # ------------------------------------------------------------------------------------------- gradient

    @property
    def has_gradient(self) -> bool:
        return self.is_optimized and has_gradient(self.weight)

    def form(self) -> None:
        """Forms what is held of the gradient, unscaled."""
        for p in self.parameters:
            if isinstance(p, FactoredParameter):
                p.form(self.loss_scale)

    def gradient(self) -> Tensor:
        """Mat(g) (d_G, d_A) in at least float32: the weight's gradient and, as a last column, the bias's."""
        self.form()
        assert self.weight.grad is not None
        J = weight_matrix(self.module, self.weight.grad)
        J = J.to(torch.promote_types(J.dtype, torch.float32))
        if not self.with_bias:
            return J
        bias = None if self.bias is None else self.bias.grad
        column = J.new_zeros(J.shape[0], 1) if bias is None else bias.to(J.dtype)[:, None]
        return torch.cat([J, column], dim=1)

    def split(self, S: Tensor | Product) -> dict[nn.Parameter, Tensor | Product]:
        """A step S (d_G, d_A) by parameter; the weight's part of a product stays one."""
        width = self.width
        steps: dict[nn.Parameter, Tensor | Product]
        if isinstance(S, Product):
            part = S._replace(Q=S.Q[:width])
            steps = {self.weight: part.transposed() if is_transposed(self.module) else part}
        else:
            steps = {self.weight: weight_from_matrix(self.module, S[:, :width])}
        if self.with_bias and self.bias is not None and has_gradient(self.bias):
            steps[self.bias] = S.P @ S.Q[width] if isinstance(S, Product) else S[:, width]
        return steps

    # ------------------------------------------------------------------------------------------ the scale

    def scale_probe(self, processes: int = 1) -> ScaleProbe:
        """`.grad v` and this process's share of `G A^T v`, v a fixed vector; neither forms anything."""
        precision = torch.promote_types(self.weight.dtype, torch.float32)
        v = probe(self.dimensions[0], self.weight.new_zeros((), dtype=precision))
        want = v.new_zeros(self.dimensions[1])
        for part in self.parts:
            want = want + part.columns.G.to(v.dtype) @ (part.columns.A.to(v.dtype).T @ v) / processes
        half = any(part.dtype in (torch.float16, torch.bfloat16) for part in self.parts)
        return ScaleProbe(self.times(v), want, half)

    def times(self, v: Tensor) -> Tensor:
        """Mat(g) v (d_G,) for v (d_A,)."""
        total = self._times(self.weight, v[: self.width])
        if self.with_bias and self.bias is not None:
            total = total + self._times(self.bias, v[-1])
        return total

    def _times(self, p: nn.Parameter, v: Tensor) -> Tensor:
        """A parameter's gradient times v (d_in,), or the scalar v for a bias."""
        there = formed(p)
        total = v.new_zeros(self.dimensions[1])
        if there is not None:
            total = there.to(v.dtype) * v if v.ndim == 0 else weight_matrix(self.module, there).to(v.dtype) @ v
        for share in held(p):
            total = total + share.times(v) / self.loss_scale
        return total
