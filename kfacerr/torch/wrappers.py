"""The model inside what wraps it: names, and so checkpoints, are those of the model itself."""

from typing import cast

from torch import nn

__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel, DataParallel and torch.compile call, hooks and all."""
    while True:
        parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        inner = model.module if parallel else model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = cast(nn.Module, inner)
