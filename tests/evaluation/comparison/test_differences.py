"""Intervals of differences are those of closed forms and of scipy; verdicts follow them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared_bert.evaluation.comparison.differences import (
    Difference,
    Measure,
    bootstrap_interval,
    difference,
    measures_of,
    verdict,
)
from shared_bert.evaluation.comparison.plots import pareto_front

LOSS = Measure("loss", "loss", lambda record: record["loss"])


def test_documents_are_drawn_as_scipy_draws_them():
    generator = np.random.default_rng(1)
    differences, sizes = generator.normal(0.5, 2, 200), generator.integers(1, 50, 200).astype(float)

    def ratio(values, weights, axis):
        return values.sum(axis) / weights.sum(axis)

    expected = stats.bootstrap(
        (differences, sizes), ratio, paired=True, method="percentile", n_resamples=10_000, rng=generator
    ).confidence_interval
    width = expected.high - expected.low
    assert bootstrap_interval(differences[None], sizes) == pytest.approx(tuple(expected), abs=0.05 * width)


def test_seeds_and_documents_both_widen_the_interval():
    """The variance of the mean of s + d + noise over seeds and documents is var(s)/S + var(d)/D."""
    generator = np.random.default_rng(2)
    num_seeds, num_documents = 40, 300
    of_seeds, of_documents = generator.normal(0, 1, (num_seeds, 1)), generator.normal(0, 3, num_documents)
    low, high = bootstrap_interval(of_seeds + of_documents, np.ones(num_documents))
    error = (of_seeds.var() / num_seeds + of_documents.var() / num_documents) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    one_seed = bootstrap_interval(of_documents[None], np.ones(num_documents))
    assert one_seed[1] - one_seed[0] == pytest.approx(2 * 1.96 * (of_documents.var() / num_documents) ** 0.5, rel=0.05)


def test_documents_without_predicted_tokens_are_left_out():
    differences, sizes = np.array([[1.0, 0.0, 3.0]]), np.array([1.0, 0.0, 1.0])
    assert bootstrap_interval(differences, sizes) == bootstrap_interval(differences[:, ::2], sizes[::2])


def test_differences_are_paired_by_seed():
    mine = [{"seed": seed, "loss": 10 * seed + 1.0} for seed in (2, 0, 1, 7)]
    theirs = [{"seed": seed, "loss": 10.0 * seed} for seed in (0, 1, 2, 3)]
    found = difference(LOSS, mine, theirs)
    assert found.mean == 1
    assert found.student == (1, 1)
    assert found.bootstrap is None
    assert difference(LOSS, mine[:1], theirs).student is None
    assert difference(LOSS, mine[3:], theirs) is None


def test_students_interval_is_scipys():
    values = [0.1, 0.5, -0.2, 0.9]
    mine = [{"seed": seed, "loss": value} for seed, value in enumerate(values)]
    theirs = [{"seed": seed, "loss": 0.0} for seed in range(4)]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert difference(LOSS, mine, theirs).student == pytest.approx(tuple(expected))


def test_what_a_record_measures():
    record = {
        "loss": 3.0,
        "texts": {"wiki": {"loss": 2.0, "document_nats": [6.0, 2.0], "document_tokens": [3, 1]}},
        "blimp": {"accuracy": 0.35, "by_paradigm": {"a": 0.25, "b": 0.75}, "pairs_by_paradigm": {"a": 8, "b": 2}},
        "glue": {
            "rte": {"metric": "accuracy", "score": 0.5},
            "cola": {"metric": "matthews_correlation", "score": 0.1},
        },
        "noise": [{"level": 0.0, "mean": 0.9}, {"level": 0.4, "mean": 0.7}],
    }
    values = {measure.key: measure.value(record) for measure in measures_of(record)}
    assert values == pytest.approx(
        {"loss:wiki": 2, "blimp": 35, "glue:rte": 50, "glue:cola": 10, "glue": 30, "noise": 20}
    )
    for measure in measures_of(record)[:2]:
        sums, sizes = measure.parts(record)
        assert sums.sum() / sizes.sum() == pytest.approx(measure.value(record))
    assert [measure.key for measure in measures_of({"loss": 3.0})] == ["loss"]


@pytest.mark.parametrize(
    ("student", "bootstrap", "expected", "within", "found"),
    [
        ((-3, -1), (-2.5, -1.5), "lower", 0, "supported"),
        ((-3, -1), (-2.5, -1.5), "higher", 0, "not supported: better"),
        ((-3, 1), (-2.5, -1.5), "lower", 0, "not decided at this scale"),  # both intervals must agree
        ((1, 3), None, "higher", 0, "supported"),
        ((-0.1, 0.2), None, "same", 0.3, "supported"),
        ((-0.1, 0.4), None, "same", 0.3, "not decided at this scale"),
        ((0.4, 0.5), None, "same", 0.3, "not supported: worse"),
        ((-0.5, -0.4), None, "same", 0.3, "not supported: better"),
        ((0.4, 0.5), None, "lower", 0, "not supported: worse"),
        ((-0.1, 0.2), None, "lower", 0.3, "supported"),
        ((-0.1, 0.2), None, "higher", 0.3, "supported"),
        ((0.2, 0.4), None, "lower", 0.3, "not decided at this scale"),
        ((-0.5, -0.4), None, "higher", 0.3, "not supported: better"),
        (None, None, "lower", 0, "not decided at this scale"),
        (None, (-3, -1), "lower", 0, "not decided at this scale"),  # of a single seed
    ],
)
def test_verdicts(student, bootstrap, expected, within, found):
    assert verdict(Difference(0.0, student, bootstrap), expected, within) == found
    if found.endswith("better"):
        assert verdict(Difference(0.0, student, bootstrap), expected, within, False).endswith("worse")
    assert verdict(None, expected, within) == "not decided at this scale"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_no_point_is_below_the_front(points):
    costs, losses = ({str(i): point[axis] for i, point in enumerate(points)} for axis in (0, 1))
    front = pareto_front(costs, losses)
    assert set(front) <= set(points)
    for cost, loss in points:
        assert any(c <= cost and v <= loss for c, v in front)
    assert sorted(front) == front
    assert sorted(front, key=lambda point: -point[1]) == front
