"""The exponentially averaged K-factor, (5) and (8)."""

from typing import Any

from .array import check_columns, namespace, rank_k_update, square_sum
from .checks import is_number
from .exceptions import InputError
from .stream import Array

__all__ = ["EAFactor", "check_rho"]


def check_rho(rho: float) -> None:
    """Refuses a decay outside (0, 1)."""
    if not is_number(rho):
        raise InputError(f"rho must be a number, got {rho!r}")
    if not 0 < rho < 1:
        raise InputError(f"decay rho must lie in (0, 1), got {rho}")


class EAFactor:
    """(8): M_0 = X_0 X_0^T, M_k = rho M_{k-1} + (1 - rho) X_k X_k^T, and the trace t_k by the same recursion.

    Args:
        rho: decay, in (0, 1).

    Attributes:
        rho: as given.
        M: (d, d), or None before the first columns. Updated in place: copy it to keep it.
        trace: tr M, a 0-d array.
    """

    def __init__(self, rho: float) -> None:
        check_rho(rho)
        self.rho = rho
        self.M: Array = None
        self.trace: Array = None

    def __repr__(self) -> str:
        held = "nothing yet" if self.M is None else f"d={self.M.shape[0]}"
        return f"<kfacerr EAFactor, rho={self.rho:g}: {held}>"

    def update(self, X: Array) -> None:
        """Absorbs columns X (d, n)."""
        check_columns(X, None if self.M is None else self.M.shape[0])
        if self.M is None:
            self.M, self.trace = X @ X.T, square_sum(X)
            return
        namespace(self.M, X)
        self.M = rank_k_update(self.M, X, alpha=1 - self.rho, beta=self.rho)
        self.trace = self.rho * self.trace + (1 - self.rho) * square_sum(X)

    def update_by_gram(self, gram: Array) -> None:
        """Absorbs X X^T (d, d) itself, as several processes sum it up. `gram` becomes M where it is the first."""
        xp = namespace(gram)
        trace = xp.sum(xp.linalg.diagonal(gram))
        if self.M is None:
            self.M, self.trace = gram, trace
            return
        self.M *= self.rho
        self.M += (1 - self.rho) * gram
        self.trace = self.rho * self.trace + (1 - self.rho) * trace

    def state_dict(self) -> dict[str, Any]:
        """The live arrays: write them out, or copy them, before the next update."""
        return {"M": self.M, "trace": self.trace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, as copies."""
        M = state["M"]
        self.M = M if M is None else namespace(M).asarray(M, copy=True)  # `update` writes into it
        self.trace = state["trace"]
