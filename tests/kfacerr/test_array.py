"""What stands outside the array API standard: sums, rank-k updates and Cholesky inverses in their place."""

import numpy as np
import pytest

from kfacerr import array
from kfacerr.array import add_to_diagonal, cholesky_inverse, rank_k_update, sum_of_squares
from tests.strategies import psd


@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_a_sum_of_squares_of_many_float32_numbers_has_float32s_accuracy(fast_xp, kind):
    """Where the square of a norm is 4% (normal) or 12% (equal numbers) off, in torch, at 16384^2 of them."""
    rng = np.random.default_rng(0)
    X = (
        rng.standard_normal((3000, 3000), np.float32)
        if kind == "normal"
        else np.full((3000, 3000), 0.1, np.float32)
    )
    assert float(sum_of_squares(fast_xp.array(X))) == pytest.approx(np.sum(X.astype(np.float64) ** 2), rel=1e-6)


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
