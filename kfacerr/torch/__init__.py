"""What needs torch: the live source of K-factor columns."""

from .hooks import ColumnHooks

__all__ = ["ColumnHooks"]
