"""How much faster fine-tuning is on rows of their real lengths than on rows padded to one length."""

import statistics
import tempfile
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.tasks import GLUE
from ..training.arguments import FinetuningArguments
from ..training.finetuning import finetune
from .classification import metric_names

_PADDING = {"padded": "max_length", "real_lengths": False}


def compare_padding(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    splits: dict[str, Dataset],
    max_length: int = 128,
    rounds: int = 3,
    **options,
) -> dict[str, Any]:
    """Fine-tune on a GLUE task in turns, with all rows padded to `max_length` and with batches of similar lengths.

    Args:
        name_or_path, tokenizer, splits: see `finetune`.
        name: of the task.
        **options: of `FinetuningArguments`, the same for both.

    Returns:
        `seconds_per_epoch` (medians) and `scores` (means over the rounds, whose seeds differ) under "padded" and
        "real_lengths"; `speedup`, the ratio of the medians, and the `speedups` of all rounds.
    """
    seconds = {kind: [] for kind in _PADDING}
    scores = {kind: [] for kind in _PADDING}
    for seed in range(rounds):
        for kind, padding in _PADDING.items():
            with tempfile.TemporaryDirectory() as folder:
                # Rows of one length need no grouping: they are in random order, as usual.
                strategy = "random" if padding else "group_by_length"
                args = FinetuningArguments(
                    output_dir=folder, seed=seed, train_sampling_strategy=strategy, eval_strategy="no", **options
                )
                metrics = finetune(name_or_path, tokenizer, GLUE[name], splits, args, max_length, padding)["metrics"]
            seconds[kind].append(metrics["train_runtime"] / args.num_train_epochs)
            scores[kind].append(metrics[f"eval_{metric_names(GLUE[name])[0]}"])
    medians = {kind: statistics.median(measured) for kind, measured in seconds.items()}
    return {
        "model": name_or_path,
        "task": name,
        "max_length": max_length,
        "rows": len(splits["train"]),
        "rounds": rounds,
        "options": options,
        "seconds_per_epoch": medians,
        "scores": {kind: statistics.mean(found) for kind, found in scores.items()},
        "speedup": medians["padded"] / medians["real_lengths"],
        "speedups": [a / b for a, b in zip(seconds["padded"], seconds["real_lengths"], strict=True)],
    }
