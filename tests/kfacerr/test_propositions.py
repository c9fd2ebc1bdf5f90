"""Propositions 3.1-4.2, (19) and footnote 11 hold to a few roundings, are attained, and go no further."""

import math
from dataclasses import replace

import array_api_compat as compat
import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kfacerr import propositions
from kfacerr.array import device_array, to_numpy
from kfacerr.claims import TOLERANCE, Identity, Inequality, Psd, norms
from kfacerr.correction import correct
from kfacerr.ea import EAFactor
from kfacerr.exceptions import InputError
from kfacerr.lowrank import LowRank
from kfacerr.process import Process
from kfacerr.processes import Brand, BrandCorrected, BrandRsvd, Evd, Rsvd
from kfacerr.propositions import trajectory
from kfacerr.rsvd import rsvd, srevd
from tests.conftest import examples

QUICK = examples(80)
KINDS = {
    "numpy float64": np.zeros(1),
    "numpy float32": np.zeros(1, dtype=np.float32),
    "torch float64": torch.zeros(1, dtype=torch.float64),
    "strict float64": array_api_strict.asarray(np.zeros(1)),
}
E = np.eye(12)  # unit vectors, for constructed instances


def spectrum(kind: str, m: int) -> np.ndarray:
    """m singular values, the largest 1."""
    if kind == "decaying":
        return 0.3 ** np.arange(m)
    if kind == "clustered":
        return np.repeat([1.0, 0.01, 1e-4], math.ceil(m / 3))[:m] * (1 + 1e-9 * np.arange(m))
    if kind == "degenerate":
        return np.ones(m)
    return np.where(np.arange(m) < (m + 1) // 2, 1.0 / (1 + np.arange(m)), 0.0)  # rank-deficient


SPECTRA = ("decaying", "clustered", "degenerate", "rank-deficient")


def orthonormal(rng: np.random.Generator, d: int, m: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, m)))[0]


@st.composite
def streams(draw, kinds=tuple(KINDS), min_steps=1, max_d=8):
    """(columns, r, rho): each step's columns have a prescribed spectrum, in bases that steps may share.

    Three in four are of the paper's regime, r + n < d (§3.5); the others may have any sizes.
    """
    roomy = draw(st.sampled_from((True, True, True, False)))
    d = draw(st.integers(3 if roomy else 1, max_d))
    widest = draw(st.integers(1, d - 2)) if roomy else d
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shared = orthonormal(rng, d, d)
    columns = []
    for _ in range(draw(st.integers(min_steps, 6))):
        n = draw(st.integers(1, widest))
        basis = draw(st.sampled_from(("shared", "own")))
        left = shared[:, rng.permutation(d)[:n]] if basis == "shared" else orthonormal(rng, d, n)
        size = 10.0 ** draw(st.integers(-2, 2))
        s = size * spectrum(draw(st.sampled_from(SPECTRA)), n)
        columns.append((left * s) @ orthonormal(rng, n, n).T)
    like = KINDS[draw(st.sampled_from(kinds))]
    rho = draw(st.sampled_from((0.05, 0.5, 0.95, 0.99)))
    r = draw(st.integers(1, d - 1 - widest if roomy else d))
    return [device_array(X, like) for X in columns], r, rho


def assert_all(claims) -> None:
    for claim in claims:
        assert claim.holds(), (claim.name, claim.where, claim.slack / claim.scale / claim.unit)


def attained(claims: list[Inequality]) -> bool:
    return all(claim.attained() for claim in claims)


# ----------------------------------------------------------------------------------- the claims themselves


def test_norms_are_the_sums_of_singular_values():
    found = norms(orthonormal(np.random.default_rng(0), 3, 3) @ np.diag([1.0, -2.0, 3.0]))
    expected = {"spectral": 3, "Frobenius": math.sqrt(14), "nuclear": 6, "Ky-Fan 2": 5}
    assert found == pytest.approx(expected)


def test_claims_tell_rounding_from_violation():
    eps = np.finfo(np.float64).eps
    assert Inequality("", 1 + 4 * eps, 1.0, 1.0).holds()
    assert not Inequality("", 1 + 1e-13, 1.0, 1.0).holds()
    assert Inequality("", 1 + 1e-13, 1.0, 1.0).holds(1e-12)
    assert Inequality("", 1 + 1e-5, 1.0, 100.0, unit=2.0**-23).holds()
    assert Identity("", E, E * (1 + 4 * eps), 1.0).holds()
    assert not Identity("", E, E + 1e-13 * E[::-1], 1.0).holds()
    assert Identity("", 1.0, 1.0, 0.0).residual == 0
    assert Psd("", np.diag([1.0, -4 * eps]), 1.0).holds()
    assert not Psd("", np.diag([1.0, -1e-13]), 1.0).holds()
    assert not Psd("", np.array([[1.0, 1e-13], [0.0, 1.0]]), 1.0).holds(), "symmetry is part of the claim"


