"""Each process is the paper's recursion, on its schedule, and resumes bitwise."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.ea import EAFactor
from kfacerr.exceptions import InputError
from kfacerr.inverse import continuation_level
from kfacerr.process import Clock, Process
from kfacerr.processes import Brand, BrandCorrected, BrandRsvd, Evd, Periodic, Rsvd
from tests import reference
from tests.strategies import generators, rhos, stream, streams


def run(process, columns, rho, xp, steps=None):
    """Feeds a stream by the protocol; yields (k, M, estimate) after every step."""
    factor = EAFactor(rho)
    for k, X in zip(steps or range(len(columns)), columns, strict=True):
        X = xp.array(X)
        process.begin(k, factor)
        factor.update(X)
        process.update(k, X, factor)
        yield k, xp.numpy(factor.M), process.estimate


def relative(estimate, expected, xp) -> float:
    return np.linalg.norm(xp.numpy(estimate.lowrank.dense()) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(columns=streams(steps=st.integers(1, 8)), rho=rhos)
def test_the_ea_factor_is_its_explicit_sum(xp, dtype, columns, rho):
    factor = EAFactor(rho)
    for X in columns:
        factor.update(xp.array(X, dtype))
    expected = reference.ea_factor([X.astype(dtype).astype(float) for X in columns], rho)
    slack = 32 * (len(columns) + columns[0].shape[1]) * float(np.finfo(dtype).eps) * np.linalg.norm(expected)
    assert np.linalg.norm(xp.numpy(factor.M) - expected) <= slack
    assert abs(float(factor.trace) - np.trace(expected)) <= slack * len(expected)


@given(columns=streams(), rho=rhos, r=st.integers(1, 6))
def test_bkfac_is_process_10(xp, columns, rho, r):
    expected = reference.bkfac(columns, rho, r)
    d, n = columns[0].shape
    traces = []
    for (k, M, estimate), M_B in zip(run(Brand(rank=r, rho=rho), columns, rho, xp), expected, strict=True):
        assert relative(estimate, M_B, xp) <= 1e-10
        assert estimate.lowrank.m <= min(d, max(n, min(r, d) + n))
        assert float(estimate.trace) == pytest.approx(np.trace(M), rel=1e-12)
        E = M - xp.numpy(estimate.lowrank.dense())  # only underestimates (§3.4)
        assert np.linalg.eigvalsh(E)[0] >= -64 * d * np.finfo(float).eps * np.linalg.norm(M)
        traces.append(k)
    assert traces == list(range(len(columns)))


@given(columns=streams(kinds=("plain", "zero", "repeated", "huge")), rho=rhos, r=st.integers(1, 6))
def test_rkfac_is_process_9_at_its_update_and_stale_after(xp, columns, rho, r):
    held = None
    for k, _, estimate in run(Rsvd(rank=r, oversampling=10**6, T_inv=3), columns, rho, xp):
        if k % 3 == 0:
            held = reference.rkfac(columns[: k + 1], rho, r)
            trace = np.trace(reference.ea_factor(columns[: k + 1], rho))
        assert relative(estimate, held, xp) <= 1e-10
        assert float(estimate.trace) == pytest.approx(trace, rel=1e-12)


@given(columns=streams(), rho=rhos)
def test_kfac_is_the_exact_factor_at_its_update(xp, columns, rho):
    for k, M, estimate in run(Evd(T_inv=2), columns, rho, xp):
        if k % 2 == 0:
            held = M.copy()
        assert relative(estimate, held, xp) <= 1e-12
        assert estimate.lowrank.m == len(M)


@given(columns=streams(kinds=("plain", "zero", "repeated", "huge")), rho=rhos, r=st.integers(1, 6))
def test_brkfac_overwrites_b_of_the_factor_before_the_new_columns(xp, columns, rho, r):
    """Algorithm 5: at k = 0, 3, 6 B_{k-1} is the RSVD of M_{k-1}; then the Brand update with X_k (design §4)."""
    held = None
    for k, _, estimate in run(BrandRsvd(rank=r, oversampling=10**6, rho=rho, T_rsvd=3), columns, rho, xp):
        X = columns[k]
        if k == 0:
            held = X @ X.T
        else:
            B = reference.rkfac(columns[:k], rho, r) if k % 3 == 0 else reference.projected(held, r)
            held = rho * B + (1 - rho) * X @ X.T
        assert relative(estimate, held, xp) <= 1e-10


@given(columns=streams(kinds=("plain", "huge")), rho=rhos, r=st.integers(1, 6), seed=st.integers(0, 99))
def test_bkfacc_is_algorithm_6_on_the_brand_update(xp, columns, rho, r, seed):
    """The columns drawn are those of the same seed; n_crc = round(phi_crc r)."""
    process = BrandCorrected(rank=r, rho=rho, T_corct=2, phi_corct=0.5, rng=np.random.default_rng(seed))
    shadow, draws, factor = Brand(rank=r, rho=rho), np.random.default_rng(seed), EAFactor(rho)
    for k, X in enumerate(map(xp.array, columns)):
        shadow.estimate = process.estimate
        factor.update(X)
        process.update(k, X, factor)
        shadow.update(k, X, None)
        low = shadow.estimate.lowrank
        if k % 2:
            assert relative(process.estimate, xp.numpy(low.dense()), xp) == 0
            continue
        idx = draws.choice(low.m, size=min(round(0.5 * r), low.m), replace=False)
        M = xp.numpy(factor.M)
        pair = reference.correct(xp.numpy(low.U), xp.numpy(low.D), M, idx)
        error = np.linalg.norm(xp.numpy(process.estimate.lowrank.dense()) - reference.dense(pair))
        assert error <= 1e-10 * np.linalg.norm(M)


def test_a_stream_of_rank_at_most_r_is_followed_exactly(fast_xp):
    """Nothing is ever truncated: M_B,k = M_k."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((20, 4)))[0]
    columns = [Q @ rng.standard_normal((4, 3)) for _ in range(40)]
    for _, M, estimate in run(Brand(rank=4, rho=0.9), columns, 0.9, fast_xp):
        assert relative(estimate, M, fast_xp) <= 1e-12


