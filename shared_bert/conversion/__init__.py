"""From stock models to this package's and back."""

from .stock import to_stock

__all__ = ["to_stock"]
