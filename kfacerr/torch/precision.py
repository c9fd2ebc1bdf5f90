"""Full precision for the work on factors, whatever precision the model trains in."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["full_precision"]


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """TF32 and autocast off: they would spoil second moments."""
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
            yield
    finally:
        for backend, value in zip(backends, saved, strict=True):
            setattr(backend, setting, value)
