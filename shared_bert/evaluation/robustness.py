"""How a fine-tuned model does on noisy embeddings, and on other tasks of the same question.

Both as in Kowsher et al., arXiv 2412.00359, tables 5 and 6.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion.calibration import evaluating
from ..data.tasks import GLUE, tokenize_task
from ..plotting import legend, tidy

NOISE_LEVELS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
# The label that answers "yes": the second text follows from the first, or says the same.
SAME_QUESTION = {
    "mnli": "entailment",
    "qnli": "entailment",
    "rte": "entailment",
    "qqp": "duplicate",
    "mrpc": "equivalent",
}


def check_head(model: PreTrainedModel, name: str):
    """Raise a ValueError unless the model classifies by the labels of a GLUE task."""
    labels = GLUE[name].labels
    if labels is None:
        raise ValueError(f"{name} has no classes: the noise test and the cross-domain test need a classification task")
    own = tuple(model.config.id2label[i] for i in sorted(model.config.id2label))
    if own != labels:
        raise ValueError(f"the head's labels are {', '.join(own)}, but those of {name} are {', '.join(labels)}")


@torch.no_grad()
def predict_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    name: str,
    noise: float = 0.0,
    seed: int = 0,
    max_length: int = 128,
    batch_size: int = 64,
) -> torch.Tensor:
    """Return the likeliest label of each row, [rows].

    Args:
        rows: of the GLUE task `name`.
        noise: isotropic Gaussian noise is added to the input embeddings, whose mean length is this share of the mean
            length of the model's embeddings.
        seed: of the noise.
    """
    tokens = tokenize_task(rows, GLUE[name], tokenizer, max_length)
    order = np.argsort(tokens["length"], kind="stable").tolist()  # similar lengths need little padding
    tokens = tokens.remove_columns(["labels", "length"])
    collate = DataCollatorWithPadding(tokenizer)
    embeddings = model.get_input_embeddings()
    size = noise * embeddings.weight.norm(dim=-1).mean() / embeddings.weight.shape[1] ** 0.5
    generator = torch.Generator().manual_seed(seed)

    def add_noise(module, inputs, output):
        return output + size * torch.randn(output.shape, generator=generator).to(output)

    predictions = torch.empty(len(tokens), dtype=torch.long)
    # A hook, since stock decoders find the last token of a row by its ids.
    with evaluating(model, [embeddings.register_forward_hook(add_noise)] if noise else []):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = collate([tokens[i] for i in places]).to(model.device)
            predictions[places] = model(**batch).logits.argmax(-1).cpu()
    return predictions


def noise_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    name: str,
    levels: Sequence[float] = NOISE_LEVELS,
    draws: int = 5,
    **options,
) -> list[dict[str, Any]]:
    """Return the accuracy at each level of noise: `level`, and the `spread` over the draws.

    Args:
        levels: see `noise` of `predict_labels`.
        draws: of the noise at each level; without noise there is one.
        **options: see `predict_labels`.

    Raises:
        ValueError: a head of other labels, a negative level, or no draws.
    """
    check_head(model, name)
    if draws < 1 or min(levels, default=0) < 0:
        raise ValueError(f"draws={draws} must be at least 1, and the levels {list(levels)} at least 0")
    labels = torch.tensor(rows["label"][:])
    results = []
    for level in levels:
        accuracies = [
            (predict_labels(model, tokenizer, rows, name, level, seed, **options) == labels).double().mean().item()
            for seed in range(draws if level else 1)
        ]
        results.append({"level": level, **spread(accuracies)})
    return results


def spread(accuracies: list[float]) -> dict[str, Any]:
    """Return the `accuracies`, their `mean`, and their standard deviation `std`, which is 0 for a single one."""
    std = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {"accuracies": accuracies, "mean": statistics.mean(accuracies), "std": std}


def over_seeds(results: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the results of `noise_accuracy` for a model that was fine-tuned with several seeds.

    The accuracies are the means over the draws of each seed.
    """
    if len(results) == 1:
        return results[0]
    return [
        {"level": rows[0]["level"], **spread([row["mean"] for row in rows])} for rows in zip(*results, strict=True)
    ]


def draw_noise(results: dict[str, list[dict[str, Any]]], title: str, path: Path):
    """Draw accuracy against noise for each model, with the standard deviation over the draws."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="noise (% of the mean embedding norm)", ylabel="accuracy (%)", title=title)
    for i, (model, rows) in enumerate(results.items()):
        levels, means, stds = ([100 * row[key] for row in rows] for key in ("level", "mean", "std"))
        axes.errorbar(
            levels,
            means,
            stds,
            capsize=3,
            marker="osD^v<>P"[i % 8],
            linestyle=["-", "--", ":", "-."][i % 4],
            label=model,
        )
    tidy(axes, grid="y")
    legend(figure)
    figure.savefig(path)


def cross_domain_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained_on: str, rows: dict[str, Dataset], **options
) -> dict[str, float]:
    """Return the accuracy of a model on other tasks of the same yes-or-no question; see `SAME_QUESTION`.

    The model's label and the row's both count as "yes" or "no": MNLI's neutral and contradiction are "no".

    Args:
        trained_on: the task that the model was fine-tuned on.
        rows: of the tasks to evaluate on, by name.
        **options: see `predict_labels`.

    Raises:
        ValueError: a task that asks another question, or a head of other labels.
    """
    for name in (trained_on, *rows):
        if name not in SAME_QUESTION:
            raise ValueError(f"{name} asks another question; the cross-domain tasks are {', '.join(SAME_QUESTION)}")
    check_head(model, trained_on)

    def is_yes(labels: torch.Tensor, name: str) -> torch.Tensor:
        return labels == GLUE[name].labels.index(SAME_QUESTION[name])

    accuracies = {}
    for name, of_task in rows.items():
        predictions = predict_labels(model, tokenizer, of_task, name, **options)
        found, expected = is_yes(predictions, trained_on), is_yes(torch.tensor(of_task["label"][:]), name)
        accuracies[name] = (found == expected).double().mean().item()
    return accuracies
