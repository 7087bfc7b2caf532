"""How many real tokens a second pre-training reads: packed documents, beside documents that are each padded."""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from ..data import Blocks, MaskedLanguageModelingCollator, pack
from .efficiency import MLM_PROBABILITY, StepSettings, TrainingStep, quartiles, take_turns


class StepOnText(TrainingStep):
    """A `TrainingStep` on the next of several batches; `num_tokens` has the real tokens of each step so far."""

    def __init__(self, settings: StepSettings, batches: Iterator[dict[str, Any]]):
        super().__init__(settings)
        self.batches = batches
        self.num_tokens = []

    def __call__(self) -> float:
        batch = next(self.batches)
        is_real = batch["document_ids"] >= 0 if "document_ids" in batch else batch["attention_mask"] > 0
        self.num_tokens.append(int(is_real.sum()))
        self.batch = {k: v.to(self.settings.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        return super().__call__()


def compare_packing(
    settings: StepSettings, documents: Dataset, tokenizer: PreTrainedTokenizerBase, rounds: int = 9, warmup: int = 2
) -> dict[str, Any]:
    """Time masked language modeling in turns: the stock model on padded documents, and this package on packed ones.

    All batches are made before any step is timed.

    Args:
        settings: of the packed side; the length is that of its blocks, to which the other side truncates and pads
            each document.
        documents: rows with a `text`, in random order.

    Returns:
        `tokens_per_second` and the `real_share` of the positions under "padded" and "packed"; `speedup`, the ratio of
        the tokens per second of all rounds, and the quartiles of the ratios round by round.
    """
    padded, packed = (
        iter(list(itertools.islice(batches(settings, documents, tokenizer), warmup + rounds)))
        for batches in (_padded, _packed)
    )
    steps = {
        "padded": StepOnText(replace(settings, attention_scheme=None), padded),
        "packed": StepOnText(settings, packed),
    }
    seconds = take_turns(steps, rounds, warmup)
    tokens = {name: step.num_tokens[warmup:] for name, step in steps.items()}
    speeds = {name: sum(tokens[name]) / sum(seconds[name]) for name in steps}
    by_round = [
        (tokens["packed"][i] / seconds["packed"][i]) / (tokens["padded"][i] / seconds["padded"][i])
        for i in range(rounds)
    ]
    positions = settings.batch_size * settings.sequence_length
    return {
        "settings": asdict(settings),
        "rounds": rounds,
        "tokens_per_second": speeds,
        "real_share": {name: statistics.mean(tokens[name]) / positions for name in steps},
        "speedup": speeds["packed"] / speeds["padded"],
        "speedup_quartiles": quartiles(by_round),
    }


def _padded(settings: StepSettings, documents: Dataset, tokenizer) -> Iterator[dict[str, Any]]:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY)
    options = {"truncation": True, "padding": "max_length", "max_length": settings.sequence_length}
    for indices in _endless_batches(len(documents), settings.batch_size):
        yield dict(collator([tokenizer(documents[i]["text"], **options) for i in indices]))


def _packed(settings: StepSettings, documents: Dataset, tokenizer) -> Iterator[dict[str, Any]]:
    collator = MaskedLanguageModelingCollator(tokenizer, MLM_PROBABILITY)
    blocks = Blocks(pack(documents, tokenizer, settings.sequence_length))
    for indices in _endless_batches(len(blocks), settings.batch_size):
        yield collator([blocks[i] for i in indices])


def _endless_batches(num_rows: int, batch_size: int) -> Iterator[list[int]]:
    rows = itertools.cycle(range(num_rows))
    while True:
        yield list(itertools.islice(rows, batch_size))
