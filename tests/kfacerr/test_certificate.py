"""Certificates are never violated, equal the true error where they say so, are attained, and absent where due."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.array import norm
from kfacerr.certificate import Certificate
from kfacerr.ea import EAFactor
from kfacerr.frequent_directions import FrequentDirections
from kfacerr.lowrank import LowRank
from kfacerr.processes import Brand, BrandCorrected, BrandRsvd, Evd, Rsvd
from tests.conftest import Backend, examples
from tests.strategies import generators, orthogonal, rhos, spectrum, stream, streams

NUMPY = Backend("numpy", np)
DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])


ROUGH = {"oversampling": 1, "n_pwr_it": 0}  # a sketch whose projection error is large

CERTIFIED = {
    "B-KFAC": lambda r, rho: Brand(rank=r, rho=rho),
    "B-KFAC accumulate": lambda r, rho: Brand(rank=r, rho=rho, T_brand=2, accumulate=True),
    "B-R-KFAC": lambda r, rho: BrandRsvd(rank=r, **ROUGH, rho=rho, T_rsvd=3),
    "B-R-KFAC Nyström": lambda r, rho: BrandRsvd(rank=r, **ROUGH, sketch="nystrom", rho=rho, T_rsvd=3),
    "R-KFAC": lambda r, rho: Rsvd(rank=r, **ROUGH, T_inv=1),
    "R-KFAC Nyström": lambda r, rho: Rsvd(rank=r, **ROUGH, sketch="nystrom", T_inv=1),
    "K-FAC": lambda r, rho: Evd(T_inv=1),
    "FD": lambda r, rho: FrequentDirections(rank=r, rho=rho),
}


def run(process, columns, rho, xp):
    """Feeds a stream; yields (k, M in float64, process) after every step."""
    factor, M = EAFactor(rho), None
    for k, X in enumerate(columns):
        given_X = xp.array(X)
        process.begin(k, factor)
        factor.update(given_X)
        process.update(k, given_X, factor)
        G = X.astype(float) @ X.astype(float).T
        M = G if M is None else rho * M + (1 - rho) * G
        yield k, M, process


def dense(low: LowRank, xp, tau=0.0) -> np.ndarray:
    """The representation in float64, continued at level tau."""
    U, D = xp.numpy(low.U), xp.numpy(low.D)
    U, D = U[:, D > 0], D[D > 0]
    return (U * D) @ U.T + tau * (np.eye(len(U)) - U @ U.T)


def assert_holds(certificate: Certificate, E: np.ndarray, M: np.ndarray) -> None:
    """All three norms, up to what forming E in float64 rounds."""
    s = np.linalg.svd(E, compute_uv=False)
    noise = 8 * len(M) * np.finfo(float).eps * np.trace(M)
    nuclear, rounding = float(certificate.nuclear), float(certificate.rounding)
    if certificate.exact:
        assert abs(s.sum() - nuclear) <= rounding + noise
        assert np.linalg.eigvalsh(E)[0] >= -rounding - noise
    assert s.sum() <= nuclear + rounding + noise
    assert np.linalg.norm(s) <= float(certificate.frobenius) + noise
    assert s[0] <= float(certificate.spectral) + noise
    assert float(certificate.spectral) <= float(certificate.frobenius) <= (nuclear + rounding) * (1 + 1e-6) + noise


def assert_inverse_holds(certificate, M, estimate, lam, like, *, own_norm=None) -> None:
    R = np.linalg.inv(M + lam * np.eye(len(M)))
    s = np.linalg.svd(np.linalg.inv(estimate + lam * np.eye(len(M))) - R, compute_uv=False)
    bound = certificate.inverse_bound(like * 0 + lam)
    noise = 64 * len(M) * np.finfo(float).eps * (np.linalg.norm(M, 2) / lam + 1) / lam
    assert s[0] <= float(bound.spectral) * (1 + 1e-6) + noise
    assert np.linalg.norm(s) <= float(bound.frobenius) * (1 + 1e-6) + noise


@DTYPES
@pytest.mark.parametrize("name", list(CERTIFIED))
@examples(20)
@given(columns=streams(), rho=rhos, r=st.integers(1, 6), phi=st.sampled_from([1e-3, 0.1, 10.0]))
def test_no_certificate_is_violated(dtype, name, columns, rho, r, phi):
    """Errors in M, with and without continuation, and in the inverse, also for extreme columns."""
    for k, M, process in run(CERTIFIED[name](r, rho), [X.astype(dtype) for X in columns], rho, NUMPY):
        certificate = process.certificate
        if "accumulate" in name and k % 2:
            assert certificate is None and "wait" in process.uncertified
            continue
        assert certificate is not None and process.uncertified is None
        low, trace = process.estimate.lowrank, process.estimate.trace
        assert_holds(certificate, M - dense(low, NUMPY), M)
        top = np.linalg.norm(M, 2)
        if top == 0:
            continue
        assert_inverse_holds(certificate, M, dense(low, NUMPY), phi * top, trace)
        for tau in (0.01 * top, top):
            continued = certificate.continued(0 * trace + tau, low)
            assert not continued.exact
            assert_holds(continued, M - dense(low, NUMPY, tau), M)
            assert_inverse_holds(continued, M, dense(low, NUMPY, tau), phi * top, trace)


@DTYPES
@pytest.mark.parametrize("name", list(CERTIFIED))
@pytest.mark.parametrize("rho", [0.5, 0.99])
def test_long_streams_do_not_wear_a_certificate_out(dtype, name, rho):
    kinds = ("plain", "repeated", "huge", "tiny", "zero", "nearly in span", "all zero")
    columns = stream(np.random.default_rng(3), d=24, n=3, steps=150, kinds=kinds, decay="slow decay", dtype=dtype)
    for k, M, process in run(CERTIFIED[name](5, rho), columns, rho, NUMPY):
        if k % 10 == 0:
            assert_holds(process.certificate, M - dense(process.estimate.lowrank, NUMPY), M)


@pytest.mark.parametrize(("n", "r"), [(600, 30), (250, 50)])
def test_what_an_evd_of_hundreds_of_modes_rounds_is_allowed_for(n, r):
    """Dense where n >= d, else through a Gram matrix: where the spectrum decays, more than the products round."""
    d, most = 600, 0.0
    root = orthogonal(np.random.default_rng(0), d) * 0.85 ** np.arange(d)
    columns = (root @ np.random.default_rng(k).standard_normal((d, n)) for k in range(2))
    for _, M, process in run(Brand(rank=r, rho=0.95), columns, 0.95, NUMPY):
        certificate = process.certificate
        E = np.linalg.eigvalsh(M - dense(process.estimate.lowrank, NUMPY))
        error = abs(np.abs(E).sum() - float(certificate.nuclear)) / float(certificate.rounding)
        assert -E[0] <= float(certificate.rounding)
        most = max(most, error)
    assert 0.1 < most < 0.75, "neither near a false alarm nor idle"


def test_the_certificate_is_the_same_on_every_backend(xp):
    columns = stream(np.random.default_rng(5), d=12, n=2, steps=8, decay="slow decay")
    for make in CERTIFIED.values():
        *_, (_, M, process) = run(make(3, 0.9), columns, 0.9, xp)
        if process.certificate is not None:
            assert_holds(process.certificate, M - dense(process.estimate.lowrank, xp), M)
            bound = process.certificate.inverse_bound(process.estimate.trace)
            assert math.isfinite(float(bound.frobenius))


@pytest.mark.parametrize(("dtype", "exponent"), [(np.float32, 50), (np.float64, 480)])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", list(CERTIFIED))
def test_a_certificate_scales_with_its_factor(fast_xp, name, dtype, exponent, sign):
    """Columns times 2^e: all norms times 2^(2e), the relative bound as it is. A square would leave the range."""
    columns = stream(np.random.default_rng(5), d=30, n=2, steps=9, decay="slow decay", dtype=dtype)
    ends = [
        list(run(CERTIFIED[name](3, 0.9), [np.ldexp(X, e) for X in columns], 0.9, fast_xp))[-1][2]
        for e in (0, sign * exponent)
    ]
    (one, two), (low, scaled) = (p.certificate for p in ends), (p.estimate.lowrank for p in ends)
    lam, tau = 0.1 * low.lambda_max, 1e-3 * low.lambda_max
    unit = 2.0 ** (2 * sign * exponent)
    pairs = [
        (getattr(one, key), getattr(two, key), unit) for key in ("nuclear", "frobenius", "spectral", "rounding")
    ]
    pairs += [(one.frobenius / low.lambda_max, two.frobenius / scaled.lambda_max, 1)]
    pairs += [(x, y, 1 / unit) for x, y in zip(one.inverse_bound(lam), two.inverse_bound(lam * unit), strict=True)]
    continued = one.continued(tau, low), two.continued(tau * unit, scaled)
    pairs += [(c.frobenius, s.frobenius, unit) for c, s in [continued]]
    for level in (None, tau):
        bounds = [
            c.relative_inverse_bound(x, u * lam, None if level is None else u * level)
            for c, x, u in ((one, low, 1), (two, scaled, unit))
        ]
        pairs.append((*bounds, 1))
    for original, other, by in pairs:
        assert float(other) / by == pytest.approx(float(original), rel=1e-4 if dtype is np.float32 else 1e-10)
        assert float(other) > 0 or float(original) < 1e-12  # K-FAC's nuclear norm is rounding


def test_torch_certificates_of_large_float32_factors_hold(fast_xp):
    """torch's own float32 norm of 4096^2 entries of one size is 6e-4 too small, and so the bound would be."""
    d = 4096
    M = fast_xp.array(np.full((d, d), 1 / d, dtype=np.float32))
    low = LowRank(M[:, :1] * d**0.5, 0.99 * M[0, :1] * d)  # 0.99 of the only mode
    c = Certificate.of_decomposition(low, M[0, 0] * d, norm(M), memory=1.0)
    assert float(c.frobenius) >= 0.01
    assert float(norm(M)) == pytest.approx(1, rel=1e-6)


