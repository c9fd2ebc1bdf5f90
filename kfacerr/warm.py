"""W-KFAC: warm Nyström, one product with M from the last basis.

It is to R-KFAC what SOAP's power iteration is to Shampoo. Once in T_inv iterations Omega is the last estimate's
modes beside r_o fresh Gaussian columns, and the estimate is Nyström's from M Omega, truncated to r. Each is a
step of subspace iteration: while M stands still the error only falls (docs/mathematics/streaming.md), and one
product takes the place of the q + 2 of an RSVD.
"""

from .certificate import Certificate
from .ea import EAFactor
from .lowrank import LowRank
from .process import Cost
from .processes import Periodic, certified_decomposition
from .rsvd import evd, nystrom_on
from .sketching import with_fresh
from .stream import Array

__all__ = ["WarmNystrom"]


class WarmNystrom(Periodic):
    """The warm Nyström process.

    Its basis is a memory, so that it runs on the whole stream; a measurement window only starts its period anew.
    The first basis is Gaussian: an estimate without any power iteration.
    """

    memoryless = False

    def decompose(self, M: Array) -> LowRank:
        """r modes; all of them exact where r + r_o covers the space."""
        r, d = self.settings.rank, M.shape[0]
        count = r + self.settings.oversampling
        if count >= d:
            return evd(M, r)
        last = M[:, :0] if self.estimate is None else self.estimate.lowrank.U[:, :r]
        return nystrom_on(M, with_fresh(last, count, self.rng), r)

    def certified(self, factor: EAFactor) -> Certificate | str:
        """Nyström's M~ <= M."""
        assert self.estimate is not None
        return certified_decomposition(self.estimate.lowrank, factor)

    def cost(self, d: int, n: int) -> Cost:
        """One product of M with r + r_o columns; C, F and F^T F; the modes."""
        s = self.settings
        count = min(s.rank + s.oversampling, d)
        heavy = 2.0 * d * d * count + 8.0 * d * count**2 + 12.0 * count**3
        return Cost(2.0 * d * d * n, min(heavy, 9.0 * d**3), s.T_inv, d * d + float(d) * s.rank, min(s.rank, d))