@pytest.mark.parametrize(
    ("period", "steps", "due"),
    [
        (50, range(0, 120, 10), [0, 50, 100]),
        (25, range(0, 120, 10), [0, 30, 50, 80, 100]),  # T is no multiple of T_updt: none is skipped
        (5, range(0, 40, 10), [0, 10, 20, 30]),  # T < T_updt
        (300, range(0, 300, 10), [0]),
        (1, range(3), [0, 1, 2]),
    ],
)
def test_an_event_is_due_at_the_first_update_of_every_period(period, steps, due):
    clock = Clock(period)
    assert [k for k in steps if clock.due(k)] == due


def test_periods_count_from_a_restart():
    clock = Clock(50)
    assert [k for k in range(0, 100, 10) if clock.due(k)] == [0, 50]
    clock.restart(107)
    assert [k for k in range(110, 230, 10) if clock.due(k)] == [110, 160, 210]


def test_a_refresh_takes_the_heavy_update_and_the_clock_knows(xp):
    columns = stream(np.random.default_rng(1), d=8, n=2, steps=4)
    factor = EAFactor(0.9)
    for X in columns:
        factor.update(xp.array(X))
    for process in (
        Evd(T_inv=5),
        Rsvd(rank=3, oversampling=10**6, T_inv=5),
        BrandRsvd(rank=3, oversampling=10**6, rho=0.9, T_rsvd=5),
    ):
        process.restart(10)
        process.refresh(10, factor)
        r = 8 if isinstance(process, Evd) else 3
        held = reference.projected(xp.numpy(factor.M), r)
        assert relative(process.estimate, held, xp) <= 1e-12
        X = xp.array(columns[0])
        process.begin(12, factor)  # within the period: nothing is due
        later = EAFactor(0.9)
        later.load_state_dict({name: value + 0 for name, value in factor.state_dict().items()})
        later.update(X)
        process.update(12, X, later)
        if isinstance(process, BrandRsvd):
            held = 0.9 * held + 0.1 * columns[0] @ columns[0].T
        assert relative(process.estimate, held, xp) <= 1e-12


