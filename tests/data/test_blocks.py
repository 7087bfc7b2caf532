import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from shared_bert.data import Blocks, StreamedBlocks, corpus_statistics, pack


def test_blocks_carry_index_and_epoch(corpus, bert):
    packed = pack(corpus, bert, 16)
    blocks = Blocks(packed, epoch=2)
    assert len(blocks) == len(packed)
    row = blocks[5]
    assert row["input_ids"].tolist() == packed[5]["input_ids"]
    assert row["document_ids"].tolist() == packed[5]["document_ids"]
    assert (row["index"], row["epoch"]) == (5, 2)
    blocks.set_epoch(3)
    assert [row["epoch"] for row in blocks.__getitems__([1, 0])] == [3, 3]
    streamed = StreamedBlocks(pack(corpus.to_iterable_dataset(), bert, 16), epoch=3)
    for _ in range(2):
        for one, other in zip(streamed, (blocks[i] for i in range(len(blocks))), strict=True):
            assert {name: np.asarray(one[name]).tolist() for name in one} == {
                name: np.asarray(other[name]).tolist() for name in other
            }


def test_accelerate_sets_the_epoch(corpus, bert):
    blocks = Blocks(pack(corpus, bert, 16))
    loader = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(blocks, batch_size=4, shuffle=True))
    loader.set_epoch(7)
    assert next(iter(loader))["epoch"].tolist() == [7] * 4


def test_one_worker_reads_a_stream(corpus, bert, monkeypatch):
    stream = StreamedBlocks(pack(corpus.to_iterable_dataset(num_shards=2), bert, 16))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1)
    assert [row["index"] for row in loader] == list(range(len(pack(corpus, bert, 16))))
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match="read by one worker, not by 2"):
        list(stream)


def test_statistics(bert):
    texts = ["cat dog cat dog cat dog cat dog", "cat dog"]
    statistics = corpus_statistics(pack(Dataset.from_dict({"text": texts}), bert, 8), bert.all_special_ids)
    assert statistics.num_blocks == 2
    assert statistics.num_tokens == 10 + 2 * 3
    assert statistics.unigram_entropy == pytest.approx(math.log(2))
