"""An audit's numbers are those of naive dense formulas, its bounds hold, and what is broken is a finding."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr import examine as module
from kfacerr.damping import Damping
from kfacerr.examine import examine, model_gradient, step_errors
from kfacerr.exceptions import InputError
from kfacerr.inverse import CONTINUATIONS
from kfacerr.stored import StoredArray, StoredFactor
from tests.strategies import SPECTRA, generators, orthogonal, psd, psd_matrices


def stored(M, dtype=None, **more) -> StoredFactor:
    return StoredFactor("fc", "A", StoredArray(M.shape, dtype or M.dtype.name, lambda: M), **more)


def truncated(M, r, lam, continuation):
    """The damped inverse of M truncated to r and continued, by its eigenvalues."""
    w, V = np.linalg.eigh(M)
    w, V = np.maximum(w[::-1], 0), V[:, ::-1]
    r = min(r, len(w))
    tail = {"none": 0.0, "min": w[r - 1], "trace": max(0, np.trace(M) - w[:r].sum()) / max(1, len(w) - r)}
    w[r:] = tail[continuation]
    return (V / (w + lam)) @ V.T


def error(inverse, M, lam):
    exact = np.linalg.inv(M + lam * np.eye(len(M)))
    return np.linalg.norm(inverse - exact) / np.linalg.norm(exact)


@given(psd_matrices(max_d=12), st.integers(1, 12), st.sampled_from([0.5, 0.1, 1e-3]))
def test_the_numbers_are_those_of_naive_formulas(M, r, phi):
    audit = examine(stored(M), rank=r, phi=phi).audit
    w = np.linalg.eigvalsh(M)[::-1]
    lam = phi * w[0]
    assert (audit.d, audit.rank, audit.nonfinite) == (len(M), min(r, len(M)), 0)
    for value, expected in {
        audit.trace: np.trace(M),
        audit.stable_rank: np.trace(M) / w[0],
        audit.lambda_max: w[0],
        audit.lam: lam,
        audit.condition: (w[0] + lam) / (w[-1] + lam),
    }.items():
        assert value == pytest.approx(expected, rel=1e-9)
    assert audit.lambda_min == pytest.approx(w[-1], abs=1e-13)
    held = np.cumsum(np.maximum(w, 0)) / np.maximum(w, 0).sum()
    assert (
        audit.rank_99 == np.flatnonzero(held >= 0.99 - 1e-14)[0] + 1
        or abs(held[int(audit.rank_99) - 1] - 0.99) < 1e-9
    )
    for name in CONTINUATIONS:
        assert audit.errors[name] == pytest.approx(error(truncated(M, r, lam, name), M, lam), rel=1e-6, abs=1e-11)


@given(psd_matrices(max_d=12), st.integers(1, 12), st.sampled_from([0.5, 0.1, 1e-2]))
def test_the_bounds_hold(M, r, phi):
    audit = examine(stored(M), rank=r, phi=phi).audit
    assert all(audit.errors[name] <= audit.bounds[name] + 1e-12 for name in CONTINUATIONS)


@given(
    generators,
    st.sampled_from([0.5, 0.1]),
    st.sampled_from([5e-2, 1e-5]),
    st.integers(1, 9),
    st.sampled_from([1.0, 0.25]),
)
def test_the_bounds_hold_where_the_factor_is_not_psd(rng, phi, below, r, power):
    Q = orthogonal(rng, 10)
    w = np.append(np.exp(-np.arange(7.0)), -below * np.array([0.2, 0.7, 1.0]))
    M = (Q * w) @ Q.T
    audit = examine(stored((M + M.T) / 2), rank=r, phi=phi, power=power).audit
    assert audit.negative == 3 and any("not p.s.d." in told for told in audit.findings)
    assert all(audit.errors[name] <= audit.bounds[name] + 1e-12 for name in CONTINUATIONS)


def test_the_bound_is_tight_for_a_flat_tail_of_few_modes():
    """One mode is missing, and it is the whole error."""
    w = np.array([1.0, 0.5, 0.2, 0, 0, 0, 0, 0])
    audit = examine(stored(np.diag(w)), rank=2, phi=0.1).audit
    assert audit.errors["none"] < audit.bounds["none"] < 1.5 * audit.errors["none"]


@pytest.mark.parametrize("kind", SPECTRA)
def test_a_low_precision_evd_is_off_by_about_its_rounding_over_the_damping(kind):
    M = psd(np.random.default_rng(0), kind, 40)
    audit = examine(stored(M), rank=10, phi=0.1).audit
    assert 1e-8 < audit.precision["float32"] < 1e-5
    assert 1e-4 < audit.precision["bfloat16"] < 3e-2


def test_an_evd_that_costs_much_is_a_finding():
    M = psd(np.random.default_rng(0), "fast decay", 40)
    assert "an EVD in bfloat16 is off by" in examine(stored(M), rank=10, phi=1e-3).audit.findings[-1]


def test_bfloat16_is_rounded_as_torch_does():
    torch = pytest.importorskip("torch")
    scales = 10.0 ** np.arange(-10, 10).repeat(50)
    x = (scales * np.random.default_rng(0).standard_normal(1000)).astype(np.float32)
    assert np.array_equal(module._rounded(x, "bfloat16"), torch.from_numpy(x).bfloat16().float().numpy())


def test_sums_are_divided_by_their_counts():
    M = psd(np.random.default_rng(0), "slow decay", 6)
    plain, summed = (examine(stored(s * M, count=c), rank=3, phi=0.1).audit for s, c in ((1, None), (8, 8.0)))
    assert summed.trace == pytest.approx(plain.trace, rel=1e-12) and summed.count == 8
    assert summed.stable_rank == pytest.approx(plain.stable_rank, rel=1e-12)
    assert examine(stored(M, count=math.nan), rank=3, phi=0.1).audit.findings[0].startswith("no count is stored")
    without = examine(stored(M, count=0.0), rank=3, phi=0.1).audit
    assert "its count is 0" in without.findings[0] and without.trace == plain.trace


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_the_scale_of_a_factor_is_no_matter(scale):
    M = psd(np.random.default_rng(0), "slow decay", 6)
    one, other = (examine(stored(s * M), rank=3, phi=0.1).audit for s in (1.0, scale))
    assert other.trace == pytest.approx(scale * one.trace) and other.lam == pytest.approx(scale * one.lam)
    assert other.errors == pytest.approx(one.errors) and other.bounds == pytest.approx(one.bounds)


@pytest.mark.parametrize(("text", "count"), [("mean=0.3", None), ("lam=0.02", None), ("lam=0.02", 8.0)])
def test_another_damping_is_the_paper_s_at_another_ratio(text, count):
    M = psd(np.random.default_rng(5), "slow decay", 12)
    given = stored(M * (count or 1), count=count)
    audit = examine(given, rank=4, damping=Damping.parse(text)).audit
    lam = 0.3 * np.trace(M) / 12 if text.startswith("mean") else 0.02
    assert audit.lam == pytest.approx(lam, rel=1e-12) and audit.phi == pytest.approx(lam / audit.lambda_max)
    same = examine(given, rank=4, phi=audit.phi).audit
    assert audit.errors == pytest.approx(same.errors) and audit.bounds == pytest.approx(same.bounds)
    assert audit.condition == pytest.approx(same.condition) and audit.above == same.above


def findings(M, **more) -> str:
    return "; ".join(examine(stored(np.asarray(M)), rank=2, phi=more.pop("phi", 0.1), **more).audit.findings)


def test_what_is_broken_is_a_finding():
    broken = np.eye(4)
    broken[0, 1], broken[2, 2] = np.nan, np.inf
    examined = examine(stored(broken), rank=2, phi=0.1)
    assert examined.audit.nonfinite == 2 and math.isnan(examined.audit.trace) and examined.reference is None
    assert findings(broken).startswith("2 of its 16 entries")
    assert findings(np.zeros((3, 3))).startswith("it is zero")
    assert findings(-np.eye(3)).startswith("it has no positive eigenvalue")
    assert "asymmetric" in findings(np.triu(np.ones((3, 3))))
    assert "indefinite at phi = 0.1" in findings(np.diag([1.0, 0.5, -0.2]))
    assert "below the rounding of float32" in findings(np.eye(3, dtype=np.float32), phi=1e-7)
    assert findings(np.eye(3)) == ""


def test_asymmetry_is_measured_before_it_is_taken_away():
    rng = np.random.default_rng(0)
    M = psd(rng, "slow decay", 9) + 0.01 * rng.standard_normal((9, 9))
    audit = examine(stored(M), rank=3, phi=0.1).audit
    assert audit.asymmetry == pytest.approx(np.linalg.norm(M - M.T) / np.linalg.norm(M))
    symmetric = examine(stored((M + M.T) / 2), rank=3, phi=0.1).audit
    assert symmetric.errors == pytest.approx(audit.errors)
    tiled = M.copy()
    assert module._symmetrised(tiled, tile=4) == pytest.approx(audit.asymmetry)
    assert np.allclose(tiled, (M + M.T) / 2, rtol=1e-15)


@pytest.mark.parametrize("kind", ["fast decay", "slow decay", "rank deficient"])
def test_of_a_large_factor_the_ends_of_the_spectrum_and_the_bounds_are_right(kind, monkeypatch):
    M = psd(np.random.default_rng(0), kind, 80)
    exact = examine(stored(M), rank=12, phi=0.1).audit
    monkeypatch.setattr(module, "EXACT_UP_TO", 79)
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-5)):
        examined = examine(stored(M.astype(dtype)), rank=12, phi=0.1)
        large = examined.audit
        assert len(examined.spectrum) == 22 and examined.reference is None and not large.errors
        for name in ("trace", "lambda_max", "stable_rank", "lam", "condition"):
            assert getattr(large, name) == pytest.approx(getattr(exact, name), rel=tolerance), name
        assert large.lambda_min == pytest.approx(exact.lambda_min, abs=tolerance)
        assert all(exact.errors[name] <= large.bounds[name] + tolerance for name in CONTINUATIONS)
        assert large.bounds["none"] < 1.1 * exact.bounds["none"] + 1e-3
        assert large.beyond >= exact.beyond - tolerance and "GiB" in large.findings[-1]


def test_a_large_factor_that_is_not_psd_is_found_out(monkeypatch):
    M = psd(np.random.default_rng(0), "fast decay", 80) - 0.03 * np.eye(80)
    monkeypatch.setattr(module, "EXACT_UP_TO", 79)
    audit = examine(stored(M), rank=8, phi=0.1).audit
    assert audit.lambda_min == pytest.approx(-0.03, rel=1e-6) and any(
        "not p.s.d." in told for told in audit.findings
    )
    for name in CONTINUATIONS:
        assert error(truncated(M, 8, audit.lam, name), M, audit.lam) <= audit.bounds[name]


def test_stored_eigenvectors_are_held_against_the_factor():
    M = psd(np.random.default_rng(0), "slow decay", 8)
    Q = np.linalg.eigh(M)[1]
    for basis, off in ((Q, 0.0), (np.eye(8), np.linalg.norm(M - np.diag(np.diag(M))) / np.linalg.norm(M))):
        held = StoredArray(basis.shape, "float64", lambda basis=basis: basis)
        audit = examine(stored(M, basis=held), rank=3, phi=0.1).audit
        assert audit.basis == pytest.approx(off, abs=1e-13)
    bad = StoredArray(Q.shape, "float64", lambda: 2 * Q)
    assert "not orthonormal" in examine(stored(M, basis=bad), rank=3, phi=0.1).audit.findings[0]


def test_step_errors_are_those_of_the_dense_steps():
    rng = np.random.default_rng(0)
    G, A = psd(rng, "slow decay", 6), psd(rng, "fast decay", 9)
    left, right = (examine(stored(M), rank=3, phi=0.1) for M in (G, A))
    J = rng.standard_normal((6, 9))
    lam = [side.audit.lam for side in (left, right)]
    S = np.linalg.solve(G + lam[0] * np.eye(6), J) @ np.linalg.inv(A + lam[1] * np.eye(9))
    for name, (size, angle) in step_errors(left, right, J).items():
        step = truncated(G, 3, lam[0], name) @ J @ truncated(A, 3, lam[1], name)
        assert size == pytest.approx(np.linalg.norm(step - S) / np.linalg.norm(S))
        assert angle == pytest.approx(1 - np.sum(step * S) / np.linalg.norm(step) / np.linalg.norm(S))
    with pytest.raises(InputError, match=r"layer 'fc': a gradient \(6, 9\) is needed, got \(9, 6\)"):
        step_errors(left, right, J.T)


def test_a_gradient_of_the_model_has_its_covariance():
    rng = np.random.default_rng(0)
    G, A = psd(rng, "slow decay", 3), psd(rng, "fast decay", 2)
    left, right = (examine(stored(M), rank=2, phi=0.1) for M in (G, A))
    draws = np.stack([model_gradient(left, right, rng).ravel() for _ in range(20_000)])
    assert np.abs(draws.T @ draws / len(draws) - np.kron(G, A)).max() < 0.04
