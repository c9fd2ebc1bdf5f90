"""N-KFAC: a Nyström sketch that follows the EA factor exactly, in linear time and without the dense factor.

(8) is linear in M, so the sketch of a fixed test matrix Omega (d, s) obeys it too, exactly:

    Y_k = M_k Omega         = rho Y_{k-1} + (1 - rho) X_k Z_k,    Z_k = X_k^T Omega,
    C_k = Omega^T M_k Omega = rho C_{k-1} + (1 - rho) Z_k^T Z_k,

and the estimate is M~_k = Y_k C_k^+ Y_k^T <= M_k (`kfacerr.sketching`; Tropp, Yurtsever, Udell & Cevher 2017).
Nothing is truncated and no error adds up: M~_k depends on M_k and Omega alone.

**Re-basing**, once in UPDATES updates, or in T_base iterations: Omega becomes the leading modes of M~ beside
FRESH s new Gaussian columns, Y becomes M~ Omega and C Omega^T M~ Omega. M~ has rank s, so nothing of it is lost.
From there on the sketch is that of M' = M - rho^j E, j updates after an error E: what M~ lacked is lost once, and
fades. The modes make a re-basing a step of subspace iteration; the fresh columns see what is orthogonal to all of
them, where B-KFAC can be blind for ever. docs/mathematics/streaming.md has the proofs.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import array_api_compat as compat
import numpy as np

from .array import namespace, square_sum
from .certificate import FLOAT64, Certificate
from .ea import EAFactor
from .lowrank import LowRank
from .process import Cost, Estimate, Process
from .sketching import nystrom_of, with_fresh
from .stream import Array

__all__ = ["Sketch", "StreamingNystrom"]

FRESH = 1 / 32
"""The share of fresh columns at a re-basing."""

UPDATES = 5
"""Updates between re-basings, where T_base does not count iterations."""


class Sketch(NamedTuple):
    """What N-KFAC holds of M.

    Attributes:
        omega: (d, s) test matrix.
        Y: (d, s) M omega.
        C: (s, s) omega^T M omega, in float64.
        trace: tr M, a 0-d array; of the true M_k also after a re-basing.
    """

    omega: Array
    Y: Array
    C: Array
    trace: Array

    @classmethod
    def zero(cls, omega: Array) -> "Sketch":
        """Of M = 0."""
        xp = namespace(omega)
        C = xp.zeros((omega.shape[1],) * 2, dtype=xp.float64, device=compat.device(omega))
        return cls(omega, xp.zeros_like(omega), C, xp.sum(0 * omega[:, 0]))

    def share(self, X: Array) -> dict[str, Array]:
        """What columns X (d, n) add to Y, to C and to the trace."""
        Z = X.T @ self.omega
        precise = namespace(X).astype(Z, namespace(X).float64)
        return {"Y": X @ Z, "C": precise.T @ precise, "trace": square_sum(X)}

    def absorbed(self, total: Mapping[str, Array], decay: float, weight: float) -> "Sketch":
        """Of decay M + weight X X^T, for the sum of the shares of X's columns."""
        C = namespace(self.omega).astype(self.C, total["C"].dtype)  # a state may have come in another precision
        held = {"Y": self.Y, "C": C, "trace": self.trace}
        return self._replace(**{name: decay * part + weight * total[name] for name, part in held.items()})


def based(low: LowRank, count: int, fresh: int, trace: Array, rng: np.random.Generator) -> Sketch:
    """The sketch of M~ = `low` on its leading modes U_1 beside fresh Gaussian columns G, orthonormal to them.

    With U = [U_1, U_2] and P = U_2^T G it is Y = [U_1 D_1, U_2 D_2 P] and C = diag(D_1, P^T D_2 P). Nothing of
    M~ is lost while its modes are no more than the columns: P is square or wide then.

    Args:
        low: M~ (d, d).
        count: columns of omega, at most d.
        fresh: Gaussian ones among them at least; those for which M~ has no mode are, too.
        trace: of the EA factor.
        rng: the random source.

    Returns:
        The sketch of M~.
    """
    xp = namespace(low.D)
    present = int(low.modes)
    kept = min(present, count - fresh)
    U, D = low.truncate(present).U, low.D[:present]
    omega = with_fresh(U[:, :kept], count, rng)
    P = U[:, kept:].T @ omega[:, kept:]
    Y = xp.concat([U[:, :kept] * D[None, :kept], U[:, kept:] @ (D[kept:, None] * P)], axis=1)
    D, P = xp.astype(D, xp.float64), xp.astype(P, xp.float64)
    C = xp.zeros((count, count), dtype=xp.float64, device=compat.device(Y))
    C[:kept, :kept] = D[:kept, None] * xp.eye(kept, dtype=xp.float64, device=compat.device(Y))
    C[kept:, kept:] = P.T @ (D[kept:, None] * P)
    return Sketch(omega, Y, C, trace)


