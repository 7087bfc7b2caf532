"""From stock models to this package's and back."""

from .from_stock import from_stock
from .report import ConversionReport
from .stock import to_stock

__all__ = ["ConversionReport", "from_stock", "to_stock"]
