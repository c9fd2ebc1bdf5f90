"""N-KFAC follows M exactly through its sketch, stays below it, and knows what it lacks; so does W-KFAC."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr import streaming
from kfacerr.algorithms import Algorithm
from kfacerr.certificate import Certificate
from kfacerr.ea import EAFactor
from kfacerr.factor import KFactor
from kfacerr.process import Settings
from kfacerr.sketching import nystrom_of, with_fresh
from kfacerr.streaming import StreamingNystrom
from kfacerr.warm import WarmNystrom
from tests import reference
from tests.strategies import psd, rhos, spectrum, stream, streams

EPS = np.finfo(float).eps


def follow(process, columns, rho, xp, every=1):
    """(M_k dense, process) after every update, by `KFactor`; so many iterations lie between two."""
    factor, M = KFactor("A", {"it": process}, rho), None
    for k, X in enumerate(columns):
        factor.push(every * k, xp.array(X))
        G = X.astype(float) @ X.astype(float).T * (factor.unit or 1.0) ** 2
        M = G if M is None else rho * M + (1 - rho) * G
        yield M, process


def dense(process, xp) -> np.ndarray:
    return xp.numpy(process.estimate.lowrank.dense())


def pinv_nystrom(M: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """M Omega (Omega^T M Omega)^+ Omega^T M, naively."""
    Y = M @ omega
    return Y @ np.linalg.pinv(omega.T @ Y, rcond=1e-12, hermitian=True) @ Y.T


@given(columns=streams(kinds=("plain", "zero", "repeated")), rho=rhos, s=st.integers(1, 6))
def test_the_sketch_is_that_of_m_itself(xp, columns, rho, s):
    """(8) is linear in M, so Y_k = M_k Omega and C_k = Omega^T M_k Omega hold exactly, whatever the stream."""
    for M, process in follow(StreamingNystrom(rank=1, rho=rho, s=s, T_base=0), columns, rho, xp):
        omega, Y, C, trace = (xp.numpy(part) for part in process._sketch)
        size = np.linalg.norm(M)
        assert np.linalg.norm(Y - M @ omega) <= 1e-12 * size
        assert np.linalg.norm(C - omega.T @ M @ omega) <= 1e-12 * size
        assert float(trace) == pytest.approx(np.trace(M), rel=1e-12)


@given(
    columns=streams(kinds=("plain", "zero", "repeated", "in span", "huge")), rho=rhos, T=st.sampled_from([0, 1, 3])
)
def test_the_estimate_never_exceeds_m_also_across_rebasings(xp, columns, rho, T):
    for M, process in follow(StreamingNystrom(rank=2, rho=rho, T_base=T), columns, rho, xp):
        E = M - dense(process, xp)
        slack = float(process.certificate.rounding) + 64 * len(M) * EPS * np.trace(M)
        assert np.linalg.eigvalsh(E)[0] >= -slack
        assert np.linalg.norm(E, "nuc") == pytest.approx(float(process.certificate.nuclear), abs=4 * slack)
        assert np.linalg.norm(E) <= float(process.certificate.frobenius) + slack


def test_without_a_rebasing_it_is_nystrom_of_m(fast_xp):
    columns = stream(np.random.default_rng(3), d=24, n=3, steps=20, decay="slow decay")
    for M, process in follow(StreamingNystrom(rank=4, rho=0.9, s=8, T_base=0), columns, 0.9, fast_xp):
        expected = pinv_nystrom(M, fast_xp.numpy(process._sketch.omega))
        assert np.linalg.norm(dense(process, fast_xp) - expected) <= 1e-8 * np.linalg.norm(M)


@pytest.mark.parametrize("s", [8, 40])
def test_with_as_many_columns_as_rows_it_is_exact(fast_xp, s):
    columns = stream(np.random.default_rng(4), d=8, n=2, steps=12, decay="slow decay")
    for M, process in follow(StreamingNystrom(rank=2, rho=0.9, s=s), columns, 0.9, fast_xp):
        assert np.linalg.norm(dense(process, fast_xp) - M) <= 1e-10 * np.linalg.norm(M)


def test_the_expected_error_is_within_its_bound():
    """E ||M - M~||_* <= (1 + r/(s - r - 1)) tail_r for every r < s - 1 (Tropp et al. 2017, Theorem 4.1).

    The mean of 400 draws; with errors in [0, tr M] Hoeffding's inequality gives a false alarm less than 1e-6.
    """
    d, s, draws = 40, 10, 400
    for kind in ("slow decay", "fast decay", "degenerate"):
        w = spectrum(kind, d)
        M = np.diag(w)
        rng = np.random.default_rng(0)
        lost = [np.trace(M) - np.trace(pinv_nystrom(M, rng.standard_normal((d, s)))) for _ in range(draws)]
        bound = min((1 + r / (s - r - 1)) * w[r:].sum() for r in range(s - 1))
        assert np.mean(lost) <= bound + np.trace(M) * np.sqrt(np.log(1e6) / (2 * draws))
        assert np.mean(lost) >= w[s:].sum(), "no rank-s approximation is better than the tail"


def test_the_bound_on_the_expected_error_is_nearly_attained():
    """By three large eigenvalues over a flat tail, of which the other columns see little."""
    d, s, r = 300, 10, 3
    w = np.concatenate([np.full(r, 1e6), np.ones(d - r)])
    rng = np.random.default_rng(0)
    lost = [w.sum() - np.trace(pinv_nystrom(np.diag(w), rng.standard_normal((d, s)))) for _ in range(100)]
    assert 0.93 <= np.mean(lost) / ((1 + r / (s - r - 1)) * (d - r)) <= 1


@given(columns=streams(kinds=("plain", "zero", "repeated")), rho=rhos, phi=st.sampled_from([1e-3, 0.1, 10.0]))
def test_andos_bound_holds_for_the_inverse(xp, columns, rho, phi):
    """0 <= M~ <= M gives ||(M~ + lam I)^-1 - (M + lam I)^-1|| <= f(||E||), of the certificate alone."""
    for M, process in follow(StreamingNystrom(rank=2, rho=rho), columns, rho, xp):
        size = np.linalg.norm(M, 2)
        if size == 0:
            continue
        lam, identity = phi * float(size), np.eye(len(M))
        error = np.linalg.inv(dense(process, xp) + lam * identity) - np.linalg.inv(M + lam * identity)
        bound = process.certificate.inverse_bound(0 * process.estimate.trace + lam)
        slack = 64 * len(M) * EPS / phi / lam
        assert np.linalg.norm(error, 2) <= float(bound.spectral) + slack
        assert np.linalg.norm(error) <= float(bound.frobenius) + slack


def test_a_rebasing_loses_nothing_at_once_and_helps_later(fast_xp):
    columns = stream(np.random.default_rng(6), d=40, n=4, steps=80, decay="slow decay")
    errors = {}
    for T in (0, 10):
        runs = follow(StreamingNystrom(rank=6, rho=0.9, T_base=T, seed=1), columns, 0.9, fast_xp)
        errors[T] = [np.linalg.norm(M - dense(p, fast_xp), "nuc") / np.trace(M) for M, p in runs]
    assert np.mean(errors[10][40:]) < 0.9 * np.mean(errors[0][40:])


def omegas(process, columns, xp, **options) -> list[bool]:
    """At which updates Omega changed, the first left out."""
    held, changed = None, []
    for _, p in follow(process, columns, 0.9, xp, **options):
        omega = xp.numpy(p._sketch.omega)
        changed.append(held is not None and not np.array_equal(omega, held))
        held = omega
    return changed


@pytest.mark.parametrize("every", [1, 10, 25])
def test_by_default_it_rebases_once_in_five_updates_however_far_apart_they_are(fast_xp, every):
    """What was lost fades by update, as rho^j, and so does what a period of iterations means."""
    columns = stream(np.random.default_rng(6), d=30, n=4, steps=17, decay="slow decay")
    changed = omegas(StreamingNystrom(rank=3, rho=0.9), columns, fast_xp, every=every)
    assert [k for k, yes in enumerate(changed) if yes] == [5, 10, 15]
    changed = omegas(StreamingNystrom(rank=3, rho=0.9, T_base=3 * every), columns, fast_xp, every=every)
    assert [k for k, yes in enumerate(changed) if yes] == [3, 6, 9, 12, 15]
    assert not any(omegas(StreamingNystrom(rank=3, rho=0.9, T_base=0), columns, fast_xp, every=every))


def test_a_restart_rebases_at_the_next_update(fast_xp):
    process = StreamingNystrom(rank=3, rho=0.9)
    columns = stream(np.random.default_rng(6), d=30, n=4, steps=12, decay="slow decay")
    changed = []
    for k, X in enumerate(columns):
        if k == 7:
            process.restart(k)
        before = process._sketch
        changed.append(process.due(k))
        process.update(k, fast_xp.array(X), None)
        assert changed[-1] == (before is None or before.omega is not process._sketch.omega)
    assert [k for k, yes in enumerate(changed) if yes] == [0, 5, 7]


def test_fresh_columns_see_what_is_orthogonal_to_all_modes(fast_xp, monkeypatch):
    """Columns move to a space where none had been: modes alone would be blind for ever."""
    rng, half = np.random.default_rng(9), 20
    low, high = np.zeros((2 * half, 10)), np.zeros((2 * half, 4))
    low[:half], high[half:] = rng.standard_normal((half, 10)), rng.standard_normal((half, 4))
    columns = [low * rng.standard_normal(10) for _ in range(30)]
    columns += [high * rng.standard_normal(4) for _ in range(60)]
    lost = []
    for share in (streaming.FRESH, 0):
        monkeypatch.setattr(streaming, "FRESH", share)
        for M, process in follow(StreamingNystrom(rank=4, rho=0.9, s=8), columns, 0.9, fast_xp):
            error = np.linalg.norm(M - dense(process, fast_xp), "nuc") / np.trace(M)
        lost.append(error)
    assert lost[0] <= 0.02 and lost[1] >= 0.98


@given(columns=streams(kinds=("plain", "zero"), n=st.integers(1, 4)), rho=rhos, cut=st.integers(0, 4))
def test_shares_of_columns_add_up(xp, columns, rho, cut):
    """An update with the sum of two parts' shares is that with all columns: (8) is a sum over columns."""
    whole, parted = (StreamingNystrom(rank=2, rho=rho, seed=1, T_base=0) for _ in range(2))
    for k, X in enumerate(columns):
        whole.update(k, xp.array(X), None)
        shares = [parted.share(k, xp.array(part)) for part in (X[:, :cut], X[:, cut:])]
        parted.take(k, {name: shares[0][name] + shares[1][name] for name in shares[0]})
        for one, other in zip(whole._sketch, parted._sketch, strict=True):
            one, other = xp.numpy(one), xp.numpy(other)
            assert np.linalg.norm(one - other) <= 1e-13 * np.linalg.norm(one)