@pytest.mark.parametrize(
    ("columns", "r", "rho", "message"),
    [
        ([], 1, 0.5, "at least one step"),
        ([np.ones((2, 1))], 0, 0.5, "rank"),
        ([np.ones((2, 1))], 1, 1.0, "rho"),
        ([np.ones((2, 1)), np.ones((3, 1))], 1, 0.5, "step 1"),
        ([np.full((2, 1), np.nan)], 1, 0.5, "NaN"),
        ([np.ones((2, 1)), torch.ones(2, 1)], 1, 0.5, "one backend"),
    ],
)
def test_bad_input_is_named(columns, r, rho, message):
    with pytest.raises(InputError, match=message):
        trajectory(columns, r=r, rho=rho)


# ------------------------------------------------------------------------------------------ the propositions


@QUICK
@given(streams())
def test_every_claim_holds(stream):
    columns, r, rho = stream
    assert_all(propositions.claims(columns, r=r, rho=rho))


@QUICK
@given(streams())
def test_prop_3_1_brand_is_no_better_than_optimal_truncation(stream):
    columns, r, rho = stream
    t = trajectory(columns, r=r, rho=rho)
    for k in range(len(t)):
        assert_all(propositions.optimality(t, k))
        assert_all(propositions.untruncated(t, k))


@QUICK
@given(streams(min_steps=2), st.data())
def test_prop_3_2_expansion_and_every_term_psd(stream, data):
    columns, r, rho = stream
    i = data.draw(st.integers(0, len(columns) - 2))
    for overwrite in (), (i,):
        t = trajectory(columns, r=r, rho=rho, overwrite=overwrite)
        for q in range(1, len(t) - i):
            assert propositions.expansion(t, i, q).name == ("(12)" if overwrite else "(13)")
            assert_all([propositions.expansion(t, i, q), *propositions.expansion_terms(t, i, q)])


@QUICK
@given(streams(kinds=("numpy float64",), min_steps=3))
def test_prop_3_2_needs_B_as_initial_condition(stream):
    """(S.9) with the misprinted M_B,i in the place of B_i is off by exactly rho^q (M_B,i - B_i)."""
    columns, r, rho = stream
    t = trajectory(columns, r=r, rho=rho)
    right = propositions.expansion(t, 1, 1)
    misprinted = Identity("(S.9)", right.left, rho * (t.M[1] - t.M_B[1]), right.scale)
    lost = Identity("", right.left - misprinted.right, rho * (t.M_B[1] - t.B[1]), right.scale)
    assert right.holds() and lost.holds()
    assert misprinted.holds() == (rho * np.linalg.norm(t.M_B[1] - t.B[1]) <= TOLERANCE * t.unit * right.scale)


@QUICK
@given(streams(min_steps=2), st.data())
def test_overwriting_is_surely_better_at_the_next_step(stream, data):
    columns, r, rho = stream
    i = data.draw(st.integers(0, len(columns) - 2))
    pure = trajectory(columns, r=r, rho=rho)
    over = trajectory(columns, r=r, rho=rho, overwrite=(i,))
    assert_all(propositions.overwriting(pure, over, i))


@QUICK
@given(streams(min_steps=2))
def test_prop_4_1_error_is_the_average_of_the_terms(stream):
    columns, r, rho = stream
    t = trajectory(columns, r=r, rho=rho)
    assert_all(propositions.ea_sum(t, k, brand=False) for k in range(len(t)))
    assert_all(propositions.ea_sum(t, k, brand=True) for k in range(1, len(t)))
    first = propositions.brand_terms(t, len(t) - 1)
    again = trajectory(columns, r=r, rho=rho, overwrite=(0,))
    for one, other in zip(first, propositions.brand_terms(again, len(t) - 1), strict=True):
        assert np.array_equal(to_numpy(one), to_numpy(other)), "overwriting at 0 changes nothing"


