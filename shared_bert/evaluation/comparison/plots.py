"""Plots of a comparison; variants differ in marker or line as well as in colour."""

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...plotting import labelled, legend, tidy
from .differences import Measure
from .gathering import Results
from .records import Record

_MARKERS, _COLORS = "osD^v<>pPX*hd", 10  # all of them can be half filled
_DPI = 120


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a colour and a marker for each variant; a second round of markers is half filled."""
    return {
        name: {
            "color": f"C{i % _COLORS}",
            "marker": _MARKERS[i % len(_MARKERS)],
            "fillstyle": "left" if i // len(_MARKERS) % 2 else "full",
            "markerfacecoloralt": "white",
        }
        for i, name in enumerate(names)
    }


def draw_curves(results: Results) -> Figure:
    """Return a plot of each variant's loss against tokens, over the baseline's and that of its narrower model."""
    names = [name for name in results.records if not results.is_narrow(name)]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns + 0.6, 2.4 * rows + 0.8), dpi=_DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        lines = [(name, "#c44e52", "-", "variant")]
        if narrow := results.comparison.narrow_of.get(name):
            lines.insert(0, (narrow, "#4c72b0", ":", "narrower standard model"))
        if name != results.comparison.baseline:
            lines.insert(0, (results.comparison.baseline, "#888888", "--", "baseline"))
        for other, color, style, label in lines:
            if other in results.records:
                tokens, losses = _mean_curve(results.records[other])
                axes.plot(tokens, losses, style, color=color, linewidth=1.6, label=label)
        axes.set_title(name, fontsize="medium")
        tidy(axes)
    for axes in panels[max(len(names) - columns, 0) : len(names)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("tokens (thousands)", fontsize="medium")
    figure.supylabel("evaluation loss (nats)", fontsize="medium")
    handles = labelled(figure)
    panels[0].legend(handles.values(), handles, fontsize="small", frameon=False)
    return figure


def _mean_curve(records: list[Record]) -> tuple[list[float], list[float]]:
    points = sorted((point["tokens"] / 1e3, point["loss"]) for record in records for point in record["curve"])
    means = [(x, statistics.mean(y for _, y in group)) for x, group in groupby(points, key=lambda point: point[0])]
    return [x for x, _ in means], [y for _, y in means]


def draw_pareto(results: Results) -> Figure:
    """Return a plot of loss against parameters and time of training, with the Pareto fronts."""
    measure = results.measures[0]
    figure = Figure(figsize=(11, 5.6), dpi=_DPI, layout="constrained")
    looks = _looks([*results.records])
    losses = {name: results.mean(name, measure.value) for name in results.records}
    values = {name: [measure.value(record) for record in records] for name, records in results.records.items()}
    costs = {
        "parameters outside the embeddings (millions)": {
            name: records[0]["non_embedding"] / 1e6 for name, records in results.records.items()
        },
        "time of training (minutes, of one process)": {
            name: records[0]["tokens"] / results.tokens_per_second(name) / 60
            for name, records in results.records.items()
        },
    }
    for axes, (label, cost) in zip(figure.subplots(1, 2, sharey=True), costs.items(), strict=True):
        front = pareto_front(cost, losses)
        axes.step(
            [x for x, _ in front],
            [y for _, y in front],
            where="post",
            color="#555555",
            linewidth=1,
            label="Pareto front",
        )
        for name, look in looks.items():
            hollow = {"markerfacecolor": "white"} if results.is_narrow(name) else {}
            spread = statistics.stdev(values[name]) if len(values[name]) > 1 else 0
            style = {"linestyle": "none", "markersize": 7, "elinewidth": 0.8, **look, **hollow}
            axes.errorbar(cost[name], losses[name], yerr=spread, label=name, **style)
        axes.set_xlabel(label)
        tidy(axes)
    figure.axes[0].set_ylabel(f"{measure.title} (nats)")
    legend(figure, columns=5)
    return figure


def pareto_front(cost: dict[str, float], losses: dict[str, float]) -> list[tuple[float, float]]:
    """Return the points (cost, loss) that no other is below at the same cost or less, by cost."""
    front = []
    for name in sorted(cost, key=lambda name: (cost[name], losses[name])):
        if not front or losses[name] < front[-1][1]:
            front.append((cost[name], losses[name]))
    return front


def draw_differences(results: Results) -> Figure:
    """Return a plot of each variant minus the baseline, with the interval that verdicts go by."""
    baseline = results.comparison.baseline

    def draw(axes: Axes, measure: Measure, name: str, place: int, style: dict[str, Any]):
        found = None if name == baseline else results.difference(measure, name, baseline)
        if found is None:
            return
        if found.interval is None:
            style = {**style, "marker": "x"}
        else:
            axes.plot(found.interval, [place, place], color=style["color"], linewidth=1.4)
        axes.plot(found.mean, place, markersize=5, **style)

    figure = _rows(results, draw)
    for axes in figure.axes:
        axes.axvline(0, color="#555555", linewidth=1, zorder=0)
    figure.supxlabel(f"difference from {baseline}, range of both 95 % intervals (×: a single seed)", fontsize="medium")
    return figure


def draw_scores(results: Results) -> Figure:
    """Return a plot of every measure of each variant: the mean with the standard deviation, and below it a dot
    for each seed."""

    def draw(axes: Axes, measure: Measure, name: str, place: int, style: dict[str, Any]):
        values = [measure.value(record) for record in results.records[name]]
        spread = statistics.stdev(values) if len(values) > 1 else 0
        axes.plot(values, [place - 0.25] * len(values), ".", color=style["color"], alpha=0.5, markersize=4)
        axes.errorbar(statistics.mean(values), place, xerr=spread, capsize=3, markersize=5, **style)

    figure = _rows(results, draw)
    figure.supxlabel("mean ± standard deviation over the seeds", fontsize="medium")
    return figure


def _rows(results: Results, draw: Callable[[Axes, Measure, str, int, dict[str, Any]], None]) -> Figure:
    """Return a figure with a panel for each measure, in which `draw` has drawn a row for each variant.

    Narrower standard models are hollow squares.
    """
    names, columns = [*results.records], min(4, len(results.measures))
    rows = math.ceil(len(results.measures) / columns)
    size = (2.6 * columns + 1.8, rows * (0.24 * len(names) + 1.0) + 0.4)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes in panels[len(results.measures) :]:
        axes.remove()
    for axes, measure in zip(panels, results.measures, strict=False):
        for number, name in enumerate(names):
            style = {"marker": "o", "color": "#c44e52", "linestyle": "none"}
            if results.is_narrow(name):
                style |= {"marker": "s", "color": "#4c72b0", "markerfacecolor": "white"}
            draw(axes, measure, name, len(names) - number, style)
        axes.set_yticks(range(len(names), 0, -1), names, fontsize="small")
        axes.set_ylim(0.4, len(names) + 0.6)
        axes.set_title(f"{measure.title}\n{'← better' if measure.lower_is_better else 'better →'}", fontsize="small")
        axes.tick_params(axis="x", labelsize="small")
        tidy(axes)
    return figure
