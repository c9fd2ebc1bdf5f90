"""Frequent Directions: 0 <= M - M~ <= mu I, mu small where the spectrum decays, mu usable as a level."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.algorithms import Algorithm
from kfacerr.ea import EAFactor
from kfacerr.exceptions import InputError
from kfacerr.frequent_directions import FrequentDirections
from kfacerr.inverse import damped_inverse
from kfacerr.process import Settings
from kfacerr.processes import Brand
from kfacerr.stream import Step, Window
from kfacerr.study import ErrorStudy
from tests.conftest import Backend
from tests.strategies import rhos, stream, streams

NUMPY = Backend("numpy", np)


def run(process, columns, rho, xp):
    factor, M = EAFactor(rho), None
    for k, X in enumerate(columns):
        process.begin(k, factor)
        factor.update(xp.array(X))
        process.update(k, xp.array(X), factor)
        G = X.astype(float) @ X.astype(float).T
        M = G if M is None else rho * M + (1 - rho) * G
        low = process.estimate.lowrank
        U, D = xp.numpy(low.U), xp.numpy(low.D)
        yield M, (U * D) @ U.T, float(process.estimate.level), process


def naive(columns, rho, r):
    """Sketchy's recursion, dense: the estimate before each shrinkage, and the escaped mass."""
    F, mass = np.zeros((len(columns[0]),) * 2), 0.0
    for k, X in enumerate(columns):
        w, V = np.linalg.eigh(F)
        shift = w[-r - 1] if r < len(w) and k else 0.0
        F = (V * np.maximum(w - shift, 0)) @ V.T
        mass = rho * (mass + shift)
        F = (rho if k else 1.0) * F + (1 - rho if k else 1.0) * X @ X.T
        yield F, mass


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(columns=streams(), rho=rhos, r=st.integers(1, 6))
def test_the_guarantee(dtype, columns, rho, r, xp):
    """0 <= M - M~ <= mu I, also as M~ + mu I >= M, and mu <= tail_j/(r + 1 - j) for all j <= r."""
    columns = [X.astype(dtype) for X in columns]
    for M, estimate, mass, process in run(FrequentDirections(rank=r, rho=rho), columns, rho, xp):
        slack = float(process.certificate.rounding)
        w = np.linalg.eigvalsh(M - estimate)
        assert -slack <= w[0] and w[-1] <= mass + slack
        assert np.linalg.eigvalsh(estimate + mass * np.eye(len(M)) - M)[0] >= -slack
        values = np.linalg.eigvalsh(M)[::-1]
        for j in range(min(r, len(M)) + 1):
            assert mass <= values[j:].sum() / (r + 1 - j) + slack
        assert mass <= float(process.certificate.nuclear) / (r + 1) + slack


@given(columns=streams(kinds=("plain", "zero", "repeated", "huge")), rho=rhos, r=st.integers(1, 6))
def test_it_is_the_dense_recursion(xp, columns, rho, r):
    steps = zip(run(FrequentDirections(rank=r, rho=rho), columns, rho, xp), naive(columns, rho, r), strict=True)
    for (M, estimate, mass, _), (expected, escaped) in steps:
        assert np.linalg.norm(estimate - expected) <= 1e-11 * np.linalg.norm(M)
        assert abs(mass - escaped) <= 1e-11 * np.linalg.norm(M)


def test_a_mode_near_rounding_is_not_dropped_beyond_what_is_certified(xp):
    """At 50 roundings of the largest it is more than the certificate allows for: it is a mode."""
    small = (50 * float(np.finfo(np.float32).eps)) ** 0.5
    columns = [np.diag([1, small]).astype(np.float32) for _ in range(2)]
    for M, estimate, mass, process in run(FrequentDirections(rank=1, rho=0.3), columns, 0.3, xp):
        assert np.linalg.eigvalsh(M - estimate)[-1] <= mass + float(process.certificate.rounding)


def test_the_mass_is_attained():
    """One direction after another: what is shrunk off is missing in all of them alike."""
    columns = [np.eye(3)]
    *_, last = run(FrequentDirections(rank=2, rho=0.5), [*columns, np.zeros((3, 1))], 0.5, NUMPY)
    M, estimate, mass, _ = last
    assert mass == pytest.approx(0.5) and np.linalg.eigvalsh(M - estimate) == pytest.approx(0.5)


def test_a_stream_of_rank_at_most_r_loses_nothing():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((20, 4)))[0]
    columns = [Q @ rng.standard_normal((4, 3)) for _ in range(30)]
    for M, estimate, mass, _ in run(FrequentDirections(rank=4, rho=0.9), columns, 0.9, NUMPY):
        assert mass <= 1e-14 * np.trace(M) and np.linalg.norm(M - estimate) <= 1e-12 * np.linalg.norm(M)


def test_the_escaped_continuation_inverts_the_corrected_estimate(xp):
    columns = stream(np.random.default_rng(1), d=14, n=2, steps=8, decay="slow decay")
    *_, (M, estimate, mass, process) = run(FrequentDirections(rank=4, rho=0.9), columns, 0.9, xp)
    held = process.estimate
    inverse = damped_inverse(held.lowrank, phi=0.1, continuation="escaped", trace=held.trace, level=held.level)
    lam = 0.1 * float(held.lowrank.lambda_max)
    expected = np.linalg.inv(estimate + (mass + lam) * np.eye(14))
    assert xp.numpy(inverse.dense()) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    R = np.linalg.inv(M + lam * np.eye(14))
    assert np.linalg.eigvalsh(R - expected)[0] >= -1e-12, "its steps are never too long: M~ + mu I >= M"
    with pytest.raises(InputError, match="escaped mass"):
        damped_inverse(held.lowrank, phi=0.1, continuation="escaped")


def test_the_error_study_takes_it_by_name():
    columns = stream(np.random.default_rng(1), d=14, n=2, steps=8, decay="slow decay")
    for kind in ("escaped", "trace", "min"):
        study = ErrorStudy(("FD", "FD rank=6"), Settings(rank=3, continuation=kind), [Window(4, 4, 0)])
        rows = [row for k, X in enumerate(columns) for row in study.push(Step(k, X, X))]
        assert len(rows) == 2 * 4 * 4 and all(np.isfinite(row.value) for row in rows)


def test_a_saved_one_goes_on_alike():
    columns = stream(np.random.default_rng(1), d=14, n=2, steps=8, decay="slow decay")
    whole, resumed = (Algorithm.parse("FD").process(Settings(rank=3), "A") for _ in range(2))
    resumed.load_state_dict(whole.state_dict())  # before the first columns
    for k, X in enumerate(columns):
        if k == 4:
            resumed.load_state_dict(pickle.loads(pickle.dumps(whole.state_dict())))
        whole.update(k, X, None)
        if k >= 4:
            resumed.update(k, X, None)
    assert whole.estimate.level == resumed.estimate.level > 0
    assert np.array_equal(whole.estimate.lowrank.dense(), resumed.estimate.lowrank.dense())


def test_it_is_linear_in_d():
    assert FrequentDirections.needs_factor is False and issubclass(FrequentDirections, Brand)
