"""Errors (1)-(4) under dampings that are no lam for each factor: the grid of products, pseudo-inverses with a cut.

Everything is said by spectra here, so that the reference is an EVD of each factor, once an update. On the grid of
products no factor has an inverse of its own: there are metrics (3) and (4) alone.
"""

from collections.abc import Mapping

from .damping import Damping, Scale
from .factor import KFactor
from .grid import Continued, damped_step, one_inverse
from .inverse import continuation_level
from .lowrank import LowRank
from .metrics import angle_error, inverse_error, norm_error
from .rsvd import evd
from .stream import Array

__all__ = ["JointErrors"]


class JointErrors:
    """Holds the estimates of two factors against the factors, one step after the other.

    Args:
        damping: any.
        factors: those of A and G.
    """

    def __init__(self, damping: Damping, factors: Mapping[str, KFactor]) -> None:
        self.damping = damping
        self._factors = factors
        self._exact: dict[str, tuple[Array, Continued]] = {}  # made at M's trace: every update makes another
        self._errors: dict[tuple[str, str, str], tuple[LowRank, LowRank, float]] = {}
        self._J: Array = None
        self._S: Array = None
        self._levels = (0.0, 0.0)

    def take(self, columns: Mapping[str, Array], scales: Mapping[str, Scale]) -> None:
        """The next step: its columns A (d_A, n) and G (d_G, n) in the factors' units, and the factors' scales."""
        for side, factor in self._factors.items():
            trace = factor.average.trace
            if side not in self._exact or self._exact[side][0] is not trace:
                self._exact[side] = trace, Continued(evd(factor.average.M), 0.0, factor.squared_unit)
        self._levels = self.damping.levels(scales["A"], scales["G"])
        self._J = columns["G"] @ columns["A"].T
        self._S = damped_step(self._J, self._exact["G"][1], self._exact["A"][1], self.damping, self._levels)

    def of(self, name: str, continuation: str, scales: Mapping[str, Scale]) -> dict[str, float]:
        """The errors of a process that holds an estimate.

        Args:
            name: of the process.
            continuation: of its spectrum.
            scales: of its estimates.

        Returns:
            By metric; without (1) and (2) on the grid of products.

        Raises:
            InputError: a continuation that only an inverse of one factor has.
        """
        levels = self.damping.levels(scales["A"], scales["G"])
        own = {side: self._continued(side, name, continuation) for side in "AG"}
        S = damped_step(self._J, own["G"], own["A"], self.damping, levels)
        found = {}
        if self.damping.kind != "product":
            for side, level, other in zip("AG", levels, self._levels, strict=True):
                error = self._inverse_error((name, continuation, side), own[side], level, other)
                found[f"inverse_{side}"] = error
        return found | {"step_norm": norm_error(S, self._S), "step_angle": angle_error(S, self._S)}

    def _continued(self, side: str, name: str, continuation: str) -> Continued:
        factor = self._factors[side]
        estimate = factor.processes[name].estimate
        assert estimate is not None  # the caller has its scale
        tau = continuation_level(estimate.lowrank, continuation, estimate.trace)
        return Continued(estimate.lowrank, float(tau), factor.squared_unit)

    def _inverse_error(self, key: tuple[str, str, str], own: Continued, level: float, other: float) -> float:
        """Metric (1) or (2), made anew only where the estimate or M changed."""
        exact, held = self._exact[key[2]][1], self._errors.get(key)
        if held is None or held[0] is not own.lowrank or held[1] is not exact.lowrank:
            inverses = one_inverse(own, self.damping, level), one_inverse(exact, self.damping, other)
            held = self._errors[key] = own.lowrank, exact.lowrank, inverse_error(*inverses)
        return held[2]
