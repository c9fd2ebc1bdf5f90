"""The one place that tells NumPy, CuPy and torch apart.

Everything else is written against the Python array API standard (array-api-compat). Here stand the few things
outside the standard that the K-factor algorithms need; each has a plain fallback for any other namespace.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import array_api_compat as compat
import numpy as np
import scipy.linalg

from .exceptions import InputError
from .stream import Array

__all__ = [
    "add_to_diagonal",
    "check_columns",
    "check_power",
    "check_square",
    "cholesky_inverse",
    "device_array",
    "eigh_descending",
    "eps",
    "failures",
    "is_finite",
    "map_arrays",
    "namespace",
    "norm",
    "normal",
    "product_into",
    "rank_k_update",
    "scaled",
    "square_sum",
    "to_dtype",
    "to_numpy",
    "upper_factor",
]


_ROWS = 256  # of a block
_LARGE = 2048  # dimension from which on a product by blocks is faster than one


def namespace(*arrays: Array) -> Any:
    """The arrays' common array namespace; refuses mixed backends, devices and dtypes."""
    try:
        xp = compat.array_namespace(*arrays)
    except TypeError:
        xp = None
    if xp is None or not all(map(compat.is_array_api_obj, arrays)):  # array_namespace takes numbers for neutral
        kinds = ", ".join(type(a).__module__.split(".")[0] + "." + type(a).__name__ for a in arrays)
        raise InputError(f"arrays of one backend are needed, got {kinds}")
    first, *others = arrays
    if any(a.dtype != first.dtype for a in others):
        raise InputError(f"arrays of one dtype are needed, got {_listed(a.dtype for a in arrays)}")
    if any(compat.device(a) != compat.device(first) for a in others):
        raise InputError(f"arrays on one device are needed, got {_listed(map(compat.device, arrays))}")
    return xp


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def to_numpy(array: Array) -> np.ndarray:
    """A NumPy copy or view on the host."""
    if isinstance(array, np.ndarray):
        return array
    if compat.is_torch_array(array):
        return array.detach().cpu().numpy()
    if compat.is_cupy_array(array):
        return array.get()
    return np.asarray(array)


def device_array(values: Any, like: Array) -> Array:
    """Host values as an array of `like`'s backend, device and dtype (integers keep an integer dtype)."""
    xp = compat.array_namespace(like)
    host = np.asarray(values)
    if np.issubdtype(host.dtype, np.integer):
        return xp.asarray(host, device=compat.device(like))
    return xp.asarray(host, dtype=like.dtype, device=compat.device(like))


def eps(array: Array) -> float:
    """Unit round-off of the array's dtype."""
    return float(compat.array_namespace(array).finfo(array.dtype).eps)


BLOCK = 2**18
"""Entries of a matrix that `square_sum` takes at once: they stay in the cache, and no temporary has its size."""


