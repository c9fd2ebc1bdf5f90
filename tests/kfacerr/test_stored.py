"""K-factors are found in every layout that the documentation names, with their sides, counts and eigenvectors."""

import numpy as np
import pytest

from kfacerr.stored import find_factors, stored, stored_leaves
from tests.strategies import psd

RNG = np.random.default_rng(0)
A, G = psd(RNG, "slow decay", 5), psd(RNG, "fast decay", 3)
Q = np.linalg.eigh(A)[1]

LAYOUTS = {
    "kronfluence": (
        {
            "activation_covariance": {"fc.1": 8 * A},
            "gradient_covariance": {"fc.1": 4 * G},
            "num_activation_covariance_processed": {"fc.1": np.array([8])},
            "num_gradient_covariance_processed": {"fc.1": np.array([4])},
            "activation_eigenvectors": {"fc.1": Q},
        },
        [("fc.1", "A", 8.0), ("fc.1", "G", 4.0)],
    ),
    "bergson": (
        {"activation_sharded": {"fc.1": A}, "gradient_sharded": {"fc.1": G}, "total_processed": np.array(7)},
        [("fc.1", "A", 7.0), ("fc.1", "G", 7.0)],
    ),
    "curvlinops": (
        {"A": {"input_covariances": {"0": A}, "gradient_covariances": {"0": G, "2": G}}},
        [("A.0", "A", None), ("A.0", "G", None), ("A.2", "G", None)],
    ),
    "kfac-pytorch": (
        {"steps": 3, "layers": {"layers.0": {"A": A, "G": G}, "new": {"A": None, "G": None}}},
        [("layers.0", "A", None), ("layers.0", "G", None)],
    ),
    "laplace-torch": (
        {"H": [[G, A], [G]], "mean": np.ones(15)},
        [("0", "G", None), ("0", "A", None), ("1", "G", None)],
    ),
    "SOAP": (
        {"state": {0: {"GG": [G, A], "Q": [None, Q]}, 1: {"GG": [[]]}, 2: {"GG": [[], A]}}},
        [("0", "L", None), ("0", "R", None), ("2", "R", None)],
    ),
    "a convolution under SOAP": ({"GG": [G, A, G, G]}, [("fc", side, None) for side in "0123"]),
    "Shampoo": ({"optimizer": {"state": {"w": {"L": G, "R": A}}}}, [("w", "L", None), ("w", "R", None)]),
    "Meta's Shampoo": (
        {"state": {"w": {"block_0": {"shampoo": {"factor_matrices": {0: G, 1: A}}}}}},
        [("w.block_0", "L", None), ("w.block_0", "R", None)],
    ),
    "pytorch-optimizer's Shampoo": (
        {"state": {0: {"pre_cond_0": G, "inv_pre_cond_0": G, "pre_cond_1": A}}},
        [("0", "L", None), ("0", "R", None)],
    ),
    "flat names": (
        {"fc.1.A": A, "fc.1.G": G, "x/A": A},
        [("fc.1", "A", None), ("fc.1", "G", None), ("x", "A", None)],
    ),
    "flat names, the side first": ({"A_0": A, "G_0": G}, [("0", "A", None), ("0", "G", None)]),
    "a mapping a side": ({"G": {"fc": G}, "A": {"fc": A}}, [("fc", "A", None), ("fc", "G", None)]),
    "one array": (A, [("fc", "", None)]),
    "arrays by name": ({"one": A, "two": G}, [("one", "", None), ("two", "", None)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_factors_of_a_layout_are_found(layout):
    tree, expected = LAYOUTS[layout]
    found = find_factors(stored(tree), "fc")
    assert [(factor.layer, factor.side, factor.count) for factor in found] == expected
    for factor in found:
        M = factor.array.read() / (factor.count if layout == "kronfluence" else 1)
        assert np.allclose(M, A if len(M) == 5 else G)


def test_eigenvectors_stand_beside_their_factor():
    for layout, side in (("kronfluence", "A"), ("SOAP", "R")):
        found = find_factors(stored(LAYOUTS[layout][0]))
        held = {factor.side: factor.basis for factor in found if factor.layer in ("fc.1", "0")}
        assert np.array_equal(held.pop(side).read(), Q) and list(held.values()) == [None]


def test_a_count_that_is_missing_is_told():
    (factor,) = find_factors(stored({"activation_covariance": {"fc": A}}))
    assert np.isnan(factor.count)


def test_a_square_weight_is_no_factor():
    weight = RNG.standard_normal((4, 4)) - 3 * np.eye(4)
    assert find_factors(stored({"weight": weight, "bias": np.ones(4), "scale": np.ones((1, 1))})) == []
    assert [f.layer for f in find_factors(stored({"weight": weight, "H": A}))] == ["H"]


def test_a_factor_with_nan_is_still_a_factor():
    broken = A.copy()
    broken[2, 2] = np.nan
    assert len(find_factors(stored({"M": broken}))) == 1


def test_integers_and_other_kinds_are_no_factors():
    tree = stored({"A": np.eye(3, dtype=int), "name": "fc", "none": None, "flag": True})
    assert find_factors(tree) == []
    assert [name for name, _ in stored_leaves(tree)] == ["A", "flag"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torch_tensors_are_read_in_every_precision(dtype):
    torch = pytest.importorskip("torch")
    M = torch.from_numpy(A).to(getattr(torch, dtype)).requires_grad_()
    (factor,) = find_factors(stored({"fc": {"A": M}}))
    assert factor.array.dtype == dtype
    assert np.array_equal(factor.array.read(), M.detach().double().numpy())


def test_sparse_tensors_are_left_out():
    torch = pytest.importorskip("torch")
    assert find_factors(stored({"A": torch.eye(3).to_sparse()})) == []
