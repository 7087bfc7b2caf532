"""Tables of a comparison, made of its records alone."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..tables import markdown_table
from .comparison import Comparison, non_embedding
from .differences import RESAMPLES, Difference, Measure, verdict
from .gathering import Results
from .plots import draw_curves, draw_differences, draw_pareto, draw_scores
from .records import Record, differing_in

_FINDINGS = """\
Each claim is held against a difference that was measured here, with its 95 % intervals: of the paired bootstrap over
seeds and documents (or paradigms), where there are any, and Student's over the seeds. It is *supported* if both
intervals lie wholly where the claim says, *not supported* if both lie wholly elsewhere, and else *not decided at this
scale*. *Better* or *worse* says how the first model differs: one that should be the same can be better. A margin
widens the claim: what should be the same may differ by as much, and what should be lower may be higher by as much.

Differences are those of the first model minus the second, the bootstrap's interval before Student's. Losses are in
nats per token, scores in points. `narrow_AxB` is a standard model A wide, with an MLP of B.

The models are small and have read little: nothing here is about larger ones. With three seeds, a claim of "the same"
can hardly be supported, and of so many verdicts at 95 % a few are chance.
"""


def write_results(comparison: Comparison):
    """Write `results.md`, `scores.png`, `differences.png`, `curves.png` and `pareto.png` into `results_dir`.

    Raises:
        ValueError: see `Results`.
    """
    results = Results(comparison)
    folder = comparison.results_dir
    pictures = {"scores": draw_scores, "differences": draw_differences, "curves": draw_curves, "pareto": draw_pareto}
    for name, draw in pictures.items():
        # Processes that shared the runs may all write at once.
        unfinished = folder / f"{name}.{os.getpid()}.unfinished"
        # Without the version of matplotlib, so that the same records make the same file.
        draw(results).savefig(unfinished, format="png", metadata={"Software": None})
        unfinished.replace(folder / f"{name}.png")
    unfinished = folder / f"results.{os.getpid()}.unfinished"
    unfinished.write_text(report(results))
    unfinished.replace(folder / "results.md")


def findings(comparisons: Sequence[Comparison], page: Path) -> str:
    """Return what all comparisons say of their claims as Markdown.

    Args:
        page: where it will be, for its links.

    Raises:
        ValueError: see `Results`.
    """
    every = [Results(comparison) for comparison in comparisons]
    parts = ["# Do the claims hold?\n", _FINDINGS, f"```bash\n{_redraw_command(every)} --findings {page}\n```\n"]
    for results in every:
        name = results.comparison.path.stem.replace("_", " ").capitalize()
        link = os.path.relpath(results.comparison.results_dir / "results.md", page.parent)
        parts += [f"## {name}\n", f"All numbers: [{link}]({link}).\n", _provenance(results), claim_table(results)]
    return "\n".join(parts)


def report(results: Results) -> str:
    """Return the tables as Markdown."""
    comparison, baseline = results.comparison, results.comparison.baseline
    parts = [
        f"# {comparison.path.stem}\n",
        _provenance(results),
        "Each run's record is `records/VARIANT-SEED.json`.\n",
        f"```bash\npython scripts/compare.py {comparison.path} "
        f"--results_dir runs/again/{comparison.path.stem}  # all runs from the start",
        f"{_redraw_command([results])}  # this page from the records\n```\n",
        f"The fields of each variant are in `{comparison.path}`; `narrow_AxB` is a standard model A wide, with an MLP",
        "of B.",
        "Means ± standard deviations over the seeds; losses in nats per token, parameters outside the embeddings.",
        f"{_speed(results)}\n",
        score_table(results),
    ]
    if comparison.sweep:
        parts += [_sweep_table(results)]
    parts += ["![scores](scores.png)\n"]
    differences = {name: baseline for name in results.records if name != baseline}
    intervals = (
        f"In brackets the 95 % interval of the paired bootstrap over seeds and documents (for BLiMP, paradigms), "
        f"{RESAMPLES:,} draws; then Student's over the seeds alone, which is all there is for tasks.\n"
    )
    if differences:
        parts += [f"## Minus {baseline}\n", intervals, difference_table(results, differences)]
        parts += ["![differences](differences.png)\n"]
    narrow = {name: other for name, other in comparison.narrow_of.items() if name in results.records}
    if narrow:
        parts += ["## Minus the narrower standard model of as many parameters\n", difference_table(results, narrow)]
    parts += ["## Loss against tokens, time and parameters\n", "![loss against tokens](curves.png)\n"]
    parts += ["![loss against time and parameters](pareto.png)\n"]
    if comparison.claims:
        parts += ["## Claims\n", claim_table(results)]
    published = [(v.name, v.published) for v in comparison.variants if v.published]
    if published:
        parts += ["## What the papers report\n", markdown_table(["variant", "published"], published)]
    if results.missing:
        parts.append(f"Runs without a record: {', '.join(results.missing)}.\n")
    return "\n".join(parts)


def _provenance(results: Results) -> str:
    def of(name: str) -> str:
        return ", ".join(sorted({str(record[name]) for record in results.every}))

    seeds = ", ".join(map(str, sorted({record["seed"] for record in results.every})))
    tokens = ", ".join(f"{tokens:,}" for tokens in sorted({record["tokens"] for record in results.every}))
    notes = f"\n{results.comparison.notes}\n" if results.comparison.notes else ""
    return (
        f"{len(results.every)} runs of {tokens} tokens each, seeds {seeds}; {of('hardware')}, threads {of('threads')}"
        f", torch {of('torch')}, transformers {of('transformers')}, commit {of('commit')}, {of('date')}.\n{notes}"
    )


def _redraw_command(every: Sequence[Results]) -> str:
    files = [str(results.comparison.path) for results in every]
    differing = sorted({name for results in every for name in differing_in(results.comparison, results.every)})
    options = ["--may_differ", *differing] if differing else []
    return " ".join(["python scripts/compare.py", *files, "--redraw", *options])


def _speed(results: Results) -> str:
    if results.speed is None:
        return "Speed is that of the runs, which may have shared their machine."
    speed = results.speed
    return (
        f"Speed is that of training steps of all variants in turns, medians of {speed['rounds']}: "
        f"{speed['hardware']}, threads {speed['threads']}, commit {speed['commit']}, {speed['date']} (`--speed`)."
    )


def score_table(results: Results) -> str:
    """Return a table with a row for each variant: its size, its speed, and every measure."""
    whole = non_embedding(results.comparison.costs[results.comparison.baseline])
    rows = []
    for name, records in results.records.items():
        first = records[0]
        speed = results.tokens_per_second(name)
        cells = [f"`{name}`", f"{first['non_embedding']:,}", f"{first['non_embedding'] / whole:.1%}", f"{speed:,.0f}"]
        rows.append(cells + [_mean_and_deviation(measure, records) for measure in results.measures])
    header = ["variant", "parameters", "kept", "tokens/s", *(measure.title for measure in results.measures)]
    return markdown_table(header, rows)


def _mean_and_deviation(measure: Measure, records: list[Record]) -> str:
    values = [measure.value(record) for record in records]
    mean = f"{statistics.mean(values):.{measure.decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{measure.decimals}f}"


def _sweep_table(results: Results) -> str:
    """Return what the sweep has chosen for each variant, with a mark where that is the end of its range."""
    sweep, rows = results.comparison.sweep, []
    steps, tried = sweep.max_steps or results.comparison.training["max_steps"], sweep.tried
    for name, records in results.records.items():
        cells = []
        for option, values in tried.items():
            at_end = len(values) > 1 and records[0][option] in (min(values), max(values))
            cells.append(f"{records[0][option]:g}{' (end of the range)' * at_end}")
        rows.append([f"`{name}`", *cells])
    table = markdown_table(["variant", *(option.replace("_", " ") for option in tried)], rows)
    return f"Options with the lowest evaluation loss after {steps:,} steps with seed {sweep.seed}:\n\n{table}"


def difference_table(results: Results, pairs: dict[str, str]) -> str:
    """Return a table of each variant minus another, by its name, for every measure."""
    same = len({*pairs.values()}) == 1
    rows = [
        [f"`{name}`" if same else f"`{name}` − `{other}`"]
        + [format_difference(results.difference(measure, name, other), measure) for measure in results.measures]
        for name, other in pairs.items()
    ]
    return markdown_table(["", *(measure.title for measure in results.measures)], rows)


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
        measure = by_key[claim.measure]
        margin = f", with a margin of {claim.within:g}" if claim.within else ""
        text = f"{claim.claim}{margin} ({claim.source})"
        for name in claim.of:
            against = results.comparison.narrow_of[name] if claim.against == "narrow" else claim.against
            found = results.difference(measure, name, against)
            rows.append(
                [
                    text if name == claim.of[0] else "",
                    f"{measure.title}: `{name}` − `{against}`",
                    format_difference(found, measure),
                    f"**{verdict(found, claim.expected, claim.within, measure.lower_is_better)}**",
                ]
            )
    return markdown_table(["claim", "measured", "difference", "verdict"], rows)
