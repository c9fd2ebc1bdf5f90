"""What needs torch: the live source of K-factor columns, and the optimizers that its processes drive."""

from .hooks import ColumnHooks
from .optimizer import KFAC
from .policy import FactorInfo
from .seng import SENG, seng_learning_rate

__all__ = ["KFAC", "SENG", "ColumnHooks", "FactorInfo", "seng_learning_rate"]