def test_the_recursions_of_the_design_are_never_better():
    """e' = rho (e + ||T||_F) and s' = rho (s + T_1) from zero: what is carried is at most that."""
    columns = stream(np.random.default_rng(6), d=30, n=3, steps=40, decay="slow decay")
    e = s = 0.0
    discarded = np.zeros(1)
    for k, _, process in run(Brand(rank=6, rho=0.9), columns, 0.9, NUMPY):
        if k:
            # A rounding of each step's bound is not a rounding of the matrices: relative to the bound itself.
            e, s = 0.9 * (e + np.linalg.norm(discarded)), 0.9 * (s + discarded.max(initial=0.0))
            assert float(process.certificate.frobenius) <= e * (1 + 1e-10) + float(process.certificate.rounding)
            assert float(process.certificate.spectral) <= s * (1 + 1e-10) + float(process.certificate.rounding)
        discarded = process.estimate.lowrank.D[6:]


# --------------------------------------------------------------------------------------------------- attained


def certificate_of(E: np.ndarray, **known: float) -> Certificate:
    """Of an error with the norms of E, all known exactly."""
    s = np.linalg.svd(E, compute_uv=False)
    values = {"nuclear": s.sum(), "frobenius": np.linalg.norm(s), "spectral": s[0], "rounding": 0.0} | known
    return Certificate(**{name: np.float64(value) for name, value in values.items()}, d=len(E))