def test_a_rank_that_grows_keeps_what_is_known(fast_xp):
    process = StreamingNystrom(rank=3, rho=0.9)
    columns = stream(np.random.default_rng(7), d=30, n=3, steps=40, decay="fast decay")
    for k, (M, _) in enumerate(follow(process, columns, 0.9, fast_xp)):
        error = np.linalg.norm(M - dense(process, fast_xp), "nuc") / np.trace(M)
        if k == 20:
            before = error
            process.configure(rank=6)
    assert process._sketch.omega.shape[1] == 12 and error < before


@pytest.mark.parametrize("kinds", [("plain",), ("zero", "repeated", "in span"), ("huge", "tiny", "plain")])
def test_float32_stays_near_float64_over_a_thousand_updates(fast_xp, kinds):
    columns = stream(np.random.default_rng(8), d=40, n=3, steps=1000, kinds=kinds, decay="slow decay")
    single, double = (StreamingNystrom(rank=6, rho=0.95, T_base=50, seed=1) for _ in range(2))
    runs = zip(
        follow(single, [X.astype(np.float32) for X in columns], 0.95, fast_xp),
        follow(double, [X.astype(np.float32).astype(float) for X in columns], 0.95, fast_xp),
        strict=True,
    )
    for k, _ in enumerate(runs):
        if k % 100 == 99:
            one, other = dense(single, fast_xp), dense(double, fast_xp)
            assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other)