def _processes(seed):
    return {
        "Evd": Evd(T_inv=3),
        "Rsvd": Rsvd(rank=3, oversampling=2, n_pwr_it=1, seed=seed, T_inv=2),
        "SRE": Rsvd(rank=3, oversampling=2, n_pwr_it=1, sketch="sre", seed=seed, T_inv=2),
        "Brand": Brand(rank=3, rho=0.9),
        "BrandRsvd": BrandRsvd(rank=3, oversampling=2, n_pwr_it=1, seed=seed, rho=0.9, T_rsvd=3),
        "BrandCorrected": BrandCorrected(
            rank=3, rho=0.9, T_corct=2, phi_corct=0.5, rng=np.random.default_rng(seed)
        ),
    }


@pytest.mark.parametrize("name", list(_processes(0)))
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resumed_process_continues_bitwise(fast_xp, name, stop):
    columns = [fast_xp.array(X) for X in stream(np.random.default_rng(2), d=12, n=2, steps=9, decay="slow decay")]

    def feed(process, factor, start, end):
        for k in range(start, end):
            process.begin(k, factor)
            factor.update(columns[k])
            process.update(k, columns[k], factor)

    whole, factor = _processes(5)[name], EAFactor(0.9)
    feed(whole, factor, 0, stop)
    saved = pickle.loads(pickle.dumps((whole.state_dict(), factor.state_dict())))
    feed(whole, factor, stop, 9)

    resumed, fresh = _processes(77)[name], EAFactor(0.9)
    resumed.load_state_dict(copy.deepcopy(saved[0]))
    fresh.load_state_dict(saved[1])
    feed(resumed, fresh, stop, 9)
    for one, other in (
        (whole.estimate.lowrank.dense(), resumed.estimate.lowrank.dense()),
        (whole.estimate.lowrank.D, resumed.estimate.lowrank.D),
        (whole.estimate.trace, resumed.estimate.trace),
        (factor.M, fresh.M),
    ):
        assert np.array_equal(fast_xp.numpy(one), fast_xp.numpy(other))


def test_a_process_saved_before_its_first_update_can_be_loaded():
    for name, process in _processes(1).items():
        fresh = _processes(2)[name]
        fresh.load_state_dict(process.state_dict())
        assert fresh.estimate is None


def test_bad_settings_are_refused():
    for rho in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="rho"):
            EAFactor(rho)
        with pytest.raises(InputError, match="rho"):
            Brand(rank=3, rho=rho)
    with pytest.raises(InputError, match="rank"):
        Brand(rank=0, rho=0.9)
    with pytest.raises(InputError, match="T_inv"):
        Evd(T_inv=0)
    for phi in (0.0, 1.5):
        with pytest.raises(InputError, match="phi_corct"):
            BrandCorrected(rank=3, rho=0.9, T_corct=5, phi_corct=phi)


@given(rng=generators)
def test_columns_of_another_shape_or_dtype_are_refused(xp, rng):
    factor = EAFactor(0.9)
    factor.update(xp.array(rng.standard_normal((4, 2))))
    for bad in (np.ones((5, 2)), np.ones(4), np.ones((4, 2), dtype=np.float32)):
        with pytest.raises(InputError):
            factor.update(xp.array(bad))


