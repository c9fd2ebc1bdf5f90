"""K-factors that exist already: where they stand in what other libraries save, and by which names.

`find_factors` walks nested mappings and lists, a file's or a state dict's, and knows these layouts:

    kronfluence      {"activation_covariance": {layer: sum}, "gradient_covariance": {layer: sum},
                      "num_activation_covariance_processed": {layer: count}, ...}: sums, of which it takes the mean
    bergson          {"activation_sharded": {layer: sum}, "gradient_sharded": {layer: sum},
                      "total_processed": count}
    curvlinops       {"input_covariances": {layer: A}, "gradient_covariances": {layer: G}}
    kfac-pytorch     {"layers": {layer: {"A": A, "G": G}}}
    laplace-torch    {"H": [[G, A], [G], ...]}, an entry a parameter
    SOAP             {"state": {parameter: {"GG": [L, R], "Q": [...]}}}
    Shampoo          {"state": {parameter: {"L": L, "R": R}}}, {"factor_matrices": {0: L, 1: R}} (Meta's),
                     {"pre_cond_0": L, "pre_cond_1": R} (pytorch-optimizer)

Flat names such as "fc1.A", "fc1/G", "L_fc1" are taken apart, and {"A": {layer: A}, "G": {layer: G}} is read too.
Where there is nothing of the kind, each square matrix with a non-negative diagonal is a factor. Side A belongs to
a layer's inputs and G to its outputs; L and R stand on the left and on the right of a gradient.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import array_api_compat as compat
import numpy as np

from .array import to_numpy

__all__ = ["EPS", "StoredArray", "StoredFactor", "find_factors", "stored", "stored_leaves"]

EPS = {name: float(np.finfo(name).eps) for name in ("float64", "float32", "float16")} | {"bfloat16": 2.0**-7}
"""Unit round-off of the dtypes that factors come in."""


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array that is read when it is asked for.

    Attributes:
        shape: of the array.
        dtype: that it is stored in: "float32", "bfloat16", "int64", ...
        read: gives it in NumPy, in float32 where NumPy does not know its dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def is_factor(self) -> bool:
        """Whether it is a square matrix of a floating dtype that we know."""
        return len(self.shape) == 2 and self.shape[0] == self.shape[1] > 0 and self.dtype in EPS


@dataclass(frozen=True, eq=False)
class StoredFactor:
    """A K-factor of a layer.

    Attributes:
        layer: its name; of an optimizer's state the parameter's.
        side: "A", "G", "L", "R", the number of the dimension, or "" if nothing says.
        array: (d, d).
        count: what to divide it by, None where a mean is stored; NaN where a count should be and is not.
        basis: (d, d) eigenvectors that are stored beside it, or None.
    """

    layer: str
    side: str
    array: StoredArray
    count: float | None = None
    basis: StoredArray | None = None


def stored(value: Any) -> Any:
    """Nested mappings and lists of arrays of any library as dicts with string keys, lists and `StoredArray`s.

    Args:
        value: a mapping, list, tuple, array, number, or `StoredArray`.

    Returns:
        The same tree; None for anything else.
    """
    if isinstance(value, Mapping):
        return {str(key): stored(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [stored(item) for item in value]
    if isinstance(value, StoredArray):
        return value
    if isinstance(value, bool | int | float | np.number):
        return StoredArray((), str(np.asarray(value).dtype), lambda: np.asarray(value))
    if not compat.is_array_api_obj(value):
        return None
    if compat.is_torch_array(value):
        return _of_torch(value)
    return StoredArray(tuple(value.shape), str(value.dtype).rpartition(".")[2], lambda: to_numpy(value))


def _of_torch(tensor: Any) -> StoredArray | None:
    if tensor.is_sparse or tensor.is_quantized or tensor.is_meta:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    known = (dtype in EPS and dtype != "bfloat16") or not tensor.is_floating_point()
    return StoredArray(tuple(tensor.shape), dtype, lambda: to_numpy(tensor if known else tensor.float()))


def stored_leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, StoredArray]]:
    """Every array of a tree with its name.

    Args:
        tree: as `stored` gives it.
        path: what its names begin with.

    Yields:
        Names, with dots between their parts, and arrays.
    """
    if isinstance(tree, StoredArray):
        yield ".".join(path), tree
    for key, child in _items(tree):
        yield from stored_leaves(child, (*path, key))


def _items(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    return [(str(i), child) for i, child in enumerate(node)] if isinstance(node, list) else []


def find_factors(tree: Any, name: str = "factor") -> list[StoredFactor]:
    """The K-factors of a tree.

    Args:
        tree: as `stored` gives it.
        name: the layer of a factor that has no name of its own.

    Returns:
        The factors in the order of the tree; those of one layer stand together.
    """
    found = list(_walk(tree, ())) or [
        StoredFactor(leaf, "", array) for leaf, array in stored_leaves(tree) if _looks_like_a_factor(array)
    ]
    layers = {factor.layer: [other for other in found if other.layer == factor.layer] for factor in found}
    return [
        StoredFactor(layer or name, factor.side, factor.array, factor.count, factor.basis)
        for layer, factors in layers.items()
        for factor in factors
    ]


def _looks_like_a_factor(array: StoredArray) -> bool:
    """A weight matrix may be square too, but hardly has a non-negative diagonal. NaN is left to be reported."""
    return array.is_factor and array.shape[0] > 1 and not bool((np.diagonal(array.read()) < 0).any())


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[StoredFactor]:
    if isinstance(node, dict):
        node = _taken_apart(node)
        for layout in _LAYOUTS:
            found = list(layout(node, path))
            if found:
                yield from found
                return
    for key, child in _items(node):
        yield from _walk(child, (*path, key))


_FLAT = re.compile(r"(?P<layer>.+)[._/](?P<side>A|G|L|R)|(?P<side_>A|G|L|R)[._/](?P<layer_>.+)")


def _taken_apart(node: dict[str, Any]) -> dict[str, Any]:
    """{"fc1.A": M, "G_fc1": N} as {"fc1": {"A": M, "G": N}}."""
    result: dict[str, Any] = {}
    for key, child in node.items():
        match = _FLAT.fullmatch(key) if isinstance(child, StoredArray) else None
        if match is None:
            result[key] = child
        elif isinstance(held := result.setdefault(match["layer"] or match["layer_"], {}), dict):
            held[match["side"] or match["side_"]] = child
    return result


_WRAPPERS = {"state", "layers", "optimizer", "shampoo"}
"""Keys on the way to a layer that are no part of its name."""


def _name(path: tuple[str, ...], *own: str) -> str:
    return ".".join([*(part for part in path if part not in _WRAPPERS), *own])


_TABLES = {
    "activation_covariance": (
        "A",
        ("num_activation_covariance_processed", "num_covariance_processed"),
        "activation_eigenvectors",
    ),
    "gradient_covariance": (
        "G",
        ("num_gradient_covariance_processed", "num_covariance_processed"),
        "gradient_eigenvectors",
    ),
    "activation_sharded": ("A", ("total_processed",), "eigen_activation_sharded"),
    "gradient_sharded": ("G", ("total_processed",), "eigen_gradient_sharded"),
    "input_covariances": ("A", (), ""),
    "gradient_covariances": ("G", (), ""),
    **{side: (side, (), "") for side in "AGLR"},
}
"""Mappings from layers to factors: their side, where their counts stand, and where their eigenvectors do."""


def _tables(node: dict[str, Any], path: tuple[str, ...]) -> Iterator[StoredFactor]:
    """kronfluence, bergson, curvlinops."""
    for key, (side, counts, bases) in _TABLES.items():
        for layer, array in _items(node.get(key)):
            if not _is_factor(array):
                continue
            held = next((node[name] for name in counts if name in node), None)
            stored_count = _number(held.get(layer) if isinstance(held, dict) else held)
            count = math.nan if counts and stored_count is None else stored_count
            basis = dict(_items(node.get(bases))).get(layer)
            yield StoredFactor(_name(path, layer), side, array, count, _same_shape(basis, array))


def _pairs(node: dict[str, Any], path: tuple[str, ...]) -> Iterator[StoredFactor]:
    """kfac-pytorch, Shampoo as the paper writes it."""
    sides = [side for side in "AG" if _is_factor(node.get(side))]
    if not sides and all(_is_factor(node.get(side)) for side in "LR"):
        sides = ["L", "R"]
    for side in sides:
        yield StoredFactor(_name(path), side, node[side])


def _numbered(node: dict[str, Any], path: tuple[str, ...]) -> Iterator[StoredFactor]:
    """SOAP, pytorch-optimizer's Shampoo, Meta's: a factor a dimension, left out where that is too large."""
    conditioners = {
        key.removeprefix("pre_cond_"): v for key, v in node.items() if re.fullmatch(r"pre_cond_\d+", key)
    }
    series = _items(node.get("GG")) or _items(node.get("factor_matrices")) or list(conditioners.items())
    bases = dict(_items(node.get("Q")))
    for number, array in series:
        if _is_factor(array):
            side = "LR"[int(number)] if len(series) <= 2 and number in ("0", "1") else number
            yield StoredFactor(_name(path), side, array, basis=_same_shape(bases.get(number), array))


def _of_parameters(node: dict[str, Any], path: tuple[str, ...]) -> Iterator[StoredFactor]:
    """laplace-torch: a list a parameter, of G alone or of G and A."""
    for number, factors in _items(node.get("H")):
        for side, array in zip("GA", factors if isinstance(factors, list) else (), strict=False):
            if _is_factor(array):
                yield StoredFactor(_name(path, number), side, array)


_LAYOUTS = (_tables, _pairs, _numbered, _of_parameters)


def _is_factor(value: Any) -> bool:
    return isinstance(value, StoredArray) and value.is_factor


def _same_shape(basis: Any, array: StoredArray) -> StoredArray | None:
    return basis if _is_factor(basis) and basis.shape == array.shape else None


def _number(value: Any) -> float | None:
    if not isinstance(value, StoredArray) or np.prod(value.shape) != 1:
        return None
    return float(value.read().reshape(()))
