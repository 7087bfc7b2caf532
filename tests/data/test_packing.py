import logging

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared_bert.data import pack, packing

from .conftest import WORDS

documents = st.lists(st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join), min_size=1, max_size=12)
several = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["bert", "gpt"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def dataset(texts):
    return Dataset.from_dict({"text": texts})


def blocks_of(texts, tokenizer, block_size=16, **options):
    """Both columns [blocks, block_size], which are the same from a data set and from a stream."""
    packed = pack(dataset(texts), tokenizer, block_size, **options)
    rows = packed.with_format("numpy")[:]
    assert packed.features["input_ids"] == packed.features["document_ids"] == List(Value("int32"), block_size)
    streamed = list(pack(dataset(texts).to_iterable_dataset(), tokenizer, block_size, **options))
    for column in ("input_ids", "document_ids"):
        np.testing.assert_array_equal(rows[column], [row[column] for row in streamed])
    return rows["input_ids"], rows["document_ids"]


def plain_tokens(texts, tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


FILLER = " ".join(["cat"] * 16)  # enough for one block


@several
@given(texts=documents)
def test_no_token_is_lost(tokenizer, texts):
    texts = [FILLER, *texts]
    input_ids, document_ids = blocks_of(texts, tokenizer)
    found = []
    for ids, numbers in zip(input_ids, document_ids, strict=True):
        for number in range(numbers.max() + 1):
            segment = ids[numbers == number].tolist()
            if tokenizer.cls_token_id is not None:
                assert segment[0] == tokenizer.cls_token_id
                assert segment[-1] == tokenizer.sep_token_id
                segment = segment[1:-1]
            assert segment
            found += segment
    ends = [] if tokenizer.cls_token_id is not None else [tokenizer.eos_token_id]
    assert found == [token for tokens in plain_tokens(texts, tokenizer) if tokens for token in tokens + ends]


@several
@given(texts=documents)
def test_padding_stands_only_where_nothing_fits(tokenizer, texts):
    input_ids, document_ids = blocks_of([FILLER, *texts], tokenizer)
    padding = document_ids == -1
    assert (input_ids[padding] == tokenizer.pad_token_id).all()
    room = 2 if tokenizer.cls_token_id is not None else 0
    assert (padding[:-1].sum(1) <= room).all()
    assert (np.diff(np.where(padding, 10**6, document_ids), axis=1) >= 0).all(), "numbered 0, 1, 2, …, padding"


@several
@given(texts=documents)
def test_an_unseparated_stream_is_simply_cut(tokenizer, texts):
    texts = [FILLER, *texts]
    input_ids, document_ids = blocks_of(texts, tokenizer, separate_documents=False)
    bert = tokenizer.cls_token_id is not None
    before, after = ([tokenizer.cls_token_id], [tokenizer.sep_token_id]) if bert else ([], [tokenizer.eos_token_id])
    stream = [t for tokens in plain_tokens(texts, tokenizer) if tokens for t in before + tokens + after]
    assert input_ids.ravel().tolist() == stream[: len(stream) // 16 * 16]
    assert (document_ids == 0).all()


def test_a_document_over_many_batches_and_blocks(tokenizer, monkeypatch):
    texts = ["old cat"] * 7 + [" ".join(WORDS * 40)] + ["dog"] * 5
    whole = blocks_of(texts, tokenizer)
    monkeypatch.setattr(packing, "PACKING_VERSION", -1)
    monkeypatch.setattr(packing, "TEXTS_PER_BATCH", 2)
    monkeypatch.setattr(packing, "BLOCKS_PER_BATCH", 3)
    monkeypatch.setattr(packing, "PIECES_PER_CALL", 3)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 50)
    np.testing.assert_array_equal(blocks_of(texts, tokenizer), whole)


odd_words = st.text(alphabet="ab.,\u00a0\u3000\x1c\x85é猫", max_size=5).map(lambda text: text + "b")
odd_texts = st.lists(st.tuples(odd_words, st.sampled_from([" ", "\n", "\t ", " \r\n", "  "])), max_size=20)


@several
@given(parts=odd_texts)
def test_cutting_long_texts_changes_no_token(tokenizer, parts):
    text = "".join(word + space for word, space in parts)
    whole = plain_tokens([text], tokenizer)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PIECE_CHARACTERS", 10)
        cut = packing._tokenize({"text": [text]}, tokenizer, wrapping=([], []))["tokens"][0]
    assert cut.tolist() == whole


def test_a_text_without_spaces_is_cut_all_the_same(gpt, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 4)
    input_ids, document_ids = blocks_of(["catdog" * 20], gpt)
    assert gpt.decode(input_ids[document_ids >= 0]) == "catdog" * 20 + gpt.eos_token


def test_odd_documents_do_no_harm(tokenizer):
    odd = ["", None, "\x00", " \n"]
    input_ids, _ = blocks_of([FILLER, *odd, "nul\x00 in it"], tokenizer)
    assert len(input_ids)

    def surrogates():
        yield {"text": FILLER}
        yield {"text": "lone \ud800 surrogate"}

    assert list(pack(IterableDataset.from_generator(surrogates), tokenizer, 16))


def test_mentioned_special_tokens_are_text(tokenizer):
    special = tokenizer.sep_token or tokenizer.eos_token
    input_ids, document_ids = blocks_of([f"{' '.join(WORDS)} {special} cat"], tokenizer, block_size=8)
    wrapped_blocks = len(input_ids) if tokenizer.sep_token else 1
    assert (input_ids[document_ids >= 0] == tokenizer.convert_tokens_to_ids(special)).sum() == wrapped_blocks


def test_no_warning_about_long_texts(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        blocks_of([" ".join(WORDS * 9)], tokenizer)
    assert not [record for record in caplog.records if "longer than" in record.message]


def test_several_processes_make_the_same_blocks(corpus, bert, monkeypatch):
    one = pack(corpus, bert, 16)
    monkeypatch.setattr(packing, "PACKING_VERSION", -1)
    assert pack(corpus, bert, 16, num_proc=2)[:] == one[:]


def test_packed_once(tokenizer, monkeypatch):
    texts = [FILLER, *WORDS]
    first = pack(dataset(texts), tokenizer, 16)
    tokenizer(["a", "a cat"], padding=True, truncation=True, max_length=2)  # leaves marks on the tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "map", None)
        again = pack(dataset(texts), tokenizer, 16)
    assert again.cache_files == first.cache_files
    others = [
        pack(dataset(texts), tokenizer, 8),
        pack(dataset(texts), tokenizer, 16, separate_documents=False),
        pack(dataset([*texts, "more"]), tokenizer, 16),
    ]
    assert len({d.cache_files[0]["filename"] for d in [first, *others]}) == 4


def test_a_changed_tokenizer_packs_anew(corpus, bert, gpt):
    assert pack(corpus, bert, 16).cache_files != pack(corpus, gpt, 16).cache_files


def test_what_cannot_be_packed_is_refused(tokenizer, bert):
    with pytest.raises(ValueError, match="at least 8 tokens, not 7"):
        pack(dataset(WORDS), tokenizer, 7)
    for texts, found in (["cat"], r"[23] tokens"), ([""], "0 tokens"):
        with pytest.raises(ValueError, match=f"has {found}, which do not fill one block of 64"):
            pack(dataset(texts), tokenizer, 64)
    with pytest.raises(ValueError, match="do not fill"):
        list(pack(dataset(["cat"]).to_iterable_dataset(), tokenizer, 64))