@QUICK
@given(streams(min_steps=2))
def test_prop_4_2_and_triangle_inequality(stream):
    columns, r, rho = stream
    t = trajectory(columns, r=r, rho=rho)
    for k in range(1, len(t)):
        assert_all([propositions.no_update_supremum(t, k), *propositions.brand_term_bound(t, k)])
        assert_all([propositions.triangle(t, k, brand=False), propositions.triangle(t, k, brand=True)])
        assert float(np.abs(to_numpy(propositions.brand_terms(t, k)[-1])).max()) == 0, "E_k = 0"


@QUICK
@given(streams(kinds=("numpy float64",), min_steps=2))
def test_17_exceeds_the_error_by_the_inner_product(stream):
    columns, r, rho = stream
    t = trajectory(columns, r=r, rho=rho)
    for j in range(1, len(t)):
        bound = propositions.no_update_supremum(t, j)
        inner = float(np.sum(t.gram(j) * t.M_R[0]))
        gap = Identity("", bound.large**2 - bound.small**2, 2 * inner, bound.scale**2)
        assert gap.holds() and inner >= -TOLERANCE * t.unit * bound.scale**2


@QUICK
@given(streams(min_steps=2))
def test_one_brand_update_is_no_worse_than_none(stream):
    columns, r, rho = stream
    assert_all(propositions.brand_or_nothing(trajectory(columns, r=r, rho=rho)))


@QUICK
@given(streams(kinds=("numpy float64", "torch float64"), min_steps=2, max_d=4), st.integers(0, 99))
def test_compressed_stream_makes_the_same_claims(stream, seed):
    columns, r, rho = stream
    d, N = columns[0].shape[0], sum(X.shape[1] for X in columns)
    Q = device_array(orthonormal(np.random.default_rng(seed), 30, d), columns[0])
    wide = [Q @ X for X in columns]
    short = propositions.compress(wide)
    assert short[0].shape[0] == min(30, N)
    # EVDs of tied modes may differ, and so may the processes after them, so compare what has no choice in it.
    one, other = trajectory(wide, r=r, rho=rho), trajectory(short, r=r, rho=rho)
    for k in range(len(one)):
        for M, m in ((one.M[k], other.M[k]), (one.M[k] - one.M_R[k], other.M[k] - other.M_R[k])):
            a, b = norms(M), norms(m)
            assert all(
                abs(a[norm] - b[norm]) <= 1e-12 * one.size[k] for norm in ("Frobenius", "nuclear", "spectral")
            )
    assert_all(propositions.claims(short, r=r, rho=rho))


def test_claims_notice_a_process_that_is_slightly_wrong():
    rng = np.random.default_rng(0)
    t = trajectory([rng.standard_normal((5, 2)) for _ in range(5)], r=2, rho=0.9)
    wrong = 1 + 1e-12
    too_big = replace(t, B=tuple(B + 1e-12 * np.eye(5) for B in t.B))
    assert not propositions.expansion(too_big, 1, 3).holds()
    assert not all(claim.holds() for claim in propositions.expansion_terms(too_big, 1, 3))
    assert not propositions.ea_sum(replace(t, M_B=tuple(wrong * M for M in t.M_B)), 3, brand=True).holds()
    assert not propositions.ea_sum(replace(t, M=tuple(wrong * M for M in t.M)), 3, brand=False).holds()
    no_optimum = replace(t, M_R=tuple(propositions.optimal(M, 1) for M in t.M))
    assert not all(claim.holds() for claim in propositions.optimality(no_optimum, 0))
    forgetful = replace(t, B=tuple(0 * B for B in t.B))
    assert not all(claim.holds() for claim in propositions.brand_term_bound(forgetful, 3))
    M, X = t.M[3], LowRank(E[:5, :2], np.array([0.2, 0.1]))
    half = propositions.correction(M, X.dense(), (X.dense() + correct(X, M, np.array([0])).dense()) / 2, E[:5, :1])
    assert [claim.holds() for claim in half] == [True, False, False]


# ------------------------------------------------------------------------------------------------- tightness


def orthogonal_stream(steps: int, r: int, n: int, *, repeat: bool = False) -> list[np.ndarray]:
    """r strong columns, then n weak ones a step, orthogonal to all before (or the same ones again and again)."""
    columns = [10 * E[:, :r]]
    for k in range(steps - 1):
        at = r if repeat else r + k * n
        columns.append(E[:, at : at + n])
    return columns


