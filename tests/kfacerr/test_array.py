"""What stands outside the array API standard: norms, rank-k updates and Cholesky inverses in their place."""

import numpy as np
import pytest

from kfacerr import array
from kfacerr.array import add_to_diagonal, cholesky_inverse, norm, rank_k_update, to_numpy, upper_factor
from tests.strategies import psd

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@DTYPES
@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 1), (700, 900), (3, 300_000)])
def test_the_norm_is_the_frobenius_norm(xp, dtype, shape):
    X = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    rel = 8 * float(np.finfo(dtype).eps)
    assert float(norm(xp.array(X))) == pytest.approx(np.linalg.norm(X.astype(float)), rel=rel)


@DTYPES
def test_no_square_leaves_the_range(xp, dtype):
    """Near both ends of the dtype: 2^e X has 2^e the norm, to the last bit."""
    X = np.array([[3.0, 4.0], [12.0, 84.0]], dtype=dtype)
    most = int(np.log2(np.finfo(dtype).max)) - 8
    length = float(norm(xp.array(X)))
    assert length == pytest.approx(np.sqrt(9 + 16 + 144 + 7056), rel=1e-6)
    for exponent in (-most, -most // 2, most // 2, most):
        assert float(norm(xp.array(np.ldexp(X, exponent)))) == np.ldexp(length, exponent)


def test_the_norm_of_many_equal_entries_is_accurate(fast_xp):
    """Added one after the other in float32 the squares would lose 6e-4."""
    assert float(norm(fast_xp.array(np.full((4096, 4096), 0.1, np.float32)))) == pytest.approx(409.6, rel=1e-6)


def test_nothing_has_no_length_and_nan_and_inf_pass_through(xp):
    for shape in ((0,), (0, 3), (3, 0)):
        assert float(norm(xp.array(np.zeros(shape)))) == 0
    assert float(norm(xp.array(np.zeros((3, 2))))) == 0
    assert np.isnan(float(norm(xp.array([1.0, np.nan]))))
    assert float(norm(xp.array([1.0, -np.inf]))) == np.inf


@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_a_norm_of_many_float32_numbers_has_float32s_accuracy(fast_xp, kind):
    """Where torch's own adds one square after the other: 4% (normal) or 12% (equal numbers) off at 16384^2."""
    rng = np.random.default_rng(0)
    X = (
        rng.standard_normal((3000, 3000), np.float32)
        if kind == "normal"
        else np.full((3000, 3000), 0.1, np.float32)
    )
    assert float(norm(fast_xp.array(X))) == pytest.approx(np.linalg.norm(X.astype(np.float64)), rel=1e-6)


@pytest.mark.parametrize("d", [1, 5, 256, 300, 513])
@pytest.mark.parametrize("blocked", [False, True])
def test_a_rank_k_update_is_the_sum_by_blocks_or_whole(fast_xp, monkeypatch, d, blocked):
    monkeypatch.setattr(array, "_LARGE", 1 if blocked else 4096)
    rng = np.random.default_rng(d)
    M, X = psd(rng, "slow decay", d), rng.standard_normal((d, 7))
    expected = 0.9 * M + 0.1 * X @ X.T
    got = fast_xp.numpy(rank_k_update(fast_xp.array(M), fast_xp.array(X), alpha=0.1, beta=0.9))
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14)


def test_a_multiple_of_the_identity_is_added_in_place(xp):
    M = xp.array(np.ones((4, 4)))
    add_to_diagonal(M, xp.array(2.0))
    assert np.array_equal(xp.numpy(M), 1 + 2 * np.eye(4))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_cholesky_inverse_is_symmetric_and_takes_its_place_only_where_it_may(fast_xp, overwrite):
    M = psd(np.random.default_rng(1), "slow decay", 300)
    given = fast_xp.array(M)
    inverse = fast_xp.numpy(cholesky_inverse(given, overwrite=overwrite))
    assert np.abs(inverse @ M - np.eye(300)).max() <= 1e-11
    assert np.array_equal(inverse, inverse.T)
    assert np.array_equal(fast_xp.numpy(given), inverse if overwrite else M)


@DTYPES
@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4), (1, 1)])
def test_the_upper_factor_has_the_same_products(xp, dtype, shape):
    X = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    R = to_numpy(upper_factor(xp.array(X)))
    assert R.shape == (min(shape), shape[1]) and (np.tril(R, -1) == 0).all()
    np.testing.assert_allclose(R.T @ R, X.T @ X, atol=50 * np.finfo(dtype).eps)
