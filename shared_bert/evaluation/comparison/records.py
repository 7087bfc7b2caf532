"""Where the records of a comparison are, and what they must agree in."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..efficiency import environment
from ..records import load_record
from .comparison import Comparison, Run

Record = dict[str, Any]
MAY_DIFFER = ("commit", "settings", "variant")
_NEEDED = (
    "name", "seed", "variant", "settings", "non_embedding", "tokens", "tokens_per_second",
    "curve", "loss", "learning_rate", "weight_decay", "hardware", "threads", "torch", "transformers", "commit", "date",
)  # fmt: skip


def record_path(comparison: Comparison, run: Run) -> Path:
    return comparison.results_dir / ("sweep" if run.tuned else "records") / f"{run.name}.json"


def speed_path(comparison: Comparison) -> Path:
    return comparison.results_dir / "speed.json"


def has_records(comparison: Comparison) -> bool:
    """Whether there is a record of a run that is reported."""
    return any(record_path(comparison, run).exists() for run in comparison.runs() if not run.tuned)


def read_record(comparison: Comparison, run: Run) -> Record:
    """Return the record of a run.

    Raises:
        ValueError: it is damaged or incomplete, or of another run.
    """
    path = record_path(comparison, run)
    record = load_record(path, _NEEDED)
    if (record["name"], record["seed"]) != (run.variant.name, run.seed):
        raise ValueError(f"{path} is a record of {record['name']} with seed {record['seed']}")
    return record


def check_records(comparison: Comparison, may_differ: Collection[str] = ()):
    """Raise a ValueError if there are records of other settings, or of another commit.

    Args:
        may_differ: "commit", "settings" or "variant": what need not be the same.
    """
    commit = environment("cpu")["commit"]
    for run in comparison.runs():
        path = record_path(comparison, run)
        if not path.exists():
            continue
        record = read_record(comparison, run)
        wanted = {"commit": commit, "variant": run.variant.identity, "settings": comparison.settings}
        for name, value in wanted.items():
            if name not in may_differ and (found := difference_of(record[name], value, name)):
                raise ValueError(
                    f"{path} is a record of {found}: name another results_dir, or give --may_differ {name}"
                )


def differing_in(comparison: Comparison, records: Sequence[Record]) -> list[str]:
    """Return which of "settings" and "variant" is not that of the comparison in some record."""
    identities = {variant.name: variant.identity for variant in comparison.variants}
    wanted = {"settings": lambda record: comparison.settings, "variant": lambda record: identities[record["name"]]}
    return [
        name for name, of in wanted.items() if any(difference_of(record[name], of(record), name) for record in records)
    ]


def difference_of(found: Any, wanted: Any, where: str) -> str | None:
    """Return where two nested mappings differ first, in words; None if they are equal as JSON."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = {**wanted, **found}
        return next((text for key in keys if (text := difference_of(found.get(key), wanted.get(key), key))), None)
    return None if found == json.loads(json.dumps(wanted)) else f"{where}={found!r}, not {wanted!r}"