@given(columns=streams(kinds=("plain", "huge")), rho=rhos, r=st.integers(1, 6), period=st.integers(1, 4))
def test_batches_between_brand_updates_are_dropped(xp, columns, rho, r, period):
    """The paper's schedule: the process (10) of every period-th batch, stale in between."""
    expected = reference.bkfac(columns[::period], rho, r)
    for k, _, estimate in run(Brand(rank=r, rho=rho, T_brand=period), columns, rho, xp):
        assert relative(estimate, expected[k // period], xp) <= 1e-10


@given(columns=streams(kinds=("plain", "huge")), rho=rhos, r=st.integers(1, 6), period=st.integers(1, 4))
def test_accumulated_batches_enter_with_the_weights_of_the_ea_factor(xp, columns, rho, r, period):
    held = columns[0] @ columns[0].T
    for k, M, estimate in run(Brand(rank=r, rho=rho, T_brand=period, accumulate=True), columns, rho, xp):
        if k and k % period == 0:
            held = rho**period * reference.projected(held, r)
            for j in range(period):
                X = columns[k - j]
                held = held + (1 - rho) * rho**j * X @ X.T
        assert relative(estimate, held, xp) <= 1e-10
        if k % period == 0:
            assert float(estimate.trace) == pytest.approx(np.trace(M), rel=1e-12)


@pytest.mark.parametrize("stop", [1, 2, 4, 6])
def test_waiting_columns_survive_a_resume(stop):
    columns = stream(np.random.default_rng(8), d=12, n=2, steps=9, decay="slow decay")
    whole = Brand(rank=3, rho=0.9, T_brand=4, accumulate=True)
    resumed = Brand(rank=3, rho=0.9, T_brand=4, accumulate=True)
    for k, X in enumerate(columns):
        if k == stop:
            resumed.load_state_dict(pickle.loads(pickle.dumps(whole.state_dict())))
        whole.update(k, X, None)
        if k >= stop:
            resumed.update(k, X, None)
    assert np.array_equal(whole.estimate.lowrank.dense(), resumed.estimate.lowrank.dense())
    assert float(whole.estimate.trace) == float(resumed.estimate.trace)


def test_a_clock_that_is_rescheduled_keeps_the_time_of_its_last_event():
    clock = Clock(10)
    assert [k for k in range(0, 30) if clock.due(k)] == [0, 10, 20]
    clock.reschedule(25)
    assert [k for k in range(30, 110) if clock.due(k)] == [30, 50, 75, 100]


@pytest.mark.parametrize("seed", [14, 69, 106])
@pytest.mark.parametrize("kinds", [("in span", "repeated", "in span"), ("zero", "in span"), ("repeated", "plain")])
def test_backends_agree_on_what_is_no_mode_of_bkfac_c(xp, seed, kinds):
    """One mode more or less moves the level of the trace continuation by 1e-4 of the largest eigenvalue."""
    columns = stream(np.random.default_rng(seed), d=24, n=6, steps=12, kinds=kinds, decay="clustered")
    one, other = (BrandCorrected(rank=16, rho=0.5, T_corct=5, rng=np.random.default_rng(1)) for _ in range(2))
    M, N = EAFactor(0.5), EAFactor(0.5)
    for k, X in enumerate(columns):
        for process, factor, Y in ((one, M, X), (other, N, xp.array(X))):
            factor.update(Y)
            process.update(k, Y, factor)
        tau, expected = (
            float(continuation_level(p.estimate.lowrank, "trace", p.estimate.trace)) for p in (other, one)
        )
        assert abs(tau - expected) <= 1e-12 * float(one.estimate.lowrank.lambda_max), k


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (Process, lambda process: process.cost(3, 1)),
        (Process, lambda process: process.update(0, np.ones((3, 1)), None)),
        (Process, lambda process: process.share(0, np.ones((3, 1)))),
        (Process, lambda process: process.take(0, {})),
        (Process, lambda process: process.refresh(0, EAFactor(0.9))),
        (Periodic, lambda process: process.decompose(np.eye(3))),
    ],
    ids=["cost", "update", "share", "take", "refresh", "decompose"],
)
def test_what_a_process_of_ones_own_lacks_is_named(kind, call, request):
    """The protocol is open to users: a part that is not there says whose it is."""
    mine = type("Mine", (kind,), {})()
    missing = request.node.callspec.id
    with pytest.raises(NotImplementedError, match="^Mine .*" + ("cost" if missing == "cost" else f"`{missing}`")):
        call(mine)
