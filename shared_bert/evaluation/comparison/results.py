"""Tables of a comparison, made of its records alone."""

import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..tables import markdown_table
from .comparison import Comparison, non_embedding
from .differences import RESAMPLES, Difference, Measure, verdict
from .file import Claim
from .gathering import Results
from .plots import draw_curves, draw_differences, draw_pareto, draw_scores
from .records import Record, differing_in

_FINDINGS = """\
Each claim is held against a difference that was measured here, with its 95 % intervals: that of the paired bootstrap
over seeds and documents (or paradigms), where there are any, and after *t* Student's over the seeds. It is *supported*
if both intervals lie wholly where the claim says, *not supported* if both lie wholly elsewhere, and else *not decided
at this scale*; a single seed decides nothing. *Better* or *worse* says how the first model differs: one that should be
the same can be better. A margin widens the claim: what should be the same may differ by as much, and what should be
lower may be higher by as much.

Differences are those of the first model minus the second; above, one has the range of both intervals beside it, and
of several the lowest and the highest are named. Losses are in nats per token, scores in points. `narrow_AxB` is a
standard model A wide, with an MLP of B. Beside each model stands its share of the parameters of the baseline outside
the embeddings, which is what narrower models match; their embeddings are smaller, too.

The models are small and have read little: nothing here is about larger ones. With three seeds, a claim of "the same"
can hardly be supported. Nothing is corrected for the number of verdicts, so a few of those at 95 % are chance.
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
        figure = draw(results)
        figure.suptitle(_source(results), fontsize="x-small", color="#777777")
        # Without the version of matplotlib, so that the same records make the same file.
        figure.savefig(unfinished, format="png", metadata={"Software": None})
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
    parts = ["# Do the claims hold?\n", _summary(every), _FINDINGS]
    parts += [f"```bash\n{_redraw_command(every)} --findings {page}\n```\n"]
    for results in every:
        link = os.path.relpath(results.comparison.results_dir / "results.md", page.parent)
        parts += [f"## {_title(results)}\n", f"All numbers: [{link}]({link}).\n", _provenance(results)]
        parts += [claim_table(results)]
    return "\n".join(parts)


def _title(results: Results) -> str:
    return results.comparison.path.stem.replace("_", " ").capitalize()


def _summary(every: Sequence[Results]) -> str:
    """Return a table with a line for each claim: its verdict in each comparison, and the difference measured."""
    lines: dict[str, list[list[_Held]]] = {}
    for place, results in enumerate(every):
        for claim, held in _held(results):
            lines.setdefault(claim.claim, [[] for _ in every])[place] += held
    rows = [[claim, *map(_in_short, cells)] for claim, cells in lines.items()]
    return markdown_table(["claim", *map(_title, every)], rows)


def _in_short(held: list["_Held"]) -> str:
    """Return the verdicts on a claim, with the one difference and the range of its intervals, or all differences."""
    known = sorted((one for one in held if one.found is not None), key=lambda one: one.found.mean)
    numbers = [f"{one.found.mean:+.{one.measure.decimals}f}" for one in known]
    if len(held) == 1:
        interval = known[0].found.interval if known else None
        numbers += [_bracket(interval, known[0].measure)] if interval else []
        return " ".join([f"**{held[0].verdict}**", *numbers])
    counts = ", ".join(f"{count} × **{name}**" for name, count in Counter(one.verdict for one in held).most_common())
    return f"{counts} ({numbers[0]} to {numbers[-1]})" if numbers else counts


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
        "Means ± standard deviations over the seeds; losses in nats per token.",
        f"{_speed(results)}\n",
        f"{_measured_on(results.every[0])}\n",
        score_table(results),
    ]
    if comparison.sweep:
        parts += [_sweep_table(results)]
    parts += ["![scores](scores.png)\n"]
    differences = {name: baseline for name in results.records if name != baseline}
    intervals = (
        f"In brackets the 95 % interval of the paired bootstrap over seeds and documents (for BLiMP, paradigms), "
        f"{RESAMPLES:,} draws; after *t*, Student's over the seeds alone, which is all there is for tasks: how they "
        "would differ on other texts is not in it.\n"
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
    if any(variant.published for variant in comparison.variants):
        parts += ["## What the papers report\n", _published_table(results)]
    if results.missing:
        parts.append(f"Runs without a record: {', '.join(results.missing)}.\n")
    return "\n".join(parts)


def _of(records: Iterable[Record], name: str) -> str:
    """Return all that records say of their hardware, commit or the like."""
    return ", ".join(sorted({str(record[name]) for record in records}))


def _source(results: Results) -> str:
    """Return in a line what made a picture."""
    every = results.every
    versions = f"torch {_of(every, 'torch')}, transformers {_of(every, 'transformers')}"
    return f"{results.comparison.path}: {_of(every, 'hardware')}; {versions}; commit {_of(every, 'commit')}"


def _provenance(results: Results) -> str:
    every = results.every
    seeds = ", ".join(map(str, sorted({record["seed"] for record in every})))
    tokens = ", ".join(f"{tokens:,}" for tokens in sorted({record["tokens"] for record in every}))
    notes = f"\n{results.comparison.notes}\n" if results.comparison.notes else ""
    return (
        f"{len(every)} runs of {tokens} tokens each, seeds {seeds}; {_of(every, 'hardware')}, threads "
        f"{_of(every, 'threads')}, torch {_of(every, 'torch')}, transformers {_of(every, 'transformers')}, commit "
        f"{_of(every, 'commit')}, {_of(every, 'date')}.\n{notes}"
    )


def _measured_on(record: Record) -> str:
    """Return what the numbers of a record were measured on."""
    parts = [
        f"{len(text['document_tokens'])} documents of {name} ({sum(text['document_tokens']):,} tokens predicted)"
        for name, text in record.get("texts", {}).items()
    ]
    if "blimp" in record:
        parts.append(f"{record['blimp']['pairs']:,} pairs of {len(record['blimp']['by_paradigm'])} BLiMP paradigms")
    if "glue" in record:
        parts.append("the validation splits of the tasks")
    measured = f"Measured on {', '.join(parts)}. " if parts else ""
    return f"{measured}Evaluation losses of curves and sweeps are those of the validation text in packed rows."


def _redraw_command(every: Sequence[Results]) -> str:
    files = [str(results.comparison.path) for results in every]
    differing = sorted({name for results in every for name in differing_in(results.comparison, results.every)})
    options = ["--may_differ", *differing] if differing else []
    return " ".join(["python scripts/compare.py", *files, "--redraw", *options])


def _speed(results: Results) -> str:
    if results.speed is None:
        return "Speed is that of the runs, which may have shared their machine, or been on different ones."
    speed = results.speed
    return (
        f"Speed is that of training steps of all variants in turns, medians and quartiles of {speed['rounds']}: "
        f"{speed['hardware']}, threads {speed['threads']}, commit {speed['commit']}, {speed['date']} (`--speed`)."
    )


def score_table(results: Results) -> str:
    """Return a table with a row for each variant: its size, its speed, and every measure."""
    costs, perplexity = results.comparison.costs, results.comparison.objective == "clm"
    whole = non_embedding(costs[results.comparison.baseline])
    rows = []
    for name, records in results.records.items():
        first, cost = records[0], costs[name]
        speed = f"{results.tokens_per_second(name):,.0f}"
        if results.speed is not None:
            speed += " ({:,} to {:,})".format(*results.speed["quartiles"][name])
        cells = [
            f"`{name}`",
            f"{len(records)}",
            f"{first['non_embedding']:,}",
            f"{first['non_embedding'] / whole:.1%}",
        ]
        cells += [f"{cost.total:,}", f"{first['training_flops_per_token'] / 1e6:.1f}", speed]
        rows.append(cells + [_score(measure, records, perplexity) for measure in results.measures])
    header = ["variant", "seeds", "parameters outside the embeddings", "kept", "all parameters", "MFLOP/token"]
    titles = [
        measure.title + " (perplexity)" * (perplexity and measure.key.startswith("loss"))
        for measure in results.measures
    ]
    return markdown_table([*header, "tokens/s", *titles], rows)


def _score(measure: Measure, records: list[Record], perplexity: bool) -> str:
    """Return the mean with the standard deviation, after a loss its perplexity."""
    mean = statistics.mean(measure.value(record) for record in records)
    text = _mean_and_deviation(measure, records)
    return f"{text} ({math.exp(mean):.0f})" if perplexity and measure.key.startswith("loss") else text


def _mean_and_deviation(measure: Measure, records: list[Record]) -> str:
    values = [measure.value(record) for record in records]
    mean = f"{statistics.mean(values):.{measure.decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{measure.decimals}f}"


def _sweep_table(results: Results) -> str:
    """Return what each variant ended at with the options that were tried, the lowest in bold."""
    sweep, rows = results.comparison.sweep, []
    columns = [*dict.fromkeys(tuned for records in results.sweep.values() for tuned in records)]
    for name, records in results.sweep.items():
        losses = {tuned: record["loss"] for tuned, record in records.items()}
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        cells = []
        for tuned in columns:
            loss = losses.get(tuned)
            text = ("diverged" if tuned in losses else "") if loss is None else f"{loss:.4f}"
            cells.append(f"**{text}**" if loss is not None and loss == best else text)
        rows.append([f"`{name}`", *cells])
    header = [", ".join(f"{option.replace('_', ' ')} {value:g}" for option, value in tuned) for tuned in columns]
    every = [record for records in results.sweep.values() for record in records.values()]
    steps = sweep.max_steps or results.comparison.training["max_steps"]
    return (
        f"The options of each variant are those with the lowest evaluation loss after {steps:,} steps with seed "
        f"{sweep.seed}, in bold (`sweep/`; {_of(every, 'hardware')}, commit {_of(every, 'commit')}):\n\n"
        + markdown_table(["variant", *header], rows)
    )


def _published_table(results: Results) -> str:
    """Return what papers report of variants, beside the difference from the baseline that was measured here."""
    measure, baseline = results.measures[0], results.comparison.baseline
    rows = [
        [
            variant.name,
            variant.published,
            format_difference(results.difference(measure, variant.name, baseline), measure),
        ]
        for variant in results.comparison.variants
        if variant.published
    ]
    return markdown_table(["variant", "published", f"{measure.title} minus {baseline}, here"], rows)


def difference_table(results: Results, pairs: dict[str, str]) -> str:
    """Return a table of each variant minus another, which is named unless it is the baseline, for every measure."""
    baseline = results.comparison.baseline
    rows = [
        [f"`{name}`" if other == baseline else f"`{name}` − `{other}`"]
        + [format_difference(results.difference(measure, name, other), measure) for measure in results.measures]
        for name, other in pairs.items()
    ]
    return markdown_table(["", *(measure.title for measure in results.measures)], rows)


def format_difference(found: Difference | None, measure: Measure) -> str:
    """Return "mean [bootstrap interval] t [Student's interval]", without those that are not known."""
    if found is None:
        return ""
    parts = [f"{found.mean:+.{measure.decimals}f}"]
    if found.bootstrap is not None:
        parts.append(_bracket(found.bootstrap, measure))
    if found.student is not None:
        parts.append(f"t {_bracket(found.student, measure)}")
    return " ".join(parts)


def _bracket(interval: tuple[float, float], measure: Measure) -> str:
    low, high = interval
    return f"[{low:+.{measure.decimals}f}, {high:+.{measure.decimals}f}]"


@dataclass(frozen=True)
class _Held:
    """A claim held against what was measured of two variants."""

    name: str
    against: str
    measure: Measure
    found: Difference | None
    verdict: str


def _held(results: Results) -> Iterator[tuple[Claim, list[_Held]]]:
    """Yield each claim of a comparison with all that it is held against."""
    by_key = {measure.key: measure for measure in results.measures}
    for claim in results.comparison.claims:
        measure, held = by_key[claim.measure], []
        for name in claim.of:
            against = results.comparison.narrow_of[name] if claim.against == "narrow" else claim.against
            found = results.difference(measure, name, against)
            decided = verdict(found, claim.expected, claim.within, measure.lower_is_better)
            held.append(_Held(name, against, measure, found, decided))
        yield claim, held


def claim_table(results: Results) -> str:
    """Return a table of the comparison's claims: what was measured, and the verdict."""
    counts = {name: non_embedding(cost) for name, cost in results.comparison.costs.items()}
    kept = {name: f"`{name}` ({count / counts[results.comparison.baseline]:.0%})" for name, count in counts.items()}
    rows = []
    for claim, held in _held(results):
        margin = f", with a margin of {claim.within:g}" if claim.within else ""
        text = f"{claim.claim}{margin} ({claim.source})"
        for one in held:
            pair = f"{one.measure.title}: {kept[one.name]} − {kept[one.against]}"
            rows.append([text, pair, format_difference(one.found, one.measure), f"**{one.verdict}**"])
            text = ""
    return markdown_table(["claim", "measured", "difference", "verdict"], rows)
