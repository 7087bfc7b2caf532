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
        ValueError: there are none, one is damaged or incomplete, or they do not all measure the same.
    """

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        self.records: dict[str, list[Record]] = {}
        self.sweep: dict[str, dict[tuple[tuple[str, float], ...], Record]] = {}  # by the options that were tried
        self.missing: list[str] = []
        for run in comparison.runs():
            path = record_path(comparison, run)
            if not path.exists():
                self.missing.append(run.name)
            elif run.tuned:
                self.sweep.setdefault(run.variant.name, {})[run.tuned] = read_record(comparison, run)
            else:
                self.records.setdefault(run.variant.name, []).append(read_record(comparison, run))
        if not self.records:
            raise ValueError(f"{comparison.results_dir} has no records of {comparison.path}")
        order = [variant.name for variant in comparison.variants]
        self.records = {name: self.records[name] for name in order if name in self.records}
        first, *others = self.every
        self.measures = measures_of(first)
        for record in others:
            if {measure.key for measure in measures_of(record)} != {measure.key for measure in self.measures}:
                raise ValueError(
                    f"{comparison.results_dir}: the record of {record['name']} with seed {record['seed']} has other "
                    f"evaluations than that of {first['name']} with seed {first['seed']}"
                )
        # Of all variants in turns, if that was measured; else as fast as each run was.
        path = speed_path(comparison)
        speed = load_record(path, ("tokens_per_second", "quartiles", "rounds")) if path.exists() else None
        self.speed = speed if speed and self.records.keys() <= speed["tokens_per_second"].keys() else None

    @property
    def every(self) -> list[Record]:
        return [record for records in self.records.values() for record in records]

    def mean(self, name: str, value: Callable[[Record], float]) -> float:
        return statistics.mean(map(value, self.records[name]))

    def is_narrow(self, name: str) -> bool:
        """Whether a variant is a narrower standard model, found for others."""
        return name in self.comparison.narrow_of.values()

    def tokens_per_second(self, name: str) -> float:
        if self.speed is not None:
            return self.speed["tokens_per_second"][name]
        return self.mean(name, lambda record: record["tokens_per_second"])

    def difference(self, measure: Measure, name: str, other: str | None) -> Difference | None:
        """Return how a variant differs from another; None where one has no records."""
        if name not in self.records or other not in self.records:
            return None
        return difference(measure, self.records[name], self.records[other])
