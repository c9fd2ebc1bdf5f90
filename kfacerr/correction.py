"""Algorithm 6: the light correction of a low-rank representation."""

import array_api_compat as compat
import numpy as np

from .array import check_square, device_array, eigh_descending, namespace
from .checks import instance
from .exceptions import InputError
from .lowrank import LowRank
from .stream import Array

__all__ = ["correct"]


def correct(X: LowRank, M: Array, idx: np.ndarray) -> LowRank:
    """Algorithm 6 on the columns `idx` of X: afterwards U_S^T (M - X') U_S = 0 on their span.

    The misprinted l.7 is read as U[:, idx] <- U[:, idx] V, D[idx] <- w with (w, V) the EVD of the projected M.
    ||M - X'||_F never exceeds ||M - X||_F (footnote 11), but M - X' need not be p.s.d. any more.

    Args:
        X: (d, d) of m modes, the B-KFAC representation after its Brand update.
        M: (d, d) EA factor of the same iteration.
        idx: (n_crc,) distinct column numbers, drawn by the caller.

    Returns:
        m modes, sorted again.

    Raises:
        InputError: M is no matrix of X's kind and size, or idx are no distinct column numbers.
    """
    instance(X, "X", LowRank)
    check_square(M, "EA factor")
    idx = np.asarray(idx)
    if len(idx.shape) == 1 and idx.size == 0:
        return X
    if len(idx.shape) != 1 or idx.dtype.kind not in "iu" or len({*idx.tolist(), *range(X.m)}) != X.m:
        raise InputError(f"idx: some of the column numbers 0..{X.m - 1} are needed, got {idx.tolist()}")
    if M.shape[0] != X.d or len(set(idx.tolist())) != len(idx):
        raise InputError(f"a factor of order {X.d} and distinct columns are needed, got {M.shape[0]} and {idx}")
    xp = namespace(X.basis, M)
    chosen = device_array(idx.astype(np.int64), M)
    rest = device_array(np.setdiff1d(np.arange(X.m), idx).astype(np.int64), M)
    columns = X.basis if X.mix is None else X.mix  # rotating columns of U is rotating columns of mix
    picked = xp.take(columns, chosen, axis=1)
    US = picked if X.mix is None else X.basis @ picked
    MS = US.T @ (M @ US)
    w, V = eigh_descending((MS + MS.T) / 2, "correction")
    # A column's length is 1, or 0 to rounding where its mode is absent: as many eigenvalues are mere rounding.
    absent = xp.sum(xp.astype(xp.sum(US**2, axis=0) < 0.5, w.dtype))
    descending = xp.arange(w.shape[0], dtype=w.dtype, device=compat.device(w))
    w = xp.where((w > 0) & (descending < w.shape[0] - absent), w, xp.zeros_like(w))
    D = xp.concat([xp.take(X.D, rest), w])
    columns = xp.concat([xp.take(columns, rest, axis=1), picked @ V], axis=1)
    order = xp.argsort(D, descending=True, stable=True)
    D, columns = xp.take(D, order), xp.take(columns, order, axis=1)
    return LowRank(columns, D) if X.mix is None else LowRank(X.basis, D, columns)