def test_a_single_column_is_handed_out(fast_xp):
    """It was fresh, and so left out of the estimate, which had no mode."""
    columns = stream(np.random.default_rng(6), d=12, n=2, steps=8, decay="fast decay")
    for M, process in follow(StreamingNystrom(rank=4, rho=0.9, s=1), columns, 0.9, fast_xp):
        estimate = process.estimate.lowrank
        assert estimate.m == process.cost(12, 2).rank == 1
        assert 0 < float(estimate.lambda_max) <= (1 + 1e-12) * np.linalg.norm(M, 2)


@pytest.mark.parametrize("first", [0, 2])
def test_updates_without_columns_are_those_of_the_factor(fast_xp, first):
    """X X^T = 0: M_k = rho M_{k-1}, also where there is no M yet."""
    process, M = StreamingNystrom(rank=2, rho=0.9), np.zeros((8, 8))
    factor = KFactor("A", {"it": process}, 0.9, dense=True)
    for k, n in enumerate((first, 3, 0, 0, 2, 0, 0)):
        X = np.random.default_rng(k).standard_normal((8, n))
        factor.push(k, fast_xp.array(X))
        M = fast_xp.numpy(factor.average.M)
        assert float(process.estimate.trace) == pytest.approx(np.trace(M), rel=1e-13)
        assert np.linalg.eigvalsh(M - dense(process, fast_xp))[0] >= -1e-12 * np.trace(M)


