"""Frequent Directions, exponentially weighted (Sketchy: Feinberg et al. 2023), as one more K-factor process.

Where B-KFAC truncates, FD shrinks: it takes the (r+1)-th eigenvalue off the r leading ones and drops the others,
B_k = U_r diag(D_i - D_{r+1}) U_r^T. What is removed, T_k = M~_k - B_k, is p.s.d. with largest eigenvalue D_{r+1}.
The escaped mass mu adds them up, and bounds what is missing:

    M~_{k+1} = rho B_k + (1 - rho) X X^T,   mu_{k+1} = rho (mu_k + D_{k,r+1}),   0 <= M_k - M~_k <= mu_k I.

Proof. M_{k+1} - M~_{k+1} = rho (M_k - M~_k + T_k), and 0 <= T_k <= D_{k,r+1} I.

It is small where the spectrum decays: mu_k <= (sum_{i>j} lambda_i(M_k))/(r + 1 - j) for every j <= r. Proof. Every
shrinkage takes at least (r + 1) D_{r+1} off the trace, so (r + 1) mu_k <= tr(M_k - M~_k) = t_k - sum D. And as
lambda_i(M_k) <= lambda_i(M~_k) + mu_k, sum D >= sum_{i<=j} lambda_i(M_k) - j mu_k. Put together,
(r + 1) mu_k <= sum_{i>j} lambda_i(M_k) + j mu_k.

Like (10), and unlike Sketchy, the estimate handed out is the one before the shrinkage, of rank r + n, which is the
better one by the argument of §3.3 "Why use M_B, not B". Continuation "escaped" inverts M~ + mu I as Sketchy does.
"""

from dataclasses import replace
from typing import Any

from .array import namespace
from .processes import Brand
from .stream import Array

__all__ = ["FrequentDirections"]


class FrequentDirections(Brand):
    """FD with sketches of rank r. The estimate's `level` is the escaped mass mu."""

    _mass: Array = None

    def _absorb(self, k: int, X: Array) -> bool:
        first = self.estimate is None
        taken = super()._absorb(k, X)
        assert self.estimate is not None
        if first:
            self._mass = 0 * self.estimate.trace
        if taken:
            self.estimate = replace(self.estimate, level=self._mass)
        return taken

    def _reduced(self, kept: Array, D: Array, decay: float) -> tuple[Array, Array]:
        xp, r = namespace(D), self.settings.rank
        if D.shape[0] <= r:
            return super()._reduced(kept, D, decay)
        shift = D[r]
        self._mass = decay * (self._mass + shift)
        return xp.maximum(kept - shift, 0 * kept), xp.concat([shift + 0 * kept, D[r:]])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        if self.estimate is not None:
            self._mass = self.estimate.level