def f_norms(t: np.ndarray, lam: float) -> tuple[float, float]:
    f = t / (lam * (t + lam))
    return float(f.max()), float(np.linalg.norm(f))


@pytest.mark.parametrize("lam", [0.01, 0.4, 1.0, 7.0])
@pytest.mark.parametrize("flat", [1, 3, 8])
def test_the_inverse_bound_is_attained(lam, flat):
    """M~ and E on orthogonal ranges, E flat: its norms are those of the worst case."""
    d = 8
    Q = orthogonal(np.random.default_rng(0), d)
    t = np.where(np.arange(d) < flat, 0.3, 0.0)
    held = np.where(t == 0, 5.0, 0.0)
    E, estimate = (Q * t) @ Q.T, (Q * held) @ Q.T
    difference = np.linalg.inv(estimate + lam * np.eye(d)) - np.linalg.inv(estimate + E + lam * np.eye(d))
    bound = certificate_of(E).inverse_bound(np.float64(lam))
    assert float(bound.spectral) == pytest.approx(np.linalg.norm(difference, 2), rel=1e-12)
    if flat == d or lam >= 0.3:  # all equal; or the eigenvalues u = sigma <= 1 and 0
        assert float(bound.frobenius) == pytest.approx(np.linalg.norm(difference), rel=1e-12)
    assert float(bound.frobenius) >= np.linalg.norm(difference) * (1 - 1e-12)


