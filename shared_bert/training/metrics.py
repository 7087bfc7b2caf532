"""The accuracy of the likeliest tokens."""

from collections.abc import Callable

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
