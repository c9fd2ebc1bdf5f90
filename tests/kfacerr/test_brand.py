"""Algorithms 2 and 3 are exact, on every backend, whatever the columns; and stay so over 1000 updates."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kfacerr.brand import PROBES, TOLERATED, brand, carried, orthonormalised, symmetric_brand
from kfacerr.exceptions import InputError
from kfacerr.lowrank import LowRank
from kfacerr.processes import Brand
from tests import reference
from tests.strategies import COLUMNS, factorisations, generators, orthogonal, special_columns, spectrum, stream

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])


def slack(dtype, size: int) -> float:
    """A small multiple of eps: 2e-13 in float64 and 1e-4 in float32 at size 25."""
    return 32 * size * float(np.finfo(dtype).eps)


def defect(low: LowRank, xp) -> float:
    """max |U^T U - I| on the modes that are there."""
    U = xp.numpy(low.U)[:, xp.numpy(low.D) > 0]
    return float(np.abs(U.T @ U - np.eye(U.shape[1])).max(initial=0))


def assert_is_evd_of(low: LowRank, M: np.ndarray, xp, dtype) -> None:
    D, tolerance = xp.numpy(low.D), slack(dtype, M.shape[0] + 1)
    size = np.linalg.norm(M)
    assert np.linalg.norm(xp.numpy(low.dense()) - M) <= tolerance * size
    assert (D >= 0).all() and (np.diff(D) <= 0).all()
    expected = np.linalg.eigvalsh(M)[::-1][: len(D)]
    assert np.abs(D[: len(expected)] - expected).max(initial=0) <= tolerance * size
    assert defect(low, xp) <= min(1e-4, 10 * tolerance)


@DTYPES
@given(data=st.data())
def test_algorithm_2_is_the_svd_of_the_sum(xp, dtype, data):
    m, d = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    r, n = data.draw(st.integers(0, min(m, d))), data.draw(st.integers(0, 4))
    U, D = data.draw(factorisations(m, r))
    V, _ = data.draw(factorisations(d, r))
    rng, kinds = data.draw(generators), st.sampled_from(COLUMNS)
    A = special_columns(rng, data.draw(kinds), rng.standard_normal((m, n)), U)
    B = special_columns(rng, data.draw(kinds), rng.standard_normal((d, n)), V)
    given_arrays = [xp.array(x, dtype) for x in (U, D, V, A, B)]
    U, D, V, A, B = (xp.numpy(x) for x in given_arrays)
    X = U @ np.diag(D) @ V.T + A @ B.T
    got = [xp.numpy(x) for x in brand(*given_arrays)]
    q = min(r + n, m, d)
    tolerance = slack(dtype, m + d)
    size = np.linalg.norm(D) + np.linalg.norm(A) * np.linalg.norm(B)
    assert [x.shape for x in got] == [(m, q), (q,), (d, q)]
    assert np.linalg.norm(got[0] * got[1] @ got[2].T - X) <= tolerance * size
    assert (got[1] >= 0).all() and (np.diff(got[1]) <= 0).all()
    for Q in (got[0], got[2]):
        assert np.abs(Q.T @ Q - np.eye(q)).max(initial=0) <= tolerance
    singular = np.linalg.svd(X, compute_uv=False)[:q]
    assert np.abs(got[1][: len(singular)] - singular).max(initial=0) <= tolerance * size


@given(rng=generators)
def test_algorithm_2_agrees_with_its_printed_form(xp, rng):
    m, d, r, n = 11, 9, 3, 2
    U, V, D = orthogonal(rng, m)[:, :r], orthogonal(rng, d)[:, :r], spectrum("slow decay", r)
    A, B = rng.standard_normal((m, n)), rng.standard_normal((d, n))
    _, printed, _ = reference.brand(U, D, V, A, B)
    _, ours, _ = brand(*(xp.array(x) for x in (U, D, V, A, B)))
    np.testing.assert_allclose(xp.numpy(ours), printed, rtol=0, atol=slack(float, m) * printed[0])


@DTYPES
@given(data=st.data())
def test_algorithm_3_is_the_evd_of_the_sum(xp, dtype, data):
    d = data.draw(st.integers(1, 20), label="d")
    r, n = data.draw(st.integers(0, d), label="r"), data.draw(st.integers(0, 6), label="n")
    U, D = data.draw(factorisations(d, r))
    rng, kind = data.draw(generators), data.draw(st.sampled_from(COLUMNS))
    A = special_columns(rng, kind, rng.standard_normal((d, n)) / d**0.5, U)
    U32, D32, A32 = (xp.array(x, dtype) for x in (U, D, A))
    U, D, A = (xp.numpy(x) for x in (U32, D32, A32))
    low = symmetric_brand(LowRank(U32, D32) if r else None, A32)
    assert low.m == min(r + n, d)
    assert_is_evd_of(low, (U * D) @ U.T + A @ A.T, xp, dtype)


@given(rng=generators)
def test_algorithm_3_agrees_with_its_printed_form(xp, rng):
    d, r, n = 13, 4, 3
    U, D, A = orthogonal(rng, d)[:, :r], spectrum("fast decay", r), rng.standard_normal((d, n))
    UX, DX = reference.symmetric_brand(U, D, A)
    low = symmetric_brand(LowRank(xp.array(U), xp.array(D)), xp.array(A))
    np.testing.assert_allclose(xp.numpy(low.D), DX, rtol=0, atol=slack(float, d) * DX[0])
    overlap = np.abs(np.sum(xp.numpy(low.U) * UX, axis=0))
    np.testing.assert_allclose(overlap, 1, atol=1e-8)


@DTYPES
@pytest.mark.parametrize(
    ("d", "r", "n"),
    [(1, 1, 1), (1, 0, 1), (1, 0, 3), (5, 2, 0), (5, 0, 0), (6, 0, 9), (6, 2, 4), (6, 3, 9), (6, 6, 1), (7, 2, 1)],
)
def test_every_shape_is_defined(xp, dtype, d, r, n):
    rng = np.random.default_rng(0)
    U, D, A = orthogonal(rng, d)[:, :r], spectrum("slow decay", r), rng.standard_normal((d, n))
    U, D, A = (xp.array(x, dtype) for x in (U, D, A))
    low = symmetric_brand(LowRank(U, D), A)
    U, D, A = (xp.numpy(x) for x in (U, D, A))
    assert low.m == min(r + n, d)
    assert_is_evd_of(low, (U * D) @ U.T + A @ A.T, xp, dtype)


@DTYPES
def test_a_tiny_column_orthogonal_to_all_others_keeps_its_mode(xp, dtype):
    d = 8
    A = np.eye(d)[:, :3]
    A[2, 2] = 1e-5
    low = symmetric_brand(None, xp.array(A, dtype))
    np.testing.assert_allclose(xp.numpy(low.D), [1, 1, 1e-10], rtol=1e-6)


@DTYPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_column_in_the_span_adds_no_mode(xp, dtype, scale):
    rng = np.random.default_rng(1)
    U = xp.array(orthogonal(rng, 20)[:, :4], dtype)
    A = U @ xp.array(scale * rng.standard_normal((4, 2)), dtype)
    low = symmetric_brand(LowRank(U, xp.array(spectrum("slow decay", 4), dtype)), A)
    assert (xp.numpy(low.D)[4:] == 0).all() and (xp.numpy(low.D)[:4] > 0).all()


@given(
    rng=generators,
    residual=st.sampled_from([10.0**-e for e in range(1, 8)]),
    kind=st.sampled_from(["slow decay", "fast decay", "graded"]),
)
@example(rng=np.random.default_rng(7), residual=1e-3, kind="slow decay")
def test_columns_nearly_in_the_span_or_nearly_equal_cost_no_orthonormality(xp, rng, residual, kind):
    """A single Gram step loses up to 0.4 here: the modes in doubt are made orthonormal by a second."""
    d, r, n = 40, 8, 6
    U = orthogonal(rng, d)[:, :r]
    near = U @ rng.standard_normal((r, n)) / r**0.5
    alike = rng.standard_normal((d, 1)) / d**0.5 + 0 * near
    for base in (near, alike):
        A = base + residual * rng.standard_normal((d, n)) / d**0.5
        for dtype in (np.float32, np.float64):
            inputs = [xp.array(x, dtype) for x in (U, spectrum(kind, r), A)]
            low = symmetric_brand(LowRank(*inputs[:2]), inputs[2])
            assert defect(low, xp) <= slack(dtype, d) / 4
            V, D, C = (xp.numpy(x) for x in inputs)
            M = (V * D) @ V.T + C @ C.T
            assert np.linalg.norm(xp.numpy(low.dense()) - M) <= slack(dtype, d) * np.linalg.norm(M)


def test_orthonormalising_repairs_a_drifted_basis_without_changing_the_matrix(xp):
    rng = np.random.default_rng(3)
    U = orthogonal(rng, 30)[:, :6] + 1e-3 * rng.standard_normal((30, 6))
    U[:, 5] = 0
    D = np.array([1, 0.5, 1e-2, 1e-4, 1e-9, 0])
    low = orthonormalised(LowRank(xp.array(U), xp.array(D)))
    M = (U * D) @ U.T
    assert defect(low, xp) <= slack(float, 6)
    assert np.linalg.norm(xp.numpy(low.dense()) - M) <= slack(float, 6)
    assert xp.numpy(low.D)[5] == 0 and (xp.numpy(low.D)[:5] > 0).all()


def _streams_float32(kind: str, d: int, n: int, r: int, steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    if kind == "decaying":
        return stream(rng, d=d, n=n, steps=steps, decay="slow decay", dtype=np.float32)
    kinds = ("plain", "zero", "repeated", "in span", "nearly in span", "huge", "tiny", "all zero", "plain")
    if kind == "rank at most r":
        inside = stream(rng, d=r, n=n, steps=steps, kinds=kinds, decay="slow decay")
        Q = orthogonal(rng, d)[:, :r]
        return [(Q @ X).astype(np.float32) for X in inside]
    # a gap at the cut: r strong directions, the rest a thousandth of them
    Q = orthogonal(rng, d)
    levels = np.where(np.arange(d) < r, 1.0, 1e-3)
    X = [(Q * levels) @ rng.standard_normal((d, n)) / n**0.5 for _ in range(steps)]
    return [
        special_columns(rng, kinds[k % 9], x, X[k - 1] if k else None).astype(np.float32) for k, x in enumerate(X)
    ]


@pytest.mark.parametrize("kind", ["decaying", "rank at most r", "gap"])
def test_a_thousand_float32_updates_stay_orthonormal_ordered_and_near_float64(fast_xp, kind):
    d, n, r, rho = 48, 6, 12, 0.95
    process, exact = Brand(rank=r, rho=rho), Brand(rank=r, rho=rho)
    for k, X in enumerate(_streams_float32(kind, d, n, r, 1000)):
        process.update(k, fast_xp.array(X), None)
        exact.update(k, X.astype(np.float64), None)
        low = process.estimate.lowrank
        D = fast_xp.numpy(low.D)
        assert (D >= 0).all() and (np.diff(D) <= 0).all()
        if k % 10 and k < 990:
            continue
        assert defect(low, fast_xp) <= 1e-4
        carried = orthonormalised(low.truncate(r))
        assert defect(carried, fast_xp) <= 1e-4
        M = exact.estimate.lowrank.dense()
        assert np.linalg.norm(fast_xp.numpy(low.dense()) - M) <= 1e-4 * np.linalg.norm(M)


@pytest.mark.parametrize("seed", [10, 50, 57])
def test_float32_stays_near_float64_while_a_burst_fades(fast_xp, seed):
    """Beside two columns 1e6 times the others M is near float64's rounding; 250 updates later that is all of M."""
    rng = np.random.default_rng(seed)
    burst = 10 ** rng.uniform(4, 7.5)
    root = 0.04 * orthogonal(rng, 31) * np.sqrt(spectrum("slow decay", 31))
    single, double = (Brand(rank=6, rho=0.9) for _ in range(2))
    for k in range(300):
        X = root @ rng.standard_normal((31, 3)) / 3**0.5
        if k == 12:
            X[:, rng.choice(3, size=2, replace=False)] *= burst
        X = X.astype(np.float32)
        single.update(k, fast_xp.array(X), None)
        double.update(k, X.astype(float), None)
        expected = double.estimate.lowrank.dense()
        got = fast_xp.numpy(single.estimate.lowrank.dense()).astype(float)
        assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected), k
        assert defect(single.estimate.lowrank, fast_xp) <= 1e-4


