"""How time and memory grow with the length of a text and with the batch, beside the stock model."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..plotting import tidy
from .efficiency import StepSettings, measure_alone
from .tables import markdown_table

_AXES = {"sequence_length": "tokens of a text", "batch_size": "texts in a batch"}
_FIGURES = {"seconds": "seconds per step", "peak_memory_bytes": "peak memory (GiB)"}
_STYLES = {"marker": "o", "linestyle": "--"}, {"marker": "s"}  # of what is compared with, and of what is compared


def measure_growth(
    compared: dict[str, StepSettings],
    make_job: Callable[[Any], Callable],
    lengths: Iterable[int],
    batch_sizes: Iterable[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Measure each model at each length with its own batch size, and at each batch size with its own length.

    Args:
        compared: settings by name.

    Returns:
        A row for each: `model`, what was `varied`, `settings`, median `seconds` and `peak_memory_bytes`, which are
        None where memory did not suffice.
    """
    rows = []
    for varied, values in (("sequence_length", lengths), ("batch_size", batch_sizes)):
        for value in values:
            for name, settings in compared.items():
                settings = replace(settings, **{varied: value})
                try:
                    measured = measure_alone(settings, make_job, rounds)
                except (RuntimeError, BrokenProcessPool) as error:
                    if isinstance(error, RuntimeError) and "memory" not in str(error):
                        raise
                    measured = dict.fromkeys(_FIGURES)
                rows.append({"model": name, "varied": varied, "settings": asdict(settings), **measured})
                print(f"{varied} {value:>5} {name:7} " + " ".join(map(str, measured.values())), flush=True)
    return rows


def growth_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table; a slope is the exponent of the growth since the row above: 1 is linear."""
    cells_of_rows = []
    for varied, line in _lines(rows):
        for before, row in zip([None, *line], line, strict=False):
            settings = row["settings"]
            cells = [f"{settings['batch_size']} × {settings['sequence_length']}", f"`{row['model']}`"]
            for key, text in (("seconds", "{:.3g} s"), ("peak_memory_bytes", "{:.2f} GiB")):
                cells += ["out of memory" if row[key] is None else text.format(_shown(row, key))]
                cells += ["" if before is None or row[key] is None else f"{_slope(before, row, varied, key):.2f}"]
            cells_of_rows.append(cells)
    return markdown_table(["batch", "model", "time", "slope", "peak memory", "slope"], cells_of_rows)


def draw_growth(rows: list[dict[str, Any]], path: Path):
    """Draw time and memory against length and batch, on logarithmic axes."""
    figure = Figure(figsize=(10, 8), dpi=150, layout="constrained")
    grid = figure.subplots(len(_AXES), len(_FIGURES))
    styles = dict(zip(dict.fromkeys(row["model"] for row in rows), _STYLES, strict=True))
    for varied, line in _lines(rows):
        name = line[0]["model"]
        for axes, (key, label) in zip(grid[list(_AXES).index(varied)], _FIGURES.items(), strict=True):
            measured = [row for row in line if row[key] is not None]
            values = [row["settings"][varied] for row in measured]
            axes.plot(values, [_shown(row, key) for row in measured], label=name, **styles[name])
            axes.set(xscale="log", yscale="log", xlabel=_AXES[varied], ylabel=label)
            axes.set_xticks(values, values)
            axes.minorticks_off()
            tidy(axes)
    grid[0][0].legend(frameon=False)
    figure.savefig(path)


def _lines(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return what was varied and the rows of each line of the plots."""
    return [
        (varied, line)
        for varied in _AXES
        for name in dict.fromkeys(row["model"] for row in rows)
        if (line := [row for row in rows if (row["varied"], row["model"]) == (varied, name)])
    ]


def _shown(row: dict[str, Any], key: str) -> float:
    return row[key] / 2**30 if key == "peak_memory_bytes" else row[key]


def _slope(before: dict[str, Any], row: dict[str, Any], varied: str, key: str) -> float:
    return math.log(row[key] / before[key]) / math.log(row["settings"][varied] / before["settings"][varied])
