"""What needs torch: the live source of K-factor columns, and the optimizers that its processes drive."""

from .follower import ColumnHooks
from .linear import FactoredLinear, factored
from .optimizer import KFAC
from .policy import FactorInfo
from .seng import SENG, seng_learning_rate

__all__ = ["KFAC", "SENG", "ColumnHooks", "FactorInfo", "FactoredLinear", "factored", "seng_learning_rate"]