def blocks(X: Array) -> list[Array]:
    """A matrix by blocks of rows, of `BLOCK` entries at most; a vector as it is."""
    total, rows = X.shape[0], max(1, BLOCK // max(1, X.shape[-1]))
    if X.ndim == 1 or total <= rows:
        return [X]
    return [X[a : min(a + rows, total), :] for a in range(0, total, rows)]


def square_sum(X: Array) -> Array:
    """||X||_F^2 of a vector or a matrix, a 0-d array, where no square leaves the dtype's range.

    It is added pairwise. (On the CPU torch adds the squares of its own float32 norm one after the other: 1e-3 of
    the square of a 4096 x 4096 matrix is lost.)
    """
    xp = compat.array_namespace(X)
    sums = [xp.sum(part * part) for part in blocks(X)]
    return sums[0] if len(sums) == 1 else xp.sum(xp.stack(sums))


def norm(X: Array) -> Array:
    """||X||_F of a vector or a matrix, a 0-d array: to a few eps, wherever in the dtype's range X lies.

    NaN and Inf pass through. A host's array is summed as it is, and anew where the sum says that squares may have
    overflowed, or vanished. No device is asked: there it is always done anew.
    """
    xp = compat.array_namespace(X)
    if X.shape[0] == 0 or X.shape[-1] == 0:
        return xp.zeros((), dtype=X.dtype, device=compat.device(X))
    if on_host(X):
        with np.errstate(over="ignore"):
            total = square_sum(X)
        limits = xp.finfo(X.dtype)
        # Of squares below the smallest normal number this much is lost at most.
        if math.prod(X.shape) * limits.smallest_normal <= limits.eps * float(total) < float("inf"):
            return xp.sqrt(total)
    parts = blocks(X)
    if len(parts) > 1:
        return norm(xp.stack([_scaled_norm(part) for part in parts]))
    return _scaled_norm(X)


def _scaled_norm(X: Array) -> Array:
    """`norm` by the squares of X over its largest entry; on a host over the power of two below, which is exact."""
    xp = compat.array_namespace(X)
    largest = xp.max(xp.abs(X))
    one = xp.ones_like(largest)
    unit = one * 2.0 ** (math.frexp(float(largest))[1] - 1) if on_host(X) else largest
    unit = xp.where((largest > 0) & (largest < float("inf")), unit, one)
    Y = X / unit
    return unit * xp.sqrt(xp.sum(Y * Y))


def on_host(X: Array) -> bool:
    """Whether the host can look at X without waiting for a device."""
    return isinstance(X, np.ndarray) or (compat.is_torch_array(X) and X.device.type == "cpu")


def upper_factor(X: Array) -> Array:
    """R (min(m, n), n) of X = Q R, X (m, n), without Q: half the work of a QR."""
    if isinstance(X, np.ndarray):
        return np.linalg.qr(X, mode="r")
    if compat.is_torch_array(X):
        import torch

        return torch.linalg.qr(X, mode="r").R
    if compat.is_cupy_array(X):
        import cupy

        return cupy.linalg.qr(X, mode="r")
    return compat.array_namespace(X).linalg.qr(X)[1]


def check_columns(X: Array, d: int | None = None, what: str = "columns") -> None:
    """Refuses what is not a real floating (d, n) matrix. Costs no device synchronisation."""
    if not compat.is_array_api_obj(X):
        raise InputError(f"{what}: an array is needed, got {type(X).__name__}")
    xp = compat.array_namespace(X)
    if X.ndim != 2:
        raise InputError(f"{what}: a matrix (d, n) is needed, got shape {tuple(X.shape)}")
    if X.dtype not in (xp.float32, xp.float64):
        raise InputError(f"{what}: float32 or float64 is needed, got {X.dtype}")
    if d is not None and X.shape[0] != d:
        raise InputError(f"{what}: {d} rows are needed, got shape {tuple(X.shape)}")


def check_power(power: float) -> None:
    """Refuses a power p of (M + lam I)^-p that is not in (0, 1]."""
    if not 0 < power <= 1:
        raise InputError(f"power must lie in (0, 1], got {power}")


def check_square(M: Array, what: str) -> None:
    """Refuses what is no real floating (d, d) matrix, d >= 1, or has NaN or Inf. Waits for the device."""
    check_columns(M, what=what)
    if M.shape[0] != M.shape[1] or M.shape[0] == 0:
        raise InputError(f"{what}: a square matrix is needed, got shape {tuple(M.shape)}")
    if not is_finite(M):
        raise InputError(f"{what}: NaN or Inf (in the columns, or by overflow of {M.dtype})")


def is_finite(X: Array) -> bool:
    """Whether X has neither NaN nor Inf. Waits for the device."""
    xp = compat.array_namespace(X)
    if 0 in X.shape:
        return True
    return bool(xp.isfinite(xp.max(X)) & xp.isfinite(xp.min(X)))  # NaN passes through both, at one pass each


def to_dtype(X: Array, dtype: Any) -> Array:
    """A floating array in another dtype; others stay as they are."""
    xp = compat.array_namespace(X)
    return xp.astype(X, dtype) if xp.isdtype(X.dtype, "real floating") else X


def map_arrays(state: Any, change: Callable[[Array], Array]) -> Any:
    """A copy of nested dicts with every array changed."""
    if isinstance(state, dict):
        return {key: map_arrays(value, change) for key, value in state.items()}
    return change(state) if compat.is_array_api_obj(state) else state


def scaled(X: Array, unit: float) -> Array:
    """unit X, for a power of two; in two steps, as a unit itself may leave the range of float32."""
    if unit == 1.0:
        return X
    half = 2.0 ** (math.frexp(unit)[1] // 2)
    return (X * half) * (unit / half)


def failures() -> tuple[type[Exception], ...]:
    """What a decomposition that fails may raise: InputError, and the errors of the backends at hand."""
    torch = sys.modules.get("torch")
    own = () if torch is None else (torch.linalg.LinAlgError,)
    return (InputError, np.linalg.LinAlgError, *own)


def normal(rng: np.random.Generator, shape: tuple[int, ...], like: Array) -> Array:
    """Standard normal draws beside `like`.

    Host arrays all get NumPy's draws, so one seed means one result on every CPU backend; on a GPU the device
    draws, seeded from `rng`, since moving d x r numbers would cost more than the product they are drawn for.
    """
    if compat.is_torch_array(like) and like.device.type != "cpu":
        import torch

        generator = torch.Generator(device=like.device).manual_seed(int(rng.integers(2**62)))
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    if compat.is_cupy_array(like):
        import cupy

        with like.device:
            draws = cupy.random.Generator(cupy.random.Philox4x3210(int(rng.integers(2**62))))
            return draws.standard_normal(shape, dtype=like.dtype)
    return device_array(rng.standard_normal(shape), like)


def eigh_descending(K: Array, what: str = "matrix") -> tuple[Array, Array]:
    """EVD of a symmetric matrix, eigenvalues descending.

    Args:
        K: (m, m), symmetric.
        what: what an error calls it.

    Returns:
        Eigenvalues (m,) and orthonormal columns (m, m) in K's dtype.

    Raises:
        InputError: K has NaN or Inf entries (its columns had, or overflowed), or the EVD has.
    """
    xp = compat.array_namespace(K)
    check_square(K, what)
    w, V = xp.linalg.eigh(K)
    if not (is_finite(w) and is_finite(V)):
        raise InputError(f"{what}: the EVD in {K.dtype} gave NaN or Inf")
    return xp.flip(w, axis=0), xp.flip(V, axis=1)


def add_to_diagonal(M: Array, value: Array) -> None:
    """M + value I, written into M (d, d), contiguous by rows; `value` is a 0-d array."""
    xp = compat.array_namespace(M)
    xp.reshape(M, (-1,), copy=False)[:: M.shape[0] + 1] += value


def cholesky_inverse(M: Array, *, overwrite: bool = False) -> Array:
    """Inverse (d, d) of a symmetric positive definite matrix through its Cholesky factor: d^3 flops.

    `overwrite` lets it take M's place, where M is contiguous: NumPy and torch then need no other (d, d) array.
    """
    # M is symmetric: its rows are the columns that LAPACK works on.
    if isinstance(M, np.ndarray):
        (potrf, potri) = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (M,))
        inverse, info = potrf(M.T, lower=True, overwrite_a=overwrite)
        if info == 0:
            inverse, info = potri(inverse, lower=True, overwrite_c=True)
        _check_definite(info)
        return _mirrored(inverse.T)
    if compat.is_torch_array(M):
        import torch

        columns = (M.contiguous() if overwrite else M.clone(memory_format=torch.contiguous_format)).mT
        status = torch.empty((), dtype=torch.int32, device=M.device)
        torch.linalg.cholesky_ex(columns, out=(columns, status))
        _check_definite(int(status))
        return torch.cholesky_inverse(columns, out=columns).mT
    xp = compat.array_namespace(M)
    return xp.linalg.inv(M)


def _check_definite(info: int) -> None:
    if info != 0:
        raise InputError("matrix is not positive definite: the damping is too small or M has NaN")


def _mirrored(M: np.ndarray) -> np.ndarray:
    """M with what stands above its diagonal written below it, in place."""
    step = 128
    for a in range(0, len(M), step):
        b = min(a + step, len(M))
        M[b:, a:b] = M[a:b, b:].T
        square = M[a:b, a:b]
        square[...] = np.triu(square) + np.triu(square, 1).T
    return M


def product_into(out: Array, start: int, P: Array, Q: Array) -> None:
    """Writes P Q into the columns of `out` from `start` on, without a temporary where the backend can."""
    stop = start + Q.shape[1]
    if isinstance(out, np.ndarray):
        np.matmul(P, Q, out=out[:, start:stop])
    elif compat.is_torch_array(out):
        out[:, start:stop].addmm_(P, Q, beta=0)
    else:
        out[:, start:stop] = P @ Q


def rank_k_update(M: Array, X: Array, *, alpha: float, beta: float) -> Array:
    """beta M + alpha X X^T for a symmetric M (d, d), written into M where the backend can."""
    if compat.is_torch_array(M):
        if M.device.type == "cpu" and M.shape[0] >= _LARGE:
            return _lower_then_upper(M, X, alpha, beta)
        return M.addmm_(X, X.T, beta=beta, alpha=alpha)
    M *= beta
    M += (alpha * X) @ X.T
    return M


def _lower_then_upper(M: Array, X: Array, alpha: float, beta: float) -> Array:
    """`rank_k_update` by blocks of rows up to the diagonal, mirrored: half the flops."""
    for a in range(0, M.shape[0], _ROWS):
        b = min(a + _ROWS, M.shape[0])
        M[a:b, :b].mul_(beta).add_(X[a:b] @ X[:b].T, alpha=alpha)
        M[:a, a:b] = M[a:b, :a].T
    return M