@pytest.mark.parametrize(("r", "n", "rho"), [(1, 1, 0.5), (2, 3, 0.95), (3, 2, 0.8)])
def test_11_is_attained_where_something_is_discarded(r, n, rho):
    t = trajectory(orthogonal_stream(4, r, n), r=r, rho=rho)
    for k in range(2, 4):
        claims = propositions.optimality(t, k)
        assert attained(claims)
        assert min(claim.small / claim.scale for claim in claims) > 1e-4, "not merely 0 = 0"


@QUICK
@given(streams())
def test_11_is_attained_where_nothing_is_discarded(stream):
    columns, _, rho = stream
    t = trajectory(columns, r=columns[0].shape[0], rho=rho)
    assert all(attained(propositions.optimality(t, k)) for k in range(len(t)))


def test_17_is_attained_only_by_orthogonal_columns():
    t = trajectory(orthogonal_stream(4, 2, 3), r=2, rho=0.9)
    for j in range(1, 4):
        assert propositions.no_update_supremum(t, j).attained()
        assert propositions.no_update_supremum(t, j).small > np.linalg.norm(t.gram(j))
    tilted = trajectory([10 * E[:, :2], E[:, 2:5] + 0.1 * E[:, :3]], r=2, rho=0.9)
    assert propositions.no_update_supremum(tilted, 1).slack > 1e-3


def test_18_is_attained_by_weak_orthogonal_columns():
    t = trajectory(orthogonal_stream(4, 2, 3), r=2, rho=0.9)
    for j in range(1, 4):
        assert attained(propositions.brand_term_bound(t, j))
    strong = trajectory([E[:, :2], 10 * E[:, 2:4]], r=2, rho=0.9)
    assert min(claim.slack for claim in propositions.brand_term_bound(strong, 1)) > 1


def test_19_is_attained_for_both_methods_at_both_worst_cases():
    """One weak orthogonal column again and again attains (17), (18) and (19) at once: no slack in §4.1's chain."""
    t = trajectory(orthogonal_stream(5, 2, 1, repeat=True), r=2, rho=0.9)
    for k in range(1, 5):
        assert propositions.no_update_supremum(t, k).attained()
        assert attained(propositions.brand_term_bound(t, k))
        nothing, brand = propositions.triangle(t, k, brand=False), propositions.triangle(t, k, brand=True)
        assert nothing.attained() and brand.attained()
        assert nothing.small > brand.small + 1
        assert k == 1 or brand.small > 0.01


def test_19_is_attained_with_an_initial_error():
    t = trajectory([10 * E[:, :2] + 2 * E[:, 2:4]] * 3, r=1, rho=0.9)
    claim = propositions.triangle(t, 2, brand=False)
    assert claim.attained() and claim.small > 1
    slack = trajectory([np.diag([3.0, 2.0, 0.0]), E[:3, :1], E[:3, 2:3]], r=1, rho=0.5)
    assert propositions.triangle(slack, 2, brand=False).slack > 0.1


# ------------------------------------------------------------ what the paper leaves open: examples each way


def integer_columns(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.float64)[:, None] for row in rows]


# Found by a seeded search over columns with entries -3..3, d = 3 > r + n = 2, with no ties in any truncation.
OVERWRITTEN_BETTER = integer_columns(
    [[-2, -3, -3], [1, 3, -3], [-2, 1, -3], [-1, -2, 1], [0, 1, -1], [3, 3, -2]],
)
PURE_BETTER_2 = integer_columns([[2, 1, -3], [3, 3, 1], [0, -1, -3], [2, 1, -1], [3, -2, 0]])
PURE_BETTER_3 = integer_columns([[-3, 3, -3], [-3, 1, 2], [-1, 1, 3], [-3, 3, 0], [3, -2, 1], [-2, 3, -1]])


@pytest.mark.parametrize(
    ("columns", "i", "q", "overwritten_is_better"),
    [
        (OVERWRITTEN_BETTER, 3, 2, True),
        (OVERWRITTEN_BETTER, 2, 3, True),
        (PURE_BETTER_2, 2, 2, False),
        (PURE_BETTER_3, 2, 3, False),
    ],
)
def test_after_the_next_step_overwriting_may_go_either_way(columns, i, q, overwritten_is_better):
    """§3.3 for q >= 2: by at least a fifth, and in every unitarily invariant norm at once."""
    pure = trajectory(columns, r=1, rho=0.5)
    over = trajectory(columns, r=1, rho=0.5, overwrite=(i,))
    for claim in propositions.overwriting(pure, over, i, q):
        better, worse = (claim.small, claim.large) if overwritten_is_better else (claim.large, claim.small)
        assert better < 0.8 * worse, claim.where
    assert_all(propositions.overwriting(pure, over, i, 1))