class StreamingNystrom(Process):
    """N-KFAC: the streaming Nyström process.

    It holds s columns: the setting `s`, or twice the rank, or d where that is less, and then it is exact. Its
    estimate has a mode for each column but the fresh ones; or the r leading modes, where an algorithm's name fixes
    the rank. It is computed when it is read, and an update without costs 4 d s n flops. Where a schedule changes s
    the sketch is re-based: what is known stays known.
    """

    needs_factor = False
    adds = True
    schedules: ClassVar[tuple[str, ...]] = ("T_base",)

    _sketch: Sketch | None = None
    _begun = False  # whether the sketch is of any columns
    _since = UPDATES  # updates since the last re-basing, that one counted
    _whole: LowRank | None = None  # M~ of all s modes

    def update(self, k: int, X: Array, factor: EAFactor | None) -> None:
        """Re-bases if that is due, then takes X_k."""
        self.take(k, self.share(k, X))

    def share(self, k: int, X: Array) -> dict[str, Array]:
        """X Z, Z^T Z and ||X||_F^2, Z = X^T Omega: sums over the columns. Re-bases first, if that is due."""
        d, sketch = X.shape[0], self._sketch
        count = min(self.columns, d)
        due = self.clocks["T_base"].due(k) or self._full
        self._since = 1 if due else self._since + 1
        if sketch is None:
            sketch = Sketch.zero(with_fresh(X[:, :0], count, self.rng))
        elif sketch.omega.shape[1] != count or (due and count < d):
            sketch = based(self._decomposed(), count, 0 if count == d else self.fresh, sketch.trace, self.rng)
        self._sketch = sketch
        return sketch.share(X)

    def take(self, k: int, total: Mapping[str, Array]) -> None:
        """`update`, with the sum of the shares of X_k's columns."""
        assert self._sketch is not None
        rho = self.settings.rho
        decay, weight = (rho, 1 - rho) if self._begun else (1.0, 1.0)
        self._sketch, self._begun = self._sketch.absorbed(total, decay, weight), True
        self._whole = self.estimate = None

    @property
    def _full(self) -> bool:
        """Whether UPDATES have passed, where they count."""
        return self.settings.T_base is None and self._since >= UPDATES

    @property
    def columns(self) -> int:
        """s, where d is not less."""
        return self.settings.s or 2 * self.settings.rank

    @property
    def fresh(self) -> int:
        """How many columns of omega are Gaussian after a re-basing: not all, as they are not handed out."""
        return min(math.ceil(FRESH * self.columns), self.columns - 1)

    def due(self, k: int) -> bool:
        """Only where Omega changes: the estimate is decomposed when it is read."""
        if self._sketch is None:
            return True
        d, s = self._sketch.omega.shape
        return s != min(self.columns, d) or self._full or self.clocks["T_base"].coming(k)

    def restart(self, k: int) -> None:
        """Re-bases at the next update."""
        super().restart(k)
        self._since = UPDATES

    # ------------------------------------------------------------------------------------------ estimates

    def _decomposed(self) -> LowRank:
        """M~ of all s modes."""
        assert self._sketch is not None
        if self._whole is None:
            self._whole = nystrom_of(self._sketch.Y, self._sketch.C)
        return self._whole

    def _made(self) -> Estimate | None:
        if self._sketch is None:
            return None
        whole = self._decomposed()
        if "rank" in self.fixed:  # many fewer modes: they are worth being formed
            return Estimate(whole.truncate(self.settings.rank), self._sketch.trace)
        return Estimate(_leading(whole, self._modes(whole.d)), self._sketch.trace)

    def _modes(self, d: int) -> int:
        """How many modes the estimate has. What a fresh column sees at first says nothing of the tail's level."""
        if "rank" in self.fixed:
            return min(self.settings.rank, self.columns, d)
        exact = self.columns >= d or self.settings.T_base == 0
        return min(self.columns, d) if exact else self.columns - self.fresh

    def computed(self) -> dict[str, Array | None]:
        """The sketch."""
        return {} if self._sketch is None else {"Y": self._sketch.Y, "C": self._sketch.C}

    def _certified(self) -> Certificate | str:
        """M~ <= M' <= M. Rounding of the sketch adds up as that of (8) does."""
        held = self.estimate
        if held is None:
            return super()._certified()
        return Certificate.of_decomposition(
            held.lowrank, held.trace, memory=1 / (1 - self.settings.rho), unit=FLOAT64
        )

    # ---------------------------------------------------------------------------------------------- costs

    def cost(self, d: int, n: int) -> Cost:
        """Of an update with its estimate: X^T Omega and X Z; F, F^T F and its EVD. Of a re-basing: U and Y.

        Where re-basings count updates, each update has its share of one.
        """
        s, period = min(self.columns, d), self.settings.T_base
        update = 4.0 * d * s * n + 4.0 * d * s**2 + 12.0 * s**3
        heavy = 0.0 if s == d or period == 0 else 2.0 * d * s**2 + 8.0 * d * s * self.fresh
        if period is None:
            update, heavy = update + heavy / UPDATES, 0.0
        return Cost(update, heavy, period or 1, 3.0 * d * s + s**2, self._modes(d))

    # ---------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """With the sketch, from which the estimate is made anew."""
        sketch = self._sketch and self._sketch._asdict()
        return {
            **super().state_dict(),
            "estimate": None,
            "sketch": sketch,
            "begun": self._begun,
            "since": self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        held = state["sketch"]
        self._sketch, self._whole = held and Sketch(**held), None
        self._begun, self._since = state["begun"], state["since"]


def _leading(low: LowRank, m: int) -> LowRank:
    """The m leading modes, not formed."""
    return LowRank(low.basis, low.D[:m], None if low.mix is None else low.mix[:, :m])