def test_float64_gram_updates_follow_the_dense_process(fast_xp):
    kinds = ("plain", "zero", "repeated", "in span", "huge", "tiny")
    columns = stream(np.random.default_rng(5), d=30, n=4, steps=60, kinds=kinds, decay="slow decay")
    process = Brand(rank=7, rho=0.9)
    for k, (X, M) in enumerate(zip(columns, reference.bkfac(columns, 0.9, 7), strict=True)):
        process.update(k, fast_xp.array(X), None)
        error = np.linalg.norm(fast_xp.numpy(process.estimate.lowrank.dense()) - M)
        assert error <= 1e-10 * np.linalg.norm(M)
        assert defect(process.estimate.lowrank, fast_xp) <= 1e-10


def test_bkfac_never_allocates_a_d_by_d_array():
    d, n, r = 16384, 8, 16
    rng = np.random.default_rng(0)
    columns = [rng.standard_normal((d, n), dtype=np.float32) for _ in range(4)]
    columns.append(np.repeat(columns[0][:, :1], n, axis=1) + 1e-3 * columns[1])  # takes the second Gram step
    process = Brand(rank=r, rho=0.95)
    tracemalloc.start()
    try:
        for k, X in enumerate(columns):
            process.update(k, X, None)
        process.estimate.lowrank.apply(columns[0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < d * d * 4 / 50


def test_columns_that_do_not_fit_are_refused(xp):
    low = LowRank(xp.array(np.eye(4)[:, :2]), xp.array(np.ones(2)))
    for bad in (np.ones((5, 1)), np.ones(4), np.ones((4, 1), dtype=np.int64), np.ones((4, 1), dtype=np.float32)):
        with pytest.raises(InputError):
            symmetric_brand(low, xp.array(bad))
    with pytest.raises(InputError, match="NaN or Inf"):
        symmetric_brand(low, xp.array(np.full((4, 1), np.nan)))
    with pytest.raises(InputError, match="as many columns"):
        brand(low.basis, low.D, low.basis, xp.array(np.ones((4, 1))), xp.array(np.ones((4, 2))))


@DTYPES
@pytest.mark.parametrize("n", [0, 1, PROBES - 1, PROBES, 12])
@pytest.mark.parametrize("formed", [True, False])
def test_carried_modes_stay_as_they_are_unless_they_have_drifted(xp, dtype, n, formed):
    """[U, w A] and its products are those written out; and only a U that drifted is made orthonormal."""
    rng = np.random.default_rng(n)
    Q, rotation = orthogonal(rng, 60)[:, :20], orthogonal(rng, 20)
    A, D = rng.standard_normal((60, n)), np.linspace(2, 1, 20)
    for drift in (0, 1e-2):
        basis = Q * (1 + drift * (np.arange(20) == 3))
        U = (basis if formed else basis @ rotation)[:, :15]
        held = (basis, D) if formed else (basis, D, rotation)
        low, augmented = carried(LowRank(*(xp.array(x, dtype) for x in held)), 15, xp.array(A, dtype), 0.3)
        Y = xp.numpy(augmented.Y)
        tolerance = slack(dtype, 60)
        assert np.abs(Y[:, 15:] - 0.3 * A).max(initial=0) <= tolerance
        assert np.abs(xp.numpy(augmented.products) - Y.T @ Y[:, 15:]).max(initial=0) <= tolerance * 60
        assert defect(low, xp) <= TOLERATED * float(np.finfo(dtype).eps)
        same = np.abs(xp.numpy(low.U) - U).max() <= tolerance
        assert same == (drift == 0)
