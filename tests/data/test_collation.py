import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_bert.data import Blocks, CausalLanguageModelingCollator, MaskedLanguageModelingCollator, pack


@pytest.fixture(scope="module")
def rows(corpus, bert):
    blocks = Blocks(pack(corpus, bert, 32))
    return [blocks[index] for index in range(len(blocks))]


def ordinary(batch, rows, tokenizer):
    """Bool [batch, seq]: neither special nor padding, before masking."""
    original = np.stack([row["input_ids"] for row in rows])
    return torch.from_numpy(~np.isin(original, tokenizer.all_special_ids))


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one
    )


@given(probability=st.floats(0.01, 1), seed=st.integers(0, 2**32), index=st.integers(0, 2**40))
def test_the_number_of_predictions_is_rounded_and_bounded(rows, bert, probability, seed, index):
    some = [{**row, "index": index + i} for i, row in enumerate(rows[-5:])]
    batch = MaskedLanguageModelingCollator(bert, probability, seed=seed)(some)
    predicted = batch["labels"] != -100
    maskable = ordinary(batch, some, bert)
    assert not (predicted & ~maskable).any()
    for found, share in zip(predicted.sum(1).tolist(), (probability * maskable.sum(1)).tolist(), strict=True):
        assert math.floor(share) <= found <= math.ceil(share)
    assert predicted.sum() <= batch["num_predictions"] == 5 * math.ceil(probability * 32)


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_the_mean_share_is_the_probability(rows, bert, probability):
    many = [{**row, "index": index} for index, row in enumerate(rows * 100)]
    batch = MaskedLanguageModelingCollator(bert, probability)(many)
    share = (batch["labels"] != -100).sum() / ordinary(batch, many, bert).sum()
    # Rounding moves a row by less than one token.
    assert abs(share - probability) < 3 * 0.5 / 32 / math.sqrt(len(many))


def test_labels_are_the_original_tokens_and_the_rest_stays(rows, bert):
    batch = MaskedLanguageModelingCollator(bert)(rows)
    original = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    predicted = batch["labels"] != -100
    assert torch.equal(batch["labels"][predicted], original[predicted])
    assert torch.equal(batch["input_ids"][~predicted], original[~predicted])
    assert batch["document_ids"].dtype == batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_treatment_80_10_10(rows, bert):
    many = [{**row, "index": index} for index, row in enumerate(rows * 20)]
    batch = MaskedLanguageModelingCollator(bert, 0.5)(many)
    predicted = batch["labels"] != -100
    shown, label = batch["input_ids"][predicted], batch["labels"][predicted]
    masked = (shown == bert.mask_token_id).float().mean()
    replaced = ((shown != bert.mask_token_id) & (shown != label)).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert replaced == pytest.approx(0.1, abs=0.02)
    assert not np.isin(shown[shown != bert.mask_token_id], bert.all_special_ids).any()
    assert shown.unique().numel() > 0.9 * len(bert), "replacements come from the whole vocabulary"


@pytest.mark.parametrize("whole_word", [False, True])
def test_the_mask_depends_on_seed_epoch_and_index_alone(whole_word, rows, bert):
    def collate(rows, seed=0):
        return MaskedLanguageModelingCollator(bert, seed=seed, whole_word=whole_word)(rows)

    batch = collate(rows[:6])
    np.random.seed(1)
    for i in (4, 0):  # alone, in another order and process: the same masks
        alone = collate([rows[i]])
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][i])
        assert torch.equal(alone["labels"][0], batch["labels"][i])
    assert equal(batch, collate(rows[:6]))
    assert not equal(batch, collate(rows[:6], seed=1))
    assert not equal(batch, collate([{**row, "epoch": 1} for row in rows[:6]]))
    assert not equal(batch, collate([{**row, "index": row["index"] + 1} for row in rows[:6]]))


@given(probability=st.floats(0.01, 1), epoch=st.integers(0, 99))
def test_whole_words_are_masked_whole(rows, bert, probability, epoch):
    some = [{**row, "epoch": epoch} for row in rows[:8]]
    batch = MaskedLanguageModelingCollator(bert, probability, whole_word=True)(some)
    predicted = (batch["labels"] != -100).numpy()
    maskable = ordinary(batch, some, bert).numpy()
    assert not (predicted & ~maskable).any()
    for row, chosen, possible in zip(some, predicted, maskable, strict=True):
        words = []
        for position, token in enumerate(bert.convert_ids_to_tokens(row["input_ids"])):
            if possible[position]:
                goes_on = token.startswith("##") and possible[position - 1]
                words[-1].append(position) if goes_on else words.append([position])
        assert all(len(set(chosen[word])) == 1 for word in words)
        share = probability * possible.sum()
        assert chosen.sum() <= math.ceil(share)
        spare = math.floor(share) - chosen.sum()
        assert all(len(word) > spare for word in words if not chosen[word[0]]), "what fits is taken"


def test_a_row_with_nothing_to_mask(rows, bert):
    row = {**rows[0], "input_ids": np.full(32, bert.pad_token_id), "document_ids": np.full(32, -1)}
    for whole_word in (False, True):
        batch = MaskedLanguageModelingCollator(bert, whole_word=whole_word)([row])
        assert (batch["labels"] == -100).all()


def test_causal_labels_stay_within_a_document(corpus, gpt):
    blocks = Blocks(pack(corpus, gpt, 32))
    batch = CausalLanguageModelingCollator()([blocks[index] for index in range(len(blocks))])
    documents, labels = batch["document_ids"], batch["labels"]
    expected = batch["input_ids"].clone()
    expected[documents == -1] = -100
    for row, position in (documents.diff(dim=1) != 0).nonzero().tolist():
        expected[row, position + 1] = -100
    assert torch.equal(labels, expected)
    assert (labels[:, 0] != -100).all()
    assert (labels == -100).any()


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_unseparated_documents(kind, corpus, request):
    tokenizer = request.getfixturevalue(kind)
    blocks = Blocks(pack(corpus, tokenizer, 32, separate_documents=False))
    if kind == "bert":
        collator = MaskedLanguageModelingCollator(tokenizer, separate_documents=False)
    else:
        collator = CausalLanguageModelingCollator(separate_documents=False)
    batch = collator([blocks[0], blocks[1]])
    assert "document_ids" not in batch
    if kind == "gpt":
        assert torch.equal(batch["labels"], batch["input_ids"])


def test_bad_arguments_are_refused(bert, gpt):
    with pytest.raises(ValueError, match="in \\(0, 1\\], not 0"):
        MaskedLanguageModelingCollator(bert, mlm_probability=0)
    with pytest.raises(ValueError, match="mask_token"):
        MaskedLanguageModelingCollator(gpt)
    gpt_with_masks = type(gpt)(gpt.get_vocab(), pad_token="<p>", cls_token="<c>", sep_token="<s>", mask_token="<m>")
    with pytest.raises(ValueError, match='continuations by "##", which GPT2Tokenizer'):
        MaskedLanguageModelingCollator(gpt_with_masks, whole_word=True)
