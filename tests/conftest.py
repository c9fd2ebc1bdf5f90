"""Backends, Hypothesis profile and thread limits for the whole suite."""
# ruff: noqa: E402  (the thread limits must stand before NumPy loads)

import os

# A worker a core, and small matrices: more threads only get in each other's way. Read when BLAS and torch load.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from kfacerr.array import to_numpy

settings.register_profile("kfacerr", derandomize=True, deadline=None, max_examples=25)
# Other examples each time, and more; what fails is printed as a decorator that runs it again.
settings.register_profile("nightly", derandomize=False, deadline=None, max_examples=200, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "kfacerr"))


def examples(count: int) -> settings:
    """A decorator: so many examples where the suite's own profile draws 25, and as many more under another."""
    return settings(max_examples=count * settings().max_examples // 25)


@dataclass(frozen=True)
class Backend:
    """One array library on one device: takes NumPy data in and gives it back."""

    name: str
    namespace: Any
    device: Any = None

    def __repr__(self) -> str:
        return self.name

    def array(self, values: Any, dtype: Any = None) -> Any:
        host = np.array(values, dtype=dtype)
        if self.name == "cupy":
            return self.namespace.asarray(host)
        return self.namespace.asarray(host, device=self.device)

    @staticmethod
    def numpy(array: Any) -> np.ndarray:
        """Float64 on the host."""
        return np.asarray(to_numpy(array), dtype=np.float64)


def backend(name: str) -> Backend:
    match name:
        case "numpy":
            return Backend(name, np)
        case "array_api_strict":
            return Backend(name, pytest.importorskip("array_api_strict"))
        case "torch":
            return Backend(name, pytest.importorskip("torch"), "cpu")
        case "torch-cuda":
            torch = pytest.importorskip("torch")
            if not torch.cuda.is_available():
                pytest.skip("torch sees no CUDA device")
            return Backend(name, torch, "cuda")
        case _:
            cupy = pytest.importorskip("cupy")
            if not cupy.cuda.is_available():
                pytest.skip("CuPy sees no CUDA device")
            return Backend(name, cupy)


BACKENDS = [
    "numpy",
    "torch",
    "array_api_strict",
    pytest.param("torch-cuda", marks=pytest.mark.gpu),
    pytest.param("cupy", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="session", params=BACKENDS)
def xp(request: pytest.FixtureRequest) -> Backend:
    """Every array backend at hand; those that are not are skipped."""
    return backend(request.param)


@pytest.fixture(scope="session", params=["numpy", "torch"])
def fast_xp(request: pytest.FixtureRequest) -> Backend:
    """The two CPU backends that compute fast, for long streams."""
    return backend(request.param)
