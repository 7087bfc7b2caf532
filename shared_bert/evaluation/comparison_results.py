"""Tables and plots of a comparison, made of its records alone."""

import math
import os
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .comparison import TUNED, Comparison
from .comparison_runs import record_path, speed_path
from .comparison_statistics import RESAMPLES, Difference, Measure, Record, difference, measures_of, verdict
from .records import load_record

_NEEDED = ("name", "seed", "is_narrow", "narrow", "non_embedding", "tokens", "tokens_per_second", "curve", "loss")
_MARKERS, _COLORS = "osD^v<>pPX*hd", 10


_FINDINGS = """\
Each claim is held against a difference that was measured here, with its 95 % intervals: of the paired bootstrap over
seeds and documents (or paradigms), where there are any, and Student's over the seeds. It is *supported* if both lie
where the claim says, *not supported* if both lie where it denies, and else *not decided at this scale*. The models are
small and have read little: nothing here is about larger ones. A claim of no difference names the margin that counts as
none.
"""


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
                self.records.setdefault(run.variant.name, []).append(load_record(path, _NEEDED))
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

    def mean(self, name: str, value) -> float:
        return statistics.mean(map(value, self.records[name]))

    def tokens_per_second(self, name: str) -> float:
        if self.speed is not None and name in self.speed["tokens_per_second"]:
            return self.speed["tokens_per_second"][name]
        return self.mean(name, lambda record: record["tokens_per_second"])

    def difference(self, measure: Measure, name: str, other: str | None) -> Difference | None:
        """Return how a variant differs from another; None where one has no records."""
        if name not in self.records or other not in self.records:
            return None
        return difference(measure, self.records[name], self.records[other])


def write_results(comparison: Comparison):
    """Write `results.md`, `curves.png`, `pareto.png` and `differences.png` into `results_dir`.

    Raises:
        ValueError: see `Results`.
    """
    results = Results(comparison)
    folder = comparison.results_dir
    draw_curves(results, folder / "curves.png")
    draw_pareto(results, folder / "pareto.png")
    draw_differences(results, folder / "differences.png")
    (folder / "results.md").write_text(report(results))


def write_findings(comparisons: Sequence[Comparison], path: Path):
    """Write what all comparisons say of their claims to one page.

    Raises:
        ValueError: see `Results`.
    """
    parts = ["# Do the claims hold?\n", _FINDINGS]
    for results in map(Results, comparisons):
        name = results.comparison.path.stem
        link = os.path.relpath(results.comparison.results_dir / "results.md", path.parent)
        parts += [f"## {name.capitalize()}\n", f"All numbers: [{link}]({link}).\n", _provenance(results)]
        parts += [claim_table(results)]
    path.write_text("\n".join(parts))


def report(results: Results) -> str:
    """Return the tables as Markdown."""
    comparison, baseline = results.comparison, results.comparison.baseline
    parts = [
        f"# {comparison.path.stem}\n",
        _provenance(results),
        "Mean ± standard deviation over the seeds. *Kept* counts parameters outside the embeddings.",
        f"{_speed(results)}\n",
        score_table(results),
    ]
    if comparison.sweep:
        parts += ["Options chosen by the sweep, by the evaluation loss of a seed of its own:\n", _sweep_table(results)]
    differences = {name: baseline for name in results.records if name != baseline}
    intervals = (
        f"In brackets the 95 % interval of the paired bootstrap over seeds and documents (for BLiMP, paradigms), "
        f"{RESAMPLES:,} draws; then Student's over the seeds alone, which is all there is for tasks.\n"
    )
    if differences:
        parts += [f"## Minus {baseline}\n", intervals, difference_table(results, differences)]
        parts += ["![differences](differences.png)\n"]
    narrow = {name: records[0]["narrow"] for name, records in results.records.items() if records[0]["narrow"]}
    if narrow:
        parts += ["## Minus the narrower standard model of as many parameters\n", difference_table(results, narrow)]
    parts += ["## Loss against tokens, time and parameters\n", "![loss against tokens](curves.png)\n"]
    parts += ["![loss against time and parameters](pareto.png)\n"]
    if comparison.claims:
        parts += ["## Claims\n", claim_table(results)]
    published = [(v.name, v.published) for v in comparison.variants if v.published]
    if published:
        parts += ["## What the papers report\n", _table(["variant", "published"], published)]
    if results.missing:
        parts.append(f"Runs without a record: {', '.join(results.missing)}.\n")
    return "\n".join(parts)


