"""Hypothesis strategies over NumPy data: prescribed spectra and column streams, never raw noise alone."""

import numpy as np
from hypothesis import strategies as st

from kfacerr.stream import Step

SPECTRA = ("fast decay", "slow decay", "clustered", "degenerate", "rank deficient", "graded")


def spectrum(kind: str, d: int) -> np.ndarray:
    """(d,) eigenvalues of a p.s.d. matrix, descending, the largest 1."""
    i = np.arange(d)
    match kind:
        case "fast decay":
            return np.exp(-0.5 * i)
        case "slow decay":
            return 1 / (1 + 0.2 * i)
        case "clustered":  # a cluster of width 1e-9 at the top, then one at 1e-3
            return np.where(i < (d + 1) // 2, 1 - 1e-9 * i, 1e-3 * (1 - 1e-6 * i))
        case "degenerate":
            return np.where(i < (d + 1) // 2, 1.0, 0.25)
        case "rank deficient":
            return np.where(i < max(1, d // 3), 1 / (1.0 + i), 0.0)
        case _:  # ten orders of magnitude
            return 10 ** (-10 * i / max(1, d - 1))


def orthogonal(rng: np.random.Generator, d: int) -> np.ndarray:
    """(d, d) orthogonal, Haar up to signs."""
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def psd(rng: np.random.Generator, kind: str, d: int) -> np.ndarray:
    """(d, d) symmetric p.s.d. with the prescribed spectrum."""
    Q = orthogonal(rng, d)
    M = (Q * spectrum(kind, d)) @ Q.T
    return (M + M.T) / 2


generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
rhos = st.sampled_from([0.3, 0.5, 0.9, 0.95, 0.99])


@st.composite
def psd_matrices(draw: st.DrawFn, max_d: int = 16, kinds: tuple[str, ...] = SPECTRA) -> np.ndarray:
    """Symmetric p.s.d. matrices with one of the prescribed spectra."""
    return psd(draw(generators), draw(st.sampled_from(kinds)), draw(st.integers(1, max_d)))


@st.composite
def factorisations(draw: st.DrawFn, d: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(U, D) of a rank-m representation, m <= d; trailing D may be 0."""
    rng = draw(generators)
    return orthogonal(rng, d)[:, :m], spectrum(draw(st.sampled_from(SPECTRA)), m)


COLUMNS = ("plain", "zero", "repeated", "in span", "nearly in span", "huge", "tiny", "all zero")


def special_columns(rng: np.random.Generator, kind: str, X: np.ndarray, span: np.ndarray | None) -> np.ndarray:
    """X (d, n) with one or more columns made special; `span` (d, m) is what "in span" refers to."""
    X = X.copy()
    d, n = X.shape
    if n == 0:
        return X
    j = int(rng.integers(n))
    match kind:
        case "zero":
            X[:, j] = 0
        case "repeated":
            X[:, j] = X[:, 0]
        case "in span" | "nearly in span" if span is not None and span.shape[1]:
            X[:, j] = span @ rng.standard_normal(span.shape[1])
            if kind == "nearly in span":
                X[:, j] += 10 ** rng.uniform(-7, -1) * np.linalg.norm(X[:, j]) * rng.standard_normal(d)
        case "huge":
            X[:, j] *= 1e3
        case "tiny":
            X[:, j] *= 1e-3
        case "all zero":
            X[:] = 0
    return X


def stream(
    rng: np.random.Generator,
    *,
    d: int,
    n: int,
    steps: int,
    kinds: tuple[str, ...] = ("plain",),
    decay: str = "fast decay",
    dtype: type = np.float64,
) -> list[np.ndarray]:
    """`steps` matrices of columns (d, n) of one covariance, each made special in one of the ways `kinds`."""
    root = orthogonal(rng, d) * np.sqrt(spectrum(decay, d))
    columns: list[np.ndarray] = []
    for k in range(steps):
        X = root @ rng.standard_normal((d, n)) / max(1, n) ** 0.5
        X = special_columns(rng, kinds[k % len(kinds)], X, columns[-1] if columns else None)
        columns.append(X.astype(dtype))
    if columns and not columns[0].any() and n:
        columns[0][0, 0] = 1  # a first factor of zero has nothing to invert
    return columns


@st.composite
def streams(
    draw: st.DrawFn,
    *,
    d: st.SearchStrategy[int] | None = None,
    n: st.SearchStrategy[int] | None = None,
    steps: st.SearchStrategy[int] | None = None,
    kinds: tuple[str, ...] = COLUMNS,
    dtype: type = np.float64,
) -> list[np.ndarray]:
    """Streams of columns with any mix of special ones."""
    chosen = tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4)))
    return stream(
        draw(generators),
        d=draw(d if d is not None else st.integers(1, 14)),
        n=draw(n if n is not None else st.integers(1, 4)),
        steps=draw(steps if steps is not None else st.integers(1, 8)),
        kinds=chosen,
        decay=draw(st.sampled_from(("fast decay", "slow decay"))),
        dtype=dtype,
    )


def layer_steps(scale: float = 1.0) -> list[Step]:
    """Thirty steps of a layer with d_A = 15, d_G = 8, n = 3, an update in five; G's columns are scaled."""
    columns = [
        stream(np.random.default_rng(i), d=d, n=3, steps=30, decay="slow decay") for i, d in ((1, 15), (2, 8))
    ]
    return [Step(k, a, scale * g, k % 5 == 0) for k, (a, g) in enumerate(zip(*columns, strict=True))]
