"""Packed blocks as torch data sets, and their statistics."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from .packing import BLOCKS_PER_BATCH, PADDING


class Blocks(torch.utils.data.Dataset):
    """Packed blocks with the numbers that a collator's random choices depend on.

    An item is `input_ids` and `document_ids` (NumPy [block_size]), `index` and `epoch` (int).
    """

    def __init__(self, dataset: Dataset, epoch: int = 0):
        self.dataset = dataset.with_format("numpy")
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Return a whole batch, as torch's DataLoader prefers."""
        rows = self.dataset[indices]
        return [
            {"input_ids": input_ids, "document_ids": document_ids, "index": index, "epoch": self.epoch}
            for input_ids, document_ids, index in zip(rows["input_ids"], rows["document_ids"], indices, strict=True)
        ]


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Like `Blocks`, for a stream that `pack` returned; `index` counts from 0 in every epoch.

    Only one DataLoader worker can read it: several would give different blocks the same index.
    """

    def __init__(self, dataset: IterableDataset, epoch: int = 0):
        self.dataset = dataset.with_format("numpy")
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"a stream of blocks is read by one worker, not by {worker.num_workers}")
        for index, row in enumerate(self.dataset):
            yield {**row, "index": index, "epoch": self.epoch}


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of a packed corpus.

    Attributes:
        num_blocks: blocks.
        num_tokens: tokens, special ones included, padding not.
        unigram_entropy: of the distribution of the tokens that are not special, in nats: the loss of the best
            predictor that ignores context, which training must get below.
    """

    num_blocks: int
    num_tokens: int
    unigram_entropy: float


def corpus_statistics(blocks: Dataset, special_ids: list[int]) -> CorpusStatistics:
    """Return the statistics of packed blocks (the result of `pack` for a `Dataset`)."""
    counts = np.zeros(max(special_ids, default=0) + 1, dtype=np.int64)
    for batch in blocks.with_format("numpy").iter(BLOCKS_PER_BATCH):
        more = np.bincount(batch["input_ids"][batch["document_ids"] != PADDING], minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    num_tokens = int(counts.sum())
    counts[special_ids] = 0
    shares = counts[counts > 0] / counts.sum()
    return CorpusStatistics(len(blocks), num_tokens, -math.fsum(shares * np.log(shares)))
