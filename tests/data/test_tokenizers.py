import json
import random

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer

from shared_bert.data import check_tokenizer, load_tokenizer, train_tokenizer
from tests.processes import run_python

TEXT = "The unbelievable cat, walking near a Tree!"


def test_wordpiece_is_a_bert_tokenizer(bert):
    assert type(bert) is BertTokenizer
    assert bert.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(bert) == 120
    pair = bert("The cat", "a DOG")
    assert bert.decode(pair["input_ids"]) == "[CLS] the cat [SEP] a dog [SEP]"
    assert set(pair["token_type_ids"]) == {0, 1}
    assert bert.model_max_length == 32


def test_lowercase_can_be_left_off():
    corpus = Dataset.from_dict({"text": ["Cats Walk", "cats walk"] * 9})
    tokenizer = train_tokenizer("wordpiece", corpus, 60, 32, lowercase=False)
    assert tokenizer.tokenize("Cats cats") == ["Cats", "cats"]


def test_byte_bpe_is_a_gpt2_tokenizer_that_can_pad(gpt):
    assert type(gpt) is GPT2Tokenizer
    assert gpt.bos_token_id == gpt.eos_token_id == gpt.pad_token_id == 0
    assert gpt(["the cat", "a"], padding=True)["attention_mask"][1][-1] == 0


@given(text=st.text())
def test_byte_bpe_round_trip(gpt, text):
    assert gpt.decode(gpt(text)["input_ids"]) == text


@pytest.mark.parametrize("name", ["bert", "gpt"])
@pytest.mark.parametrize("with_config", [False, True])
def test_saved_tokenizer_loads_as_itself(name, with_config, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": f"shared_{name}"}))
    # In a process of its own, where nothing has registered the model type.
    code = (
        "from transformers import AutoTokenizer; import json, sys; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(json.dumps([type(t).__name__, dict(t(sys.argv[2])), t.model_max_length]))"
    )
    run = run_python("-c", code, tmp_path, TEXT)
    assert json.loads(run.stdout) == [type(tokenizer).__name__, dict(tokenizer(TEXT)), 32]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(tmp_path)(TEXT) == tokenizer(TEXT)


def test_same_corpus_same_vocabulary_in_another_process(corpus, bert, tmp_path):
    corpus.save_to_disk(tmp_path)
    code = (
        "import json, sys, datasets; from shared_bert.data import train_tokenizer;"
        "d = datasets.load_from_disk(sys.argv[1]); print(json.dumps(train_tokenizer('wordpiece', d, 120, 32).vocab))"
    )
    run = run_python("-c", code, tmp_path)
    assert json.loads(run.stdout) == bert.get_vocab()


def test_streams_train_the_same_tokenizer(corpus, bert):
    streamed = train_tokenizer("wordpiece", corpus.to_iterable_dataset(), 120, 32)
    assert streamed.get_vocab() == bert.get_vocab()


def test_a_small_corpus_gives_a_smaller_vocabulary():
    tiny = Dataset.from_dict({"text": ["tiny text"] * 3})
    assert 10 < len(train_tokenizer("wordpiece", tiny, 30_000, 32)) < 40
    assert 257 < len(train_tokenizer("byte_bpe", tiny, 30_000, 32)) < 270


def test_punctuation_and_cjk_characters_have_no_continued_form():
    corpus = Dataset.from_dict({"text": ["猫, café"] * 3})
    vocabulary = train_tokenizer("wordpiece", corpus, 40, 32).get_vocab()
    assert {"猫", ",", "##e"} <= vocabulary.keys()
    assert not {"##猫", "##,"} & vocabulary.keys()


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe"])
def test_what_cannot_be_trained_is_refused(kind, corpus):
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(kind, Dataset.from_dict({"text": ["", None]}), 300, 32)
    with pytest.raises(ValueError, match=r"vocab_size is 20, but .* alone need \d+"):
        train_tokenizer(kind, corpus, 20, 32)


def test_unknown_kinds_are_refused(corpus, bert):
    with pytest.raises(ValueError, match="'wordpiece' or 'byte_bpe', not 'unigram'"):
        train_tokenizer("unigram", corpus, 300, 32)
    with pytest.raises(ValueError, match="'mlm' or 'clm', not 'seq2seq'"):
        check_tokenizer(bert, "seq2seq")


@pytest.mark.parametrize("config", [None, {"model_type": "shared_bert"}, {"model_type": "bert"}])
def test_a_folder_without_tokenizer_is_named(config, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"no tokenizer could be loaded from '{tmp_path}'"):
        load_tokenizer(tmp_path)


def test_check_names_the_missing_token(bert, gpt):
    check_tokenizer(bert, "mlm")
    check_tokenizer(gpt, "clm")
    with pytest.raises(ValueError, match="GPT2Tokenizer has no cls_token and no sep_token and no mask_token"):
        check_tokenizer(gpt, "mlm")
    with pytest.raises(ValueError, match="BertTokenizer has no eos_token, which clm needs"):
        check_tokenizer(bert, "clm")


def test_a_loaded_tokenizer_can_pad(gpt, tmp_path):
    GPT2Tokenizer(vocab=gpt.get_vocab(), merges=[]).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|endoftext|>"


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe"])
def test_a_word_without_end_is_trained_on_in_parts(kind):
    """Training takes the square of a word's length: as one word, this text would take hours."""
    text = "".join(random.Random(0).choices("abcdefgh", k=300_000))
    tokenizer = train_tokenizer(kind, Dataset.from_dict({"text": [text]}), vocab_size=400, model_max_length=64)
    assert len(tokenizer) == 400
