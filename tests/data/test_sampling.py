import pytest
import torch
from datasets import Dataset, IterableDataset

from shared_bert.data import calibration_batches, pack


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_batches_are_the_first_blocks(corpus, request, kind, streamed):
    tokenizer = request.getfixturevalue(kind)
    documents = corpus.to_iterable_dataset() if streamed else corpus
    batches = calibration_batches(documents, tokenizer, num_tokens=16 * 9 - 3, block_size=16)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 1]
    blocks = pack(corpus, tokenizer, block_size=16)
    for column in ("input_ids", "document_ids"):
        found = torch.cat([batch[column] for batch in batches])
        assert found.dtype == torch.int64
        assert found.tolist() == blocks[:9][column]


def test_no_more_is_read_than_needed(bert):
    def documents():
        yield from ({"text": "the cat walks"} for _ in range(2000))
        raise AssertionError("read on")

    stream = IterableDataset.from_generator(documents)
    (batch,) = calibration_batches(stream, bert, num_tokens=10, block_size=8)
    assert batch["input_ids"].shape == (2, 8)


def test_too_little_text_is_refused(bert):
    with pytest.raises(ValueError, match="has 0 tokens, which do not fill one block of 16"):
        calibration_batches(Dataset.from_dict({"text": ["", " "]}), bert, num_tokens=32, block_size=16)
    with pytest.raises(ValueError, match="num_tokens=0 must be at least 1"):
        calibration_batches(Dataset.from_dict({"text": ["the cat"]}), bert, num_tokens=0, block_size=16)