@pytest.mark.parametrize(("nu", "sigma"), [(3.0, 5.0), (0.8, 0.4), (20.0, 6.0), (6.0, 1.0)])
def test_the_worst_case_given_trace_and_largest_eigenvalue_is_a_spectrum(nu, sigma):
    """No Frobenius norm known: u = min(sigma, 1) and 0, or all equal to nu/d > 1."""
    d, lam = 8, 0.25
    u = min(sigma, 1.0)
    worst = np.full(d, nu / d) if nu > d else np.where(np.arange(d) < round(nu / u), u, 0.0)
    assert worst.sum() == pytest.approx(nu)
    known = Certificate(np.float64(nu * lam), np.float64(nu * lam), np.float64(sigma * lam), np.float64(0), d)
    assert float(known.inverse_bound(np.float64(lam)).frobenius) == pytest.approx(f_norms(worst * lam, lam)[1])


@given(rng=generators, d=st.integers(1, 12), lam=st.sampled_from([1e-3, 0.1, 1.0, 10.0]))
def test_no_spectrum_exceeds_the_inverse_bound(rng, d, lam):
    t = rng.exponential(size=d) ** rng.integers(1, 5) * (rng.random(d) < 0.7)
    bound = certificate_of(np.diag(t)).inverse_bound(np.float64(lam))
    spectral, frobenius = f_norms(t, lam)
    assert spectral <= float(bound.spectral) * (1 + 1e-12)
    assert frobenius <= float(bound.frobenius) * (1 + 1e-12)
    assert float(bound.frobenius) <= float(np.linalg.norm(t)) / lam**2 * (1 + 1e-12)


def test_the_norms_bound_each_other_and_a_flat_tail_is_recognised():
    d = 50
    flat = Certificate(*map(np.float64, (d * 0.2, d**0.5 * 0.2, 5.0, 0.0)), d)._tightened()
    assert float(flat.spectral) == pytest.approx(0.2, rel=1e-6)
    one = Certificate(*map(np.float64, (0.2, 9.0, 7.0, 0.0)), d)._tightened()
    assert float(one.spectral) == pytest.approx(0.2) and float(one.frobenius) == pytest.approx(0.2)


def test_an_exact_truncation_is_certified_to_its_frobenius_norm():
    rng = np.random.default_rng(1)
    Q, w = orthogonal(rng, 30), spectrum("slow decay", 30)
    M = (Q * w) @ Q.T
    c = Certificate.of_decomposition(LowRank(Q[:, :5], w[:5]), np.float64(w.sum()), np.linalg.norm(M))
    assert float(c.nuclear) == pytest.approx(w[5:].sum())
    assert float(c.frobenius) == pytest.approx(np.linalg.norm(w[5:]), rel=1e-6)
    assert w[5] <= float(c.spectral) <= 0.7 * float(c.frobenius)


def test_disjoint_discarded_directions_make_the_brand_recursion_sharp():
    """A direction that is discarded once, with nothing else: F = s = N, decaying as rho^j."""
    e = np.eye(4)
    columns = [e[:, :2] * [2.0, 1.0], *[2 * e[:, :1]] * 5]
    for k, _, process in run(Brand(rank=1, rho=0.5), columns, 0.5, NUMPY):
        c = process.certificate
        expected = 0.5**k if k else 0.0
        for value in (c.nuclear, c.frobenius, c.spectral):
            assert float(value) == pytest.approx(expected, abs=2 * float(c.rounding))


@given(rng=generators, phi=st.sampled_from([0.01, 0.1, 1.0]))
def test_the_relative_bound_bounds_metric_1(rng, phi):
    columns = stream(rng, d=20, n=3, steps=6)
    *_, (_, M, process) = run(Brand(rank=6, rho=0.9), columns, 0.9, NUMPY)
    lam = phi * np.linalg.norm(M, 2)
    low = process.estimate.lowrank
    R = np.linalg.inv(M + lam * np.eye(20))
    for tau in (None, 1e-4 * lam):
        error = np.linalg.inv(dense(low, NUMPY, tau or 0.0) + lam * np.eye(20)) - R
        bound = process.certificate.relative_inverse_bound(low, np.float64(lam), tau and np.float64(tau))
        assert np.linalg.norm(error) / np.linalg.norm(R) <= float(bound) + 1e-13


