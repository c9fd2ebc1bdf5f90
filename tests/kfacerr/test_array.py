"""`norm` is the Frobenius norm, to a few eps, over all of the dtype's range."""

import numpy as np
import pytest

from kfacerr.array import norm

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