@pytest.mark.parametrize("ratio", [1.5, 10.0, 19.0])
def test_pure_and_overwritten_processes_need_not_converge(ratio):
    """§3.3 argues that the two converge as q grows. On a constant stream they need not.

    X = [e1, sqrt(ratio) e2] for ever, after a start in e1 alone. B keeps e1 as long as ratio < 1 / (1 - rho):
    every step shows it only (1 - rho) ratio of e2, which is less than the 1 of e1, and is discarded. So the pure
    process misses rho ratio e2 e2^T for ever, the overwritten one only rho e1 e1^T.
    """
    rho, late = 0.95, 400
    X = np.stack([E[:5, 0], math.sqrt(ratio) * E[:5, 1]], axis=1)
    columns = [E[:5, :1], *[X] * late]
    pure = trajectory(columns, r=1, rho=rho)
    over = trajectory(columns, r=1, rho=rho, overwrite=(100,))
    for claim in propositions.overwriting(pure, over, 100, late - 100):
        assert claim.large == pytest.approx(rho * ratio) and claim.small == pytest.approx(rho)


def test_b_updates_may_be_worse_than_no_update():
    """Footnote 15. A passing burst along e2 makes B forget e1, and then B sees e1 only (1 - rho) at a time."""
    rho = 0.8
    columns = [E[:4, :1], 2.02 * E[:4, 1:2], E[:4, :1], E[:4, :1]]
    t = trajectory(columns, r=1, rho=rho)
    assert all(claim.slack < -0.01 * claim.large for claim in propositions.brand_or_nothing(t, 3))
    assert_all(propositions.brand_or_nothing(t, 1))


# ------------------------------------------------------------------------------------------- the correction


def run(process: Process, columns, rho: float):
    """(M_k, estimate_k) after every step, by the process protocol."""
    factor = EAFactor(rho)
    for k, X in enumerate(columns):
        process.begin(k, factor)
        factor.update(X)
        process.update(k, X, factor)
        yield factor.M + 0.0, process.estimate.lowrank


@QUICK
@given(streams(kinds=("numpy float64", "numpy float32", "torch float64"), min_steps=2), st.data())
def test_footnote_11_correction_removes_exactly_one_block(stream, data):
    columns, r, rho = stream
    for M, X in run(Brand(rank=r, rho=rho), columns, rho):
        alive = np.flatnonzero(to_numpy(X.D) > 0)
        if len(alive) == 0:
            continue
        idx = np.array(sorted(data.draw(st.sets(st.sampled_from(alive.tolist()), min_size=1))))
        U = compat.array_namespace(M).take(X.U, device_array(idx, M), axis=1)
        after = correct(X, M, idx).dense()
        assert_all(propositions.correction(M, X.dense(), after, U))
        error = M - X.dense()
        unit, size = propositions.eps(M), norms(M)["spectral"]
        total = norms(error)["Frobenius"] ** 2
        assert abs(sum(propositions.blocks(error, U)) - total) <= TOLERANCE * unit * X.d * size * max(
            total**0.5, unit * size
        )


CORRELATED = np.array([[1.0, 0.9], [0.9, 1.0]])


def test_correction_may_break_psd_and_overestimate_though_the_error_falls():
    """§3.4 says B-KFAC "can only underestimate singular-values"; after one correction that is no longer so."""
    before = LowRank(E[:2, :2], np.array([0.14, 0.05]))
    assert np.linalg.eigvalsh(CORRELATED - before.dense())[0] > 1e-3, "M - M~ is p.s.d. before"
    after = correct(before, CORRELATED, np.array([1]))
    assert_all(propositions.correction(CORRELATED, before.dense(), after.dense(), E[:2, 1:2]))
    assert np.linalg.norm(CORRELATED - after.dense()) < np.linalg.norm(CORRELATED - before.dense()) - 0.1
    assert np.linalg.eigvalsh(CORRELATED - after.dense())[0] < -0.5
    assert not Psd("", CORRELATED - after.dense(), 1.0).holds()
    # The second singular value: overestimated, by 4/10 of itself.
    assert np.linalg.eigvalsh(after.dense())[0] > 1.3 * np.linalg.eigvalsh(CORRELATED)[0]