def _provenance(results: Results) -> str:
    def of(name: str) -> str:
        return ", ".join(sorted({str(record[name]) for record in results.every}))

    seeds = ", ".join(map(str, sorted({record["seed"] for record in results.every})))
    tokens = ", ".join(f"{tokens:,}" for tokens in sorted({record["tokens"] for record in results.every}))
    return (
        f"{len(results.every)} runs of {tokens} tokens each, seeds {seeds}; {of('hardware')}, threads {of('threads')}"
        f", torch {of('torch')}, transformers {of('transformers')}, commit {of('commit')}, {of('date')}.\n"
        f"Each run's record is `records/VARIANT-SEED.json`.\n\n"
        f"```bash\npython scripts/compare.py {results.comparison.path}\n"
        f"python scripts/compare.py {results.comparison.path} --redraw  # the same from the records\n```\n"
    )


def _speed(results: Results) -> str:
    if results.speed is None:
        return "Speed is that of the runs, which may have shared their machine."
    speed = results.speed
    return (
        f"Speed is that of training steps of all variants in turns, medians of {speed['rounds']}: "
        f"{speed['hardware']}, threads {speed['threads']}, commit {speed['commit']}."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def score_table(results: Results) -> str:
    """Return a table with a row for each variant: its size, its speed, and every measure."""
    whole = results.records.get(results.comparison.baseline, results.every)[0]["non_embedding"]
    rows = []
    for name, records in results.records.items():
        first = records[0]
        speed = results.tokens_per_second(name)
        cells = [f"`{name}`", f"{first['non_embedding']:,}", f"{first['non_embedding'] / whole:.1%}", f"{speed:,.0f}"]
        rows.append(cells + [_mean_and_deviation(measure, records) for measure in results.measures])
    header = ["variant", "parameters", "kept", "tokens/s", *(measure.title for measure in results.measures)]
    return _table(header, rows)


def _mean_and_deviation(measure: Measure, records: list[Record]) -> str:
    values = [measure.value(record) for record in records]
    mean = f"{statistics.mean(values):.{measure.decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{measure.decimals}f}"


def _sweep_table(results: Results) -> str:
    """Return what the sweep has chosen for each variant, with a mark where that is the end of its range."""
    sweep = results.comparison.sweep
    tuned = [name for name in TUNED if name in sweep]
    rows = []
    for name, records in results.records.items():
        chosen = {option: records[0][option] for option in tuned}
        at_end = {o: len(sweep[o]) > 1 and chosen[o] in (min(sweep[o]), max(sweep[o])) for o in tuned}
        rows.append([f"`{name}`", *(f"{chosen[o]:g}{' (end of the range)' * at_end[o]}" for o in tuned)])
    return _table(["variant", *(option.replace("_", " ") for option in tuned)], rows)


def difference_table(results: Results, pairs: dict[str, str]) -> str:
    """Return a table of each variant minus another, by its name, for every measure."""
    same = len({*pairs.values()}) == 1
    rows = [
        [f"`{name}`" if same else f"`{name}` − `{other}`"]
        + [format_difference(results.difference(measure, name, other), measure) for measure in results.measures]
        for name, other in pairs.items()
    ]
    return _table(["", *(measure.title for measure in results.measures)], rows)


def format_difference(found: Difference | None, measure: Measure) -> str:
    """Return "mean [bootstrap interval] [Student's interval]", without those that are not known."""
    if found is None:
        return ""
    intervals = (interval for interval in (found.bootstrap, found.student) if interval is not None)
    texts = (f"[{low:+.{measure.decimals}f}, {high:+.{measure.decimals}f}]" for low, high in intervals)
    return " ".join((f"{found.mean:+.{measure.decimals}f}", *texts))


def claim_table(results: Results) -> str:
    """Return a table of the comparison's claims: what was measured, and the verdict."""
    by_key = {measure.key: measure for measure in results.measures}
    rows = []
    for claim in results.comparison.claims:
        if claim.measure not in by_key:
            raise ValueError(f"claim {claim.claim!r}: {claim.measure} was not measured, only {', '.join(by_key)}")
        measure = by_key[claim.measure]
        for name in claim.of:
            against = results.comparison.narrow_of[name] if claim.against == "narrow" else claim.against
            found = results.difference(measure, name, against)
            margin = f", to within {claim.within:g}" if claim.within is not None else ""
            rows.append(
                [
                    f"{claim.claim}{margin} ({claim.source})",
                    f"{measure.title}: `{name}` − `{against}`",
                    format_difference(found, measure),
                    f"**{verdict(found, claim.expected, claim.within)}**",
                ]
            )
    return _table(["claim", "measured", "difference", "verdict"], rows)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a colour and a marker for each variant; no two have both in common."""
    return {name: {"color": f"C{i % _COLORS}", "marker": _MARKERS[i % len(_MARKERS)]} for i, name in enumerate(names)}


def _tidy(axes: Axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path):
    # Without the version of matplotlib, so that the same records make the same file.
    figure.savefig(path, metadata={"Software": None})


def draw_curves(results: Results, path: Path):
    """Draw each variant's evaluation loss against tokens, over the baseline's and that of its narrower model."""
    names = [name for name, records in results.records.items() if not records[0]["is_narrow"]]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns + 0.6, 2.4 * rows + 0.8), dpi=120, layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        lines = [(name, "#c44e52", "-", "variant")]
        if narrow := results.records[name][0]["narrow"]:
            lines.insert(0, (narrow, "#4c72b0", ":", "narrower standard model"))
        if name != results.comparison.baseline:
            lines.insert(0, (results.comparison.baseline, "#888888", "--", "baseline"))
        for other, color, style, label in lines:
            if other in results.records:
                tokens, losses = _mean_curve(results.records[other])
                axes.plot(tokens, losses, style, color=color, linewidth=1.6, label=label)
        axes.set_title(name, fontsize="medium")
        _tidy(axes)
    figure.supxlabel("tokens (millions)", fontsize="medium")
    figure.supylabel("evaluation loss (nats)", fontsize="medium")
    _legend(figure, "outside upper center")
    _save(figure, path)


def _mean_curve(records: list[Record]) -> tuple[list[float], list[float]]:
    points = sorted((point["tokens"] / 1e6, point["loss"]) for record in records for point in record["curve"])
    means = [(x, statistics.mean(y for _, y in group)) for x, group in groupby(points, key=lambda point: point[0])]
    return [x for x, _ in means], [y for _, y in means]


def _legend(figure: Figure, place: str, columns: int = 3):
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc=place, ncols=columns, frameon=False)


def draw_pareto(results: Results, path: Path):
    """Draw loss against parameters and against the time of training, with the lines that no variant is below."""
    measure = results.measures[0]
    figure = Figure(figsize=(11, 5.6), dpi=120, layout="constrained")
    looks = _looks([*results.records])
    losses = {name: results.mean(name, measure.value) for name in results.records}
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
            [x for x, _ in front], [y for _, y in front], where="post", color="#555555", linewidth=1, label="best"
        )
        for name, look in looks.items():
            hollow = {"markerfacecolor": "white"} if results.records[name][0]["is_narrow"] else {}
            axes.plot(cost[name], losses[name], linestyle="none", markersize=7, label=name, **look, **hollow)
        axes.set_xlabel(label)
        _tidy(axes)
    figure.axes[0].set_ylabel(f"{measure.title} (nats)")
    _legend(figure, "outside lower center", columns=5)
    _save(figure, path)


def pareto_front(cost: dict[str, float], losses: dict[str, float]) -> list[tuple[float, float]]:
    """Return the points (cost, loss) that no other is below at the same cost or less, by cost."""
    front = []
    for name in sorted(cost, key=lambda name: (cost[name], losses[name])):
        if not front or losses[name] < front[-1][1]:
            front.append((cost[name], losses[name]))
    return front


def draw_differences(results: Results, path: Path):
    """Draw each variant's difference from the baseline in every measure, with the interval that verdicts go by."""
    baseline = results.comparison.baseline
    names = [name for name in results.records if name != baseline]
    if not names:
        return
    columns = len(results.measures)
    figure = Figure(figsize=(2.2 * columns + 1.8, 0.26 * len(names) + 1.4), dpi=120, layout="constrained")
    places = np.arange(len(names))[::-1]
    for axes, measure in zip(
        figure.subplots(1, columns, sharey=True, squeeze=False)[0], results.measures, strict=True
    ):
        axes.axvline(0, color="#555555", linewidth=1)
        for place, name in zip(places, names, strict=True):
            if (found := results.difference(measure, name, baseline)) is None:
                continue
            is_narrow = results.records[name][0]["is_narrow"]
            color, fill = ("#4c72b0", "white") if is_narrow else ("#c44e52", "#c44e52")
            if found.interval is not None:
                axes.plot(found.interval, [place, place], color=color, linewidth=1.4)
            axes.plot(found.mean, place, "s" if is_narrow else "o", color=color, markerfacecolor=fill, markersize=5)
        better = "←" if measure.lower_is_better else "→"
        axes.set_title(f"{measure.title}\n{better} better", fontsize="small")
        axes.set_yticks(places, names, fontsize="small")
        axes.tick_params(axis="x", labelsize="small")
        _tidy(axes)
    figure.supxlabel(f"difference from {baseline}", fontsize="medium")
    _save(figure, path)
