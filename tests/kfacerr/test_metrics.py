"""The four errors of §4.2 are accurate however small they are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr import metrics
from kfacerr.inverse import DenseInverse, damped_inverse
from kfacerr.lowrank import LowRank
from kfacerr.metrics import angle_error, inverse_error, norm_error, step_coordinates
from tests import reference
from tests.strategies import generators, orthogonal, psd, spectrum

SIZES = st.sampled_from([10.0**-e for e in range(13)])


@given(rng=generators, size=SIZES)
def test_relative_errors_are_accurate_down_to_1e_12(xp, rng, size):
    X = rng.standard_normal((7, 9))
    Y = X + size * rng.standard_normal((7, 9))
    expected = reference.relative_error(Y, X)
    assert norm_error(xp.array(Y), xp.array(X)) == pytest.approx(expected, rel=1e-12)
    X, Y = np.pad(X, ((0, 2), (0, 0))), np.pad(Y, ((0, 2), (0, 0)))
    got = inverse_error(DenseInverse(xp.array(Y)), DenseInverse(xp.array(X)))
    assert got == pytest.approx(expected, rel=1e-12)


@given(rng=generators, size=SIZES)
def test_the_angle_error_of_a_known_angle_is_accurate(xp, rng, size):
    """Two unit vectors at an angle theta, 1 - cos theta = 2 sin^2(theta/2), down to 1e-24."""
    Q = orthogonal(rng, 12)[:, :2]
    theta = size
    S, T = Q[:, 0], np.cos(theta) * Q[:, 0] + np.sin(theta) * Q[:, 1]
    got = angle_error(xp.array(7 * T.reshape(3, 4)), xp.array(S.reshape(3, 4)))
    # the vectors carry a relative error of eps, which is eps/theta of the angle
    assert got == pytest.approx(2 * np.sin(theta / 2) ** 2, rel=1e-12 + 40 * np.finfo(float).eps / theta)


@given(rng=generators)
def test_the_angle_error_is_one_minus_the_cosine(xp, rng):
    S, T = rng.standard_normal((2, 4, 5))
    assert angle_error(xp.array(S), xp.array(T)) == pytest.approx(reference.angle_error(S, T), rel=1e-13)
    assert angle_error(xp.array(-3 * T), xp.array(T)) == pytest.approx(2, rel=1e-14)
    assert angle_error(xp.array(3 * T), xp.array(T)) <= 1e-31


def test_steps_that_vanish_have_defined_errors(xp):
    zero, one = xp.array(np.zeros((2, 3))), xp.array(np.ones((2, 3)))
    assert norm_error(zero, zero) == angle_error(zero, zero) == 0
    assert norm_error(zero, one) == angle_error(zero, one) == angle_error(one, zero) == 1
    assert norm_error(one, zero) == float("inf")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("scale", [-100, -70, 0, 70, 100])  # powers of 2: no digit changes
def test_no_scale_changes_an_error(xp, dtype, scale):
    rng = np.random.default_rng(6)
    R = psd(rng, "slow decay", 6) + 0.1 * np.eye(6)
    Y = R + 1e-3 * np.ones((6, 6))
    R, Y = R.astype(dtype), Y.astype(dtype)
    big, bigger = (xp.array(np.ldexp(X, scale), dtype) for X in (R, Y))
    R, Y = xp.array(R, dtype), xp.array(Y, dtype)
    assert inverse_error(DenseInverse(bigger), DenseInverse(big)) == inverse_error(
        DenseInverse(Y), DenseInverse(R)
    )
    assert norm_error(bigger, big) == norm_error(Y, R)
    assert angle_error(bigger, big) == pytest.approx(angle_error(Y, R), rel=1e-5)


@pytest.mark.parametrize("m", [2, 9])  # rows anew at every block, or the dense inverse kept
@pytest.mark.parametrize("block", [1, 3, 4, 11, 12, 100])
def test_row_blocks_give_the_unblocked_error(xp, monkeypatch, m, block):
    rng = np.random.default_rng(4)
    d = 12
    low = LowRank(xp.array(orthogonal(rng, d)[:, :m]), xp.array(spectrum("fast decay", m)))
    inverse = damped_inverse(low, phi=0.1, continuation="min")
    R = np.linalg.inv(psd(rng, "slow decay", d) + 0.1 * np.eye(d))
    expected = reference.relative_error(xp.numpy(inverse.dense()), R)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert inverse_error(inverse, DenseInverse(xp.array(R))) == pytest.approx(expected, rel=1e-12)


def test_no_error_is_zero_to_rounding(xp):
    rng = np.random.default_rng(5)
    U, D = orthogonal(rng, 10), spectrum("slow decay", 10)
    inverse = damped_inverse(LowRank(xp.array(U), xp.array(D)), phi=0.1)
    exact = (U / (D + 0.1)) @ U.T
    assert inverse_error(inverse, DenseInverse(xp.array(exact))) <= 1e-14


@pytest.mark.parametrize(("dtype", "accuracy"), [(np.float64, 1e-12), (np.float32, 2e-6)])
@given(rng=generators, size=st.sampled_from([1.0, 0.1, 1e-3]), d_G=st.sampled_from([5, 6, 7, 40]))
def test_steps_compared_by_their_coordinates_have_the_errors_of_the_plain_formula(
    xp, dtype, accuracy, rng, size, d_G
):
    """Accurate as the formed steps are: to the round-off of S itself, not of the difference."""
    n, d_A = 3, 50
    P_ref, Q_ref = rng.standard_normal((d_G, n)), rng.standard_normal((d_A, n))
    P, Q = P_ref + size * rng.standard_normal((d_G, n)), Q_ref - size * rng.standard_normal((d_A, n))
    S, S_ref = step_coordinates(*(xp.array(X, dtype) for X in (P, Q, P_ref, Q_ref)))
    assert tuple(S.shape) == tuple(S_ref.shape) == (d_A, min(d_G, 2 * n))
    plain = P @ Q.T, P_ref @ Q_ref.T
    assert norm_error(S, S_ref) == pytest.approx(reference.relative_error(*plain), rel=accuracy, abs=accuracy)
    assert angle_error(S, S_ref) == pytest.approx(reference.angle_error(*plain), rel=accuracy, abs=accuracy)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_steps_that_are_the_same_are_so_in_coordinates(xp, scale):
    rng = np.random.default_rng(0)
    P, Q = (xp.array(scale * rng.standard_normal((30, 4)), np.float32) for _ in range(2))
    S, S_ref = step_coordinates(P, Q, P, Q)
    assert norm_error(S, S_ref) == angle_error(S, S_ref) == 0


@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_the_errors_of_large_float32_arrays_have_float32s_accuracy(fast_xp, kind):
    """A norm that adds one square after the other loses 1e-2 here, in torch, where they are equal."""
    d = 4096
    R = np.random.default_rng(0).standard_normal((d, d), np.float32) if kind == "normal" else np.full((d, d), 0.1)
    R, Y = (fast_xp.array(X, np.float32) for X in (R + R.T, 2 * (R + R.T)))
    assert norm_error(Y, R) == pytest.approx(1, rel=1e-6)
    assert angle_error(-Y, R) == pytest.approx(2, rel=1e-6)
    assert inverse_error(DenseInverse(Y), DenseInverse(R)) == pytest.approx(1, rel=1e-6)
