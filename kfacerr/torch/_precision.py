"""Full precision for the work on factors, whatever precision the model trains in."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["full_precision", "rounding"]


def rounding(module: torch.nn.Module, dtype: torch.dtype, device_type: str, products: float = 0.0) -> float:
    """The unit round-off of a layer's products in the backward, for gradients of `dtype`.

    Args:
        module: the layer.
        dtype: of the gradients.
        device_type: of the layer.
        products: what `full_precision` gave, of matrix products.

    Returns:
        u.
    """
    unit = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return unit
    if isinstance(module, torch.nn.Conv2d):  # cuDNN's default is TF32; Winograd's loses five bits
        return _TF32 if device_type == "cuda" else 32 * unit
    return max(unit, products)


_TF32, _BF16 = 2.0**-10, 2.0**-7


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[float]:
    """TF32 and autocast off: they would spoil second moments. Gives the round-off of float32 products outside."""
    backends = [torch.backends.cuda.matmul]
    if hasattr(torch.backends.mkldnn, "matmul"):
        backends.append(torch.backends.mkldnn.matmul)
    # torch 2.9 has one setting for all backends in place of allow_tf32; the two do not mix.
    setting, off = ("fp32_precision", "ieee") if hasattr(backends[0], "fp32_precision") else ("allow_tf32", False)
    backends = [backend for backend in backends if hasattr(backend, setting)]
    saved = [getattr(backend, setting) for backend in backends]
    for backend in backends:
        setattr(backend, setting, off)
    try:
        with torch.autocast(device_type, enabled=False):
            yield _BF16 if "bf16" in saved else _TF32 if {"tf32", True} & set(saved) else 0.0
    finally:
        for backend, value in zip(backends, saved, strict=True):
            setattr(backend, setting, value)
