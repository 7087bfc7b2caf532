"""Batches of calibration text."""

from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .collation import collate_blocks
from .packing import pack

ROWS_PER_BATCH = 8


def calibration_batches(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, num_tokens: int, block_size: int
) -> list[dict[str, torch.Tensor]]:
    """Pack the first documents into batches of a model's inputs; only as many as needed are read.

    Args:
        documents: rows with a `text`.
        num_tokens: tokens, including special ones and padding, rounded up to a multiple of `block_size`; fewer if the
            documents have fewer.
        block_size: tokens per row.

    Returns:
        Batches of `input_ids` and `document_ids` (-1 at padding), int64 [at most 8, block_size].

    Raises:
        ValueError: `num_tokens` below 1, or documents that do not fill one block.
    """
    if num_tokens < 1:
        raise ValueError(f"calibration needs tokens: num_tokens={num_tokens} must be at least 1")
    if isinstance(documents, Dataset):
        documents = documents.to_iterable_dataset()
    blocks = pack(documents, tokenizer, block_size).with_format("numpy")
    rows = list(islice(blocks, -(-num_tokens // block_size)))
    return [collate_blocks(rows[i : i + ROWS_PER_BATCH]) for i in range(0, len(rows), ROWS_PER_BATCH)]
