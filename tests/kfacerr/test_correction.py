"""Algorithm 6: what a correction puts right, and what it does not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.brand import symmetric_brand
from kfacerr.correction import correct
from kfacerr.lowrank import LowRank
from tests import reference
from tests.strategies import SPECTRA, factorisations, generators, orthogonal, psd, spectrum

EPS = np.finfo(float).eps


@st.composite
def cases(draw):
    """(U, D, M, idx): a representation, any p.s.d. factor, and chosen columns."""
    d = draw(st.integers(1, 14))
    m = draw(st.integers(1, d))
    U, D = draw(factorisations(d, m))
    M = psd(draw(generators), draw(st.sampled_from(SPECTRA)), d)
    idx = draw(generators).choice(m, size=draw(st.integers(0, m)), replace=False)
    return U, D, M, idx


@given(case=cases())
def test_the_projected_error_vanishes_on_the_chosen_subspace(xp, case):
    U, D, M, idx = case
    low = correct(LowRank(xp.array(U), xp.array(D)), xp.array(M), idx)
    E = M - xp.numpy(low.dense())
    US = U[:, idx]
    assert np.abs(US.T @ E @ US).max(initial=0) <= 32 * len(M) * EPS
    new = xp.numpy(low.D)
    assert low.m == len(D) and (np.diff(new) <= 0).all() and (new >= 0).all()
    V = xp.numpy(low.U)
    assert np.abs(V.T @ V - np.eye(low.m)).max() <= 32 * len(M) * EPS


@given(case=cases())
def test_it_is_algorithm_6_with_line_7_read_as_a_rotation(xp, case):
    U, D, M, idx = case
    low = correct(LowRank(xp.array(U), xp.array(D)), xp.array(M), idx)
    expected = reference.dense(reference.correct(U, D, M, idx))
    assert np.linalg.norm(xp.numpy(low.dense()) - expected) <= 32 * len(M) * EPS


@given(case=cases())
def test_the_frobenius_error_never_grows(xp, case):
    """Footnote 11: the part of the error that is removed is orthogonal to all the rest."""
    U, D, M, idx = case
    low = correct(LowRank(xp.array(U), xp.array(D)), xp.array(M), idx)
    before, after = M - (U * D) @ U.T, M - xp.numpy(low.dense())
    removed = U[:, idx].T @ before @ U[:, idx]
    expected = np.linalg.norm(before) ** 2 - np.linalg.norm(removed) ** 2
    slack = 32 * len(M) * EPS
    assert np.linalg.norm(after) <= np.linalg.norm(before) + slack
    assert abs(np.linalg.norm(after) ** 2 - expected) <= slack * (1 + np.linalg.norm(before) ** 2)


@given(rng=generators, count=st.integers(0, 7))
def test_the_unformed_representation_is_corrected_alike(xp, rng, count):
    d, r, n = 16, 4, 3
    A = rng.standard_normal((d, n))
    X = LowRank(xp.array(orthogonal(rng, d)[:, :r]), xp.array(spectrum("fast decay", r)))
    product = symmetric_brand(X, xp.array(A))
    formed = LowRank(product.U, product.D)
    M = xp.array(psd(rng, "slow decay", d))
    idx = rng.choice(r + n, size=count, replace=False)
    one, other = correct(product, M, idx), correct(formed, M, idx)
    assert np.linalg.norm(xp.numpy(one.dense()) - xp.numpy(other.dense())) <= 1e-11


@given(rng=generators, decay=st.sampled_from(SPECTRA))
def test_absent_modes_stay_absent(xp, rng, decay):
    """Columns in the span add none, and what an EVD leaves of them at rounding must not be taken for modes."""
    d, m, absent = 24, 10, 6
    low = symmetric_brand(None, xp.array(np.repeat(rng.standard_normal((d, m)), 2, axis=1)[:, : m + absent]))
    present = int(low.modes)
    assert present <= m < low.m
    after = correct(low, xp.array(psd(rng, decay, d)), rng.permutation(low.m))
    assert int(after.modes) <= present


def test_after_a_correction_the_error_need_not_be_psd():
    """Design §4: M >= X before the correction, not after. So it may overestimate, and Prop. 3.2 stops holding."""
    M = np.array([[2.0, 1.0], [1.0, 1.0]])
    X = LowRank(np.eye(2), np.array([0.5, 0.25]))
    assert np.linalg.eigvalsh(M - X.dense())[0] > 0
    after = correct(X, M, np.array([0]))
    assert np.linalg.eigvalsh(M - after.dense())[0] < -0.3


def test_correcting_all_columns_of_a_full_basis_gives_the_factor():
    M = psd(np.random.default_rng(0), "slow decay", 9)
    after = correct(LowRank(np.eye(9), np.zeros(9)), M, np.arange(9))
    np.testing.assert_allclose(after.dense(), M, atol=32 * 9 * EPS)