def test_nothing_is_decomposed_before_an_inverse_is_asked_for_but_at_a_rebasing(fast_xp, monkeypatch):
    """F^T F and its EVD are taken once an estimate is read, and not again before the next update."""
    calls = []
    monkeypatch.setattr(streaming, "nystrom_of", lambda Y, C: calls.append(1) or nystrom_of(Y, C))
    process = StreamingNystrom(rank=3, rho=0.9)
    factor, counts = KFactor("A", {"it": process}, 0.9), []
    for k, X in enumerate(stream(np.random.default_rng(6), d=30, n=4, steps=7, decay="slow decay")):
        factor.push(k, fast_xp.array(X))
        if k == 2:
            for continuation in ("none", "min", "trace"):
                factor.inverse("it", phi=0.1, continuation=continuation)
            assert process.certificate is not None
        counts.append(len(calls))
    assert counts == [0, 0, 1, 1, 1, 2, 2]


def test_it_follows_a_decay_that_changes(fast_xp):
    process, rho, M = StreamingNystrom(rank=2, rho=0.9, s=6), 0.9, None
    for k, X in enumerate(stream(np.random.default_rng(5), d=12, n=2, steps=20, decay="slow decay")):
        if k in (4, 13):
            process.configure(rho=(rho := rho / 2))
        process.update(k, fast_xp.array(X), None)
        M = X @ X.T if M is None else rho * M + (1 - rho) * X @ X.T
        E = M - dense(process, fast_xp)
        assert float(process.estimate.trace) == pytest.approx(np.trace(M), rel=1e-12)
        assert np.linalg.eigvalsh(E)[0] >= -1e-12 * np.trace(M)


def test_no_dense_factor_is_kept():
    factor = KFactor("A", {"N-KFAC": Algorithm.parse("N-KFAC").process(Settings(rank=3), "A")}, 0.95)
    factor.push(0, np.ones((3000, 2)))
    assert factor.average.M is None and factor.processes["N-KFAC"].estimate.lowrank.m <= 6
    sizes = [part.size for part in factor.processes["N-KFAC"]._sketch]
    assert max(sizes) <= 3000 * 6


@given(columns=streams(kinds=("plain", "repeated")), rho=rhos)
def test_wkfac_is_below_m_and_certified_when_fresh(xp, columns, rho):
    for M, process in follow(WarmNystrom(rank=2, rho=rho, T_inv=1, oversampling=1), columns, rho, xp):
        E = M - dense(process, xp)
        assert np.linalg.eigvalsh(E)[0] >= -1e-10 * np.trace(M)
        assert isinstance(process.certificate, Certificate)
        assert float(process.certificate.nuclear) == pytest.approx(np.trace(E), abs=1e-10 * np.trace(M))


def test_wkfac_approaches_the_optimum_while_m_stands_still(fast_xp):
    """Each product is a step of subspace iteration: the error only falls."""
    M = psd(np.random.default_rng(1), "slow decay", 40)
    factor = EAFactor(0.9)
    factor.update_by_gram(fast_xp.array(M))
    process = WarmNystrom(rank=6, rho=0.9, T_inv=1, oversampling=4)
    best = np.linalg.norm(M - reference.projected(M, 6), "nuc")
    errors = []
    for k in range(30):
        process.update(k, fast_xp.array(np.zeros((40, 1))), factor)
        errors.append(np.linalg.norm(M - dense(process, fast_xp), "nuc"))
    assert errors[-1] <= 1.02 * best and errors[-1] < errors[0]


def test_columns_that_see_nothing_and_columns_alike_do_no_harm(xp):
    M = np.diag([4.0, 1.0, 0.0, 0.0])
    omega = np.array([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).T @ np.diag([1.0, 1.0, 1.0])
    omega = np.stack([omega[:, 0], omega[:, 0], omega[:, 1]], axis=1)
    low = nystrom_of(xp.array(M @ omega), xp.array(omega.T @ M @ omega))
    assert np.linalg.norm(xp.numpy(low.dense()) - pinv_nystrom(M, omega)) <= 1e-12


def test_fresh_columns_are_orthonormal_to_what_they_stand_beside(xp):
    U = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 4)))[0]
    omega = xp.numpy(with_fresh(xp.array(U), 9, np.random.default_rng(1)))
    assert np.array_equal(omega[:, :4], U)
    assert np.abs(omega.T @ omega - np.eye(9)).max() <= 1e-13
