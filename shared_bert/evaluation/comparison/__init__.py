"""Comparisons of models that are trained alike."""

from .comparison import Comparison
from .cost import cost_report, measure_speed
from .records import MAY_DIFFER, check_records, has_records
from .results import findings, write_results
from .runs import ComparisonRunner, take_own_device

__all__ = [
    "MAY_DIFFER",
    "Comparison",
    "ComparisonRunner",
    "check_records",
    "cost_report",
    "findings",
    "has_records",
    "measure_speed",
    "take_own_device",
    "write_results",
]
