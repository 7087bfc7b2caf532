"""From the arguments of a recipe to its blocks of tokens."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..data import Blocks, StreamedBlocks, load_documents, pack
from .arguments import DataArguments, PretrainingArguments


def describe_text(data_args: DataArguments) -> dict[str, Any]:
    """Return the fields of the text that `run.json` records."""
    names = ("dataset_name", "dataset_config_name", "train_file", "mlm_probability", "whole_word_mask")
    return {name: getattr(data_args, name) for name in names}


def check_streaming(data_args: DataArguments, training_args: PretrainingArguments):
    """Raise a ValueError for options that do not go with a stream."""
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError(f"streaming=true has no end: max_steps={training_args.max_steps} must be above 0")
    if data_args.streaming and training_args.dataloader_num_workers > 1:
        raise ValueError(
            f"streaming=true is read by one worker: dataloader_num_workers={training_args.dataloader_num_workers} "
            "must be 0 or 1"
        )


def read_documents(data_args: DataArguments, seed: int, **changes) -> dict[str, Dataset | IterableDataset]:
    """Return the documents of `load_documents`; `changes` replace its arguments."""
    names = (
        "dataset_name", "dataset_config_name", "train_file", "validation_file", "text_column", "sample_by",
        "streaming", "validation_split", "max_train_samples", "max_eval_samples",
    )  # fmt: skip
    return load_documents(**{name: getattr(data_args, name) for name in names} | changes, seed=seed)


def pack_documents(
    documents: dict[str, Dataset | IterableDataset], tokenizer: PreTrainedTokenizerBase, data_args: DataArguments
) -> dict[str, Dataset | IterableDataset]:
    """Pack the documents of each split into blocks.

    Raises:
        ValueError: naming the split whose text cannot be packed.
    """
    return {split: _pack_split(split, part, tokenizer, data_args) for split, part in documents.items()}


def _pack_split(split: str, documents, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments):
    workers = data_args.preprocessing_num_workers
    try:
        blocks = pack(documents, tokenizer, data_args.block_size, data_args.separate_documents, num_proc=workers)
        next(iter(blocks))  # raises for a stream that does not fill one block
        return blocks
    except ValueError as error:
        raise ValueError(f"{split} text: {error}") from error


def block_datasets(blocks: dict[str, Dataset | IterableDataset]) -> dict[str, torch.utils.data.Dataset]:
    """Return the `train_dataset` and the `eval_dataset` of a Trainer."""
    train, validation = blocks["train"], blocks["validation"]
    if isinstance(train, IterableDataset):
        return {"train_dataset": EndlessBlocks(train), "eval_dataset": StreamedBlocks(validation)}
    return {"train_dataset": Blocks(train), "eval_dataset": Blocks(validation)}


class EndlessBlocks(torch.utils.data.IterableDataset):
    """A stream that starts again at its end: one epoch for Trainer, which cannot resume a stream in a later one."""

    def __init__(self, dataset: IterableDataset):
        self.blocks = StreamedBlocks(dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self.blocks.set_epoch(epoch)
            yield from self.blocks
