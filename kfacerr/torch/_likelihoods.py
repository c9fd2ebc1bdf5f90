"""Labels drawn from the model, for the Fisher of (2): E over y ~ p(y|x) and not over the data's labels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LIKELIHOODS"]


def _categorical(output: Tensor, generator: torch.Generator) -> Tensor:
    """Labels from the softmax over dimension 1, and their cross entropy."""
    with torch.no_grad():
        p = torch.softmax(output.movedim(1, -1), dim=-1)
        labels = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])
    return F.cross_entropy(output, labels)


def _gaussian(output: Tensor, generator: torch.Generator) -> Tensor:
    """Targets at unit variance around the output; -log p up to its constant, summed over features."""
    noise = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
    return 0.5 * (output - (output.detach() + noise)).square().sum() / output.shape[0]


LIKELIHOODS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "categorical": _categorical,
    "gaussian": _gaussian,
}
