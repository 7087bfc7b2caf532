"""Metrics of language models and of tasks."""

import difflib
import importlib.util
from collections.abc import Callable, Collection

import numpy as np
import torch
from transformers import EvalPrediction

from ..data.tasks import Task
from ..modeling.losses import IGNORED


def likeliest_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce logits [batch, seq, vocabulary] to tokens [batch, seq] before they are gathered and kept."""
    return logits.argmax(dim=-1)


def accuracy_of(objective: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the metric of masked ("mlm") or next ("clm") tokens: `accuracy` at positions with a label."""

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        tokens, labels = prediction.predictions, prediction.label_ids
        if objective == "clm":
            tokens, labels = tokens[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        return {"accuracy": float(np.mean(tokens[counted] == labels[counted]))}

    return accuracy


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
        from scipy import stats

        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0  # a correlation with a constant is not defined
        return float(getattr(stats, name)(predictions, labels).statistic)

    return correlation


# By the names that `evaluate` has for them: each takes predictions and labels [rows].
TASK_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearmanr": _correlation("spearmanr"),
}
# Of spans of words, by seqeval: names of its functions, which take labels by name, a list for each row.
SPAN_METRICS = {"span_f1": "f1_score", "span_precision": "precision_score", "span_recall": "recall_score"}


def check_metrics(names: Collection[str]):
    """Raise an error unless all metrics can be computed.

    Raises:
        ValueError: an unknown metric, with the nearest.
        ImportError: scikit-learn, scipy or seqeval is missing.
    """
    known = [*TASK_METRICS, *SPAN_METRICS]
    for name in names:
        if name not in known:
            (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(f"{name!r} is not a metric; the nearest is {nearest!r}, and all are {', '.join(known)}")
    for package in ("scipy", "sklearn", "seqeval"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"metrics of tasks need {package}: pip install 'shared_bert[finetune]'")


def task_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the metrics of a task, computed from its logits.

    These are [rows, labels], for regression [rows, 1] (the numbers themselves), of kind "choice" [rows, choices], and
    of kind "tokens" [rows, tokens, labels], of which only tokens with a label count.

    Raises:
        ValueError, ImportError: see `check_metrics`; a metric that is not of such a task.
    """
    check_metrics(task.metrics)
    fitting = {"pearson", "spearmanr"} if task.labels is None else {"accuracy", "matthews_correlation"}
    fitting |= {"f1"} if task.labels and len(task.labels) == 2 else set()
    fitting |= SPAN_METRICS.keys() if task.kind == "tokens" else set()
    if unfit := [name for name in task.metrics if name not in fitting]:
        raise ValueError(f"{', '.join(unfit)}: metrics of this task can be {', '.join(sorted(fitting))}")

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        logits = logits[0] if isinstance(logits, tuple) else logits  # followed by hidden states or a cache
        predictions = logits.argmax(-1) if task.labels else logits.squeeze(-1)
        found = _span_metrics(predictions, labels, task) if task.kind == "tokens" else {}
        if task.kind == "tokens":
            predictions, labels = predictions[labels != IGNORED], labels[labels != IGNORED]
        return {
            name: found[name] if name in found else TASK_METRICS[name](predictions, labels) for name in task.metrics
        }

    return metrics


def _span_metrics(predictions: np.ndarray, labels: np.ndarray, task: Task) -> dict[str, float]:
    from seqeval import metrics

    def names(rows: np.ndarray) -> list[list[str]]:
        return [[task.labels[i] for i in row[of_row != IGNORED]] for row, of_row in zip(rows, labels, strict=True)]

    spans = names(labels), names(predictions)
    return {
        name: float(getattr(metrics, SPAN_METRICS[name])(*spans, zero_division=0))
        for name in task.metrics
        if name in SPAN_METRICS
    }
