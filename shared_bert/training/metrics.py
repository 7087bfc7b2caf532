"""Metrics of language models and of tasks."""

import difflib
import importlib.util
from collections.abc import Callable, Collection

import numpy as np
import torch
from transformers import EvalPrediction

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


def task_metrics(names: Collection[str], is_regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the metrics of a task, from logits [rows, labels] (or [rows, 1], the numbers themselves).

    Raises:
        ValueError: an unknown metric, with the nearest.
        ImportError: scikit-learn or scipy is missing.
    """
    for name in names:
        if name not in TASK_METRICS:
            (nearest,) = difflib.get_close_matches(name, TASK_METRICS, n=1, cutoff=0)
            raise ValueError(f"{name!r} is not a metric; the nearest is {nearest!r}")
    for package in ("scipy", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"metrics of tasks need {package}: pip install 'shared_bert[finetune]'")

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits  # followed by hidden states or a cache
        predictions = logits.squeeze(-1) if is_regression else logits.argmax(-1)
        return {name: TASK_METRICS[name](predictions, prediction.label_ids) for name in names}

    return metrics
