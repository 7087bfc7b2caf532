"""What the records of a comparison measure, and how sure its differences are."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..records import student_interval
from .records import Record

RESAMPLES = 10_000


@dataclass(frozen=True)
class Measure:
    """A number in every record.

    Args:
        key: what a claim calls it.
        title: of a column.
        value: returns it.
        parts: returns what it is the mean of, where that is recorded: the sum of each document or paradigm, and its
            size, [parts] both.
        decimals: to print.
        lower_is_better: whether it is a loss.
    """

    key: str
    title: str
    value: Callable[[Record], float]
    parts: Callable[[Record], tuple[np.ndarray, np.ndarray]] | None = None
    decimals: int = 1
    lower_is_better: bool = False


def measures_of(record: Record) -> list[Measure]:
    """Return what a record, and so all of its comparison, measures."""
    found = [
        Measure(
            f"loss:{name}",
            f"loss on {name}",
            lambda r, name=name: r["texts"][name]["loss"],
            lambda r, name=name: tuple(
                np.array(r["texts"][name][f"document_{what}"], float) for what in ("nats", "tokens")
            ),
            decimals=3,
            lower_is_better=True,
        )
        for name in record.get("texts", {})
    ]
    if not found:
        found.append(Measure("loss", "loss", lambda r: r["loss"], decimals=3, lower_is_better=True))
    if "blimp" in record:
        found.append(Measure("blimp", "BLiMP (%)", lambda r: 100 * r["blimp"]["accuracy"], _paradigms))
    for task, result in record.get("glue", {}).items():
        metric = result["metric"].replace("_", " ")
        found.append(Measure(f"glue:{task}", f"{task} ({metric}, %)", lambda r, t=task: 100 * r["glue"][t]["score"]))
    if len(record.get("glue", {})) > 1:
        found.append(Measure("glue", "mean of the tasks (%)", _glue_mean))
    if "noise" in record:
        level = record["noise"][-1]["level"]
        found.append(
            Measure("noise", f"accuracy lost to {level:.0%} noise (points)", _noise_loss, lower_is_better=True)
        )
    return found


def _paradigms(record: Record) -> tuple[np.ndarray, np.ndarray]:
    accuracies, pairs = (
        np.array([*record["blimp"][what].values()], float) for what in ("by_paradigm", "pairs_by_paradigm")
    )
    return 100 * accuracies * pairs, pairs


def _glue_mean(record: Record) -> float:
    return 100 * statistics.mean(result["score"] for result in record["glue"].values())


def _noise_loss(record: Record) -> float:
    return 100 * (record["noise"][0]["mean"] - record["noise"][-1]["mean"])


@dataclass(frozen=True)
class Difference:
    """The mean difference of two variants over their common seeds, with 95 % intervals.

    Args:
        mean: of the first minus the second.
        student: Student's interval over the seeds; None for a single seed.
        bootstrap: of seeds and parts, drawn again together; None where no parts are recorded. With few seeds it is too
            narrow, since they vary little when drawn again.
    """

    mean: float
    student: tuple[float, float] | None
    bootstrap: tuple[float, float] | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The range of both intervals, which a verdict goes by; None for a single seed, whose luck is not known."""
        if self.student is None or self.bootstrap is None:
            return self.student
        (low, high), (other_low, other_high) = self.student, self.bootstrap
        return min(low, other_low), max(high, other_high)


def difference(measure: Measure, mine: Sequence[Record], theirs: Sequence[Record]) -> Difference | None:
    """Return how the records of one variant differ from another's, paired by seed; None without a common seed.

    Raises:
        ValueError: their parts are not of the same sizes, so they are not of the same texts.
    """
    by_seed = {record["seed"]: record for record in theirs}
    pairs = [(record, by_seed[record["seed"]]) for record in mine if record["seed"] in by_seed]
    if not pairs:
        return None
    values = [measure.value(a) - measure.value(b) for a, b in pairs]
    student = student_interval(values) if len(values) > 1 else None
    bootstrap = None
    if measure.parts is not None:
        sizes = measure.parts(pairs[0][0])[1]
        for record in (record for pair in pairs for record in pair):
            if not np.array_equal(measure.parts(record)[1], sizes):
                raise ValueError(
                    f"{record['name']} with seed {record['seed']} has another {measure.title} than "
                    f"{pairs[0][0]['name']} with seed {pairs[0][0]['seed']}: its parts are of other sizes"
                )
        differences = np.stack([measure.parts(a)[0] - measure.parts(b)[0] for a, b in pairs])
        bootstrap = bootstrap_interval(differences, sizes)
    return Difference(statistics.mean(values), student, bootstrap)


def bootstrap_interval(differences: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean difference, when seeds and parts are both drawn again.

    Args:
        differences: of the sums of each part, [seeds, parts].
        sizes: of the parts, [parts]; the mean is the sum of differences over that of sizes.
    """
    generator = np.random.default_rng(0)
    differences, sizes = differences[:, sizes > 0], sizes[sizes > 0]  # some texts are too short to be masked
    num_seeds, num_parts = differences.shape

    def drawn(count: int) -> np.ndarray:  # how often each is drawn, [RESAMPLES, count]
        return generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)

    seeds, parts = drawn(num_seeds) / num_seeds, drawn(num_parts)
    means = ((seeds @ differences) * parts).sum(1) / (parts @ sizes)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def verdict(found: Difference | None, expected: str, within: float = 0, lower_is_better: bool = True) -> str:
    """Return whether a difference bears a claim out: "supported", "not supported: better" (or "worse"), or "not
    decided at this scale".

    Args:
        expected: "lower", "higher" or "same".
        within: how far what should be the same may differ, what should be lower may be higher, or the reverse.
        lower_is_better: of what differs.
    """
    least, most = {"lower": (-np.inf, within), "higher": (-within, np.inf), "same": (-within, within)}[expected]
    if found is not None and found.interval is not None:
        low, high = found.interval
        if least < low and high < most:
            return "supported"
        if high < least or low > most:
            return f"not supported: {'better' if (high < least) == lower_is_better else 'worse'}"
    return "not decided at this scale"
