"""What needs torch: the live source of K-factor columns, and the optimizers that its processes drive."""

from .follower import ColumnHooks
from .kfac import KFAC
from .linear import FactoredLinear, factored
from .policy import PAPER, FactorInfo
from .seng import PAPER_SENG, SENG
from .watch import Watch, watch

__all__ = [
    "KFAC",
    "PAPER",
    "PAPER_SENG",
    "SENG",
    "ColumnHooks",
    "FactorInfo",
    "FactoredLinear",
    "Watch",
    "factored",
    "watch",
]