def test_correction_breaks_psd_inside_algorithm_7():
    """The same in a run of B-KFAC-C, against the B-KFAC that it corrects."""
    rng = np.random.default_rng(0)
    columns = [rng.standard_normal((6, 2)) for _ in range(6)]
    corrected = BrandCorrected(rank=2, rho=0.8, T_corct=5, phi_corct=0.5)
    pure = Brand(rank=2, rho=0.8)
    (M, after), (_, before) = list(run(corrected, columns, 0.8))[-1], list(run(pure, columns, 0.8))[-1]
    size = norms(M)["spectral"]
    assert Psd("", M - before.dense(), size).holds()
    assert np.linalg.eigvalsh(M - after.dense())[0] < -0.01 * size
    assert np.linalg.norm(M - after.dense()) < np.linalg.norm(M - before.dense())


# --------------------------------------------------------------------------------- a finite projection error


@QUICK
@given(
    d=st.integers(2, 10),
    kind=st.sampled_from(SPECTRA),
    r=st.integers(1, 4),
    q=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_rs_rsvd_never_overestimates(d, kind, r, q, seed):
    """(M Q Q^T M)^(1/2) <= M: the square root is operator monotone."""
    rng = np.random.default_rng(seed)
    V = orthonormal(rng, d, d)
    M = (V * spectrum(kind, d)) @ V.T
    M = (M + M.T) / 2
    estimate = rsvd(M, r, oversampling=0, n_pwr_it=q, rng=rng)
    assert Psd("RS", M - estimate.dense(), 1.0).holds()


def test_sre_rsvd_breaks_psd_where_rs_keeps_it():
    V = orthonormal(np.random.default_rng(3), 6, 6)
    M = (V * spectrum("decaying", 6)) @ V.T
    sre, rs = (
        method(M, 2, oversampling=0, n_pwr_it=0, rng=np.random.default_rng(4)).dense() for method in (srevd, rsvd)
    )
    assert np.linalg.eigvalsh(M - sre)[0] < -0.001
    assert not Psd("SRE", M - sre, 1.0).holds()
    assert Psd("RS", M - rs, 1.0).holds()


@QUICK
@given(streams(kinds=("numpy float64", "numpy float32"), min_steps=3), st.integers(0, 99))
def test_prop_3_2_order_survives_overwriting_by_an_inexact_rs_rsvd(stream, seed):
    columns, r, rho = stream
    process = BrandRsvd(rank=r, oversampling=0, n_pwr_it=0, seed=seed, rho=rho, T_rsvd=2)
    for M, X in run(process, columns, rho):
        size = norms(M)["spectral"]
        assert Psd("", M - X.dense(), size, unit=propositions.eps(M)).holds()


# ----------------------------------------------------------------------- the trajectories are the real code's


def tied(t: propositions.Trajectory) -> bool:
    """Whether some truncation has a choice: modes r and r + 1 too close to tell apart."""
    if t.r >= t.d:
        return False
    kept = [np.linalg.eigvalsh(to_numpy(M))[::-1] for M in (*t.M, *t.M_B)]
    return any(1e-12 * w[0] < w[t.r - 1] and w[t.r - 1] - w[t.r] < 1e-3 * w[0] for w in kept)


@QUICK
@given(streams(kinds=("numpy float64", "torch float64"), min_steps=2), st.integers(1, 3))
def test_processes_are_the_trajectories(stream, period):
    columns, r, rho = stream
    steps = len(columns)
    pure = trajectory(columns, r=r, rho=rho)
    # Algorithm 5 overwrites B_{k-1} when k is a multiple of T_RSVD.
    over = trajectory(columns, r=r, rho=rho, overwrite=range(period - 1, steps, period))
    assume(not tied(pure) and not tied(over))
    d = pure.d

    cases = [
        (Evd(T_inv=1), pure.M),
        (Rsvd(rank=r, oversampling=d, T_inv=1), pure.M_R),
        (Rsvd(rank=r, oversampling=d, T_inv=1000), [pure.M_R[0]] * steps),
        (Brand(rank=r, rho=rho), pure.M_B),
        (BrandRsvd(rank=r, oversampling=d, rho=rho, T_rsvd=period), over.M_B),
    ]
    for process, expected in cases:
        for k, (M, X) in enumerate(run(process, columns, rho)):
            name, size = type(process).__name__, max(pure.size)
            assert Identity(name, M, pure.M[k], size).holds(1e-12)
            assert Identity(name, X.dense(), expected[k], size).holds(1e-10), (name, k)
            if type(process) is Brand:
                assert Identity("B", X.truncate(r).dense(), pure.B[k], size).holds(1e-10)