# ------------------------------------------------------------------------------------------- None, and why


@pytest.mark.parametrize(
    ("process", "steps", "why"),
    [
        (Rsvd(rank=3, **ROUGH, T_inv=9), 2, "stale"),
        (Evd(T_inv=9), 2, "stale"),
        (Rsvd(rank=3, **ROUGH, sketch="sre", T_inv=1), 1, "projection error"),
        (BrandRsvd(rank=3, **ROUGH, sketch="sre", rho=0.9, T_rsvd=1), 3, "projection error"),
        (BrandCorrected(rank=3, rho=0.9, T_corct=9, phi_corct=1.0), 3, "corrected"),
        (Brand(rank=3, rho=0.9, T_brand=2), 2, "dropped"),
        (Brand(rank=3, rho=0.9, T_brand=2), 3, "dropped"),
    ],
)
def test_where_theory_does_not_allow_one_it_is_none_and_says_why(process, steps, why):
    assert process.certificate is None
    columns = stream(np.random.default_rng(1), d=12, n=2, steps=steps, decay="slow decay")
    for _ in run(process, columns, 0.9, NUMPY):
        pass
    assert process.certificate is None and why in process.uncertified


def test_the_order_does_fail_there():
    """SRE, a correction and a stale estimate each leave an indefinite error: the None is needed."""
    columns = stream(np.random.default_rng(2), d=20, n=3, steps=8, decay="slow decay")
    for process in (
        Rsvd(rank=4, **ROUGH, sketch="sre", T_inv=1),
        Rsvd(rank=4, **ROUGH, T_inv=9),
        BrandCorrected(rank=4, rho=0.9, T_corct=4, phi_corct=0.5),
    ):
        *_, (_, M, _) = run(process, columns, 0.9, NUMPY)
        E = M - dense(process.estimate.lowrank, NUMPY)
        assert np.linalg.eigvalsh(E)[0] < -1e-6 * np.trace(M)


def test_an_sre_sketch_that_covers_the_space_is_certified():
    process = Rsvd(rank=3, oversampling=99, n_pwr_it=0, sketch="sre", seed=0, T_inv=1)
    *_, (_, M, _) = run(process, stream(np.random.default_rng(1), d=9, n=2, steps=4), 0.9, NUMPY)
    assert_holds(process.certificate, M - dense(process.estimate.lowrank, NUMPY), M)


def test_a_correction_of_no_mode_is_none():
    """round(0.5 * 1) = 0 modes: the estimate is B-KFAC's, and so is its certificate."""
    process = BrandCorrected(rank=1, rho=0.9, T_corct=1, phi_corct=0.5)
    columns = stream(np.random.default_rng(1), d=12, n=2, steps=4, decay="slow decay")
    *_, (_, M, _) = run(process, columns, 0.9, NUMPY)
    assert_holds(process.certificate, M - dense(process.estimate.lowrank, NUMPY), M)


def test_an_overwriting_restores_a_lost_certificate():
    process = BrandRsvd(rank=3, **ROUGH, rho=0.9, T_rsvd=4, T_brand=2)
    columns = stream(np.random.default_rng(1), d=12, n=2, steps=9, decay="slow decay")
    found = [p.certificate is not None for _, _, p in run(process, columns, 0.9, NUMPY)]
    assert found == [k % 4 == 0 for k in range(9)]


@pytest.mark.parametrize("name", list(CERTIFIED))
def test_a_certificate_is_saved_and_loaded(name):
    columns = stream(np.random.default_rng(4), d=12, n=2, steps=9, decay="slow decay")
    process = CERTIFIED[name](3, 0.9)
    factor = EAFactor(0.9)
    resumed = CERTIFIED[name](3, 0.9)
    for k, X in enumerate(columns):
        if k == 5:
            resumed.load_state_dict(pickle.loads(pickle.dumps(process.state_dict())))
        process.begin(k, factor)
        if k >= 5:
            resumed.begin(k, factor)
        factor.update(X)
        process.update(k, X, factor)
        if k >= 5:
            resumed.update(k, X, factor)
    assert resumed.uncertified == process.uncertified
    assert vars(resumed.certificate) == vars(process.certificate)
