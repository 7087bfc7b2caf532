"""The records of a comparison, gathered for its tables and plots."""

import statistics
from collections.abc import Callable

from ..records import load_record
from .comparison import Comparison
from .differences import Difference, Measure, difference, measures_of
from .records import Record, read_record, record_path, speed_path


class Results:
    """The records of a comparison that are there, by variant.

    Raises:
        ValueError: there are none, or one is damaged or incomplete.
    """

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        self.records: dict[str, list[Record]] = {}
        self.missing: list[str] = []
        for run in comparison.runs():
            path = record_path(comparison, run)
            if not path.exists():
                self.missing.append(run.name)
            elif not run.tuned:
                self.records.setdefault(run.variant.name, []).append(read_record(comparison, run))
        if not self.records:
            raise ValueError(f"{comparison.results_dir} has no records of {comparison.path}")
        order = [variant.name for variant in comparison.variants]
        self.records = {name: self.records[name] for name in order if name in self.records}
        self.measures = measures_of(self.every[0])
        path = speed_path(comparison)
        # Of all variants in turns, if that was measured; else as fast as each run was.
        self.speed = load_record(path, ("tokens_per_second", "hardware", "commit")) if path.exists() else None

    @property
    def every(self) -> list[Record]:
        return [record for records in self.records.values() for record in records]

    def mean(self, name: str, value: Callable[[Record], float]) -> float:
        return statistics.mean(map(value, self.records[name]))

    def is_narrow(self, name: str) -> bool:
        """Whether a variant is a narrower standard model, found for others."""
        return name in self.comparison.narrow_of.values()

    def tokens_per_second(self, name: str) -> float:
        if self.speed is not None and name in self.speed["tokens_per_second"]:
            return self.speed["tokens_per_second"][name]
        return self.mean(name, lambda record: record["tokens_per_second"])

    def difference(self, measure: Measure, name: str, other: str | None) -> Difference | None:
        """Return how a variant differs from another; None where one has no records."""
        if name not in self.records or other not in self.records:
            return None
        return difference(measure, self.records[name], self.records[other])
