"""Text, tokenizers and weights as nobody would want them: a clear error, or a model that trains."""

import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer

from shared_bert.conversion.families import STOCK_CLASSES
from shared_bert.data import (
    Blocks,
    CausalLanguageModelingCollator,
    MaskedLanguageModelingCollator,
    StreamedBlocks,
    check_tokenizer,
    load_documents,
    load_tokenizer,
    pack,
    train_tokenizer,
)
from shared_bert.folders import load_model
from shared_bert.modeling.losses import predicted_positions

from ..conftest import LANGUAGE_MODELS, tiny_model

PLAIN = "the quick brown fox jumps over the lazy dog near the old river bank"
ODD = {
    "nul": "nul \x00 in \x00\x00 the middle",
    "control": "bell \x07 escape \x1b[0m form feed \x0c unit \x1f delete \x7f",
    "empty": "",
    "spaces": " \t \u00a0\u3000 ",
    "right to left": "שלום עולם \u202eمرحبا بالعالم\u202c",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 \ufe0f\u200d",
    "combining": "Z\u0351\u036b\u0343\u036a\u0342a\u030a\u0301l\u0328\u0357go " + "e" + "\u0301" * 500,
    "not characters": "\ufffe \uffff \U0010ffff \ufeff",
    "special tokens": "[CLS] [SEP] [MASK] [PAD] <|endoftext|> ##ing",
    "numbers": "1e999 " + "9" * 5000,
}
KINDS = {"bert": "wordpiece", "gpt": "byte_bpe"}


def write(folder, suffix, texts):
    path = folder / f"odd [1]{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif suffix == ".jsonl":
        path.write_text("\n\n" + "\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    else:
        path.write_text("\n".join(texts), encoding="utf-8")
    return path


def train_a_step(kind, documents, tokenizer):
    blocks = pack(documents, tokenizer, 16)
    rows = Blocks(blocks) if isinstance(blocks, Dataset) else list(StreamedBlocks(blocks))
    collator = MaskedLanguageModelingCollator(tokenizer) if kind == "bert" else CausalLanguageModelingCollator()
    model = tiny_model(kind, vocab_size=512).train()
    batch = collator([rows[i] for i in range(min(len(rows), 64))])
    loss = model(**batch).loss
    loss.backward()
    assert math.isfinite(loss)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_odd_text_is_trained_on(tmp_path, kind, suffix, streaming):
    path = write(tmp_path, suffix, [PLAIN] * 20 + list(ODD.values()))
    documents = load_documents(train_file=path, validation_file=path, sample_by="line", streaming=streaming)["train"]
    tokenizer = train_tokenizer(KINDS[kind], documents, 512, model_max_length=16)
    train_a_step(kind, documents, tokenizer)


@pytest.mark.parametrize("name", ODD)
def test_each_alone_with_plain_text(kind, name, tokenizers):
    documents = Dataset.from_dict({"text": [PLAIN, ODD[name], PLAIN]})
    train_a_step(kind, documents, tokenizers[kind])
    tokenizer = train_tokenizer(KINDS[kind], documents, 512, model_max_length=16)
    train_a_step(kind, documents, tokenizer)


def test_a_line_of_two_megabytes(tmp_path, kind, tokenizers):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(200)]
    path = write(tmp_path, ".jsonl", [" ".join(draw.choices(words, k=290_000)), "x" * 100_000, PLAIN])
    documents = load_documents(train_file=path, validation_file=path)["train"]
    assert len(documents[0]["text"]) > 2_000_000
    train_a_step(kind, documents, tokenizers[kind])


def test_lone_surrogates(tmp_path, kind):
    """JSON can spell them, UTF-8 cannot hold them."""
    path = tmp_path / "lone.jsonl"
    path.write_text(json.dumps({"text": PLAIN}) + '\n{"text": "lone \\ud800 surrogate"}\n')
    with pytest.raises(ValueError, match=r"cannot read .*lone\.jsonl: .*surrogate"):
        load_documents(train_file=path, validation_file=path)
    (tmp_path / "lone.txt").write_bytes("lone \ud800 surrogate".encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"lone\.txt cannot be read as text"):
        load_documents(train_file=tmp_path / "lone.txt", validation_file=tmp_path / "lone.txt")
    generated = Dataset.from_dict({"text": [PLAIN]}).to_iterable_dataset().map(lambda row: {"text": PLAIN + " \ud800"})
    tokenizer = train_tokenizer(KINDS[kind], generated, 512, model_max_length=16)
    train_a_step(kind, generated, tokenizer)


@pytest.mark.parametrize("text", ["", " \n\t\n ", "\u3000\n\u00a0"])
def test_a_file_without_words_is_refused(tmp_path, kind, text):
    path = tmp_path / "blank.txt"
    path.write_text(text, encoding="utf-8")

    def read_and_train():
        documents = load_documents(train_file=path, validation_file=path)["train"]
        train_tokenizer(KINDS[kind], documents, 512, model_max_length=16)

    with pytest.raises(ValueError, match=r"blank\.txt is empty" if not text else "no text to train a tokenizer on"):
        read_and_train()


@pytest.mark.parametrize(
    "row",
    ['{"text": {"a": 1}}', '{"text": "a"}\n{"text": 5}', '{"text": ["a", "b"]}', '{"text": 1.5}', '{"text": true}'],
)
def test_a_column_of_something_else_is_named(tmp_path, row):
    path = tmp_path / "other.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ValueError, match=r"other\.jsonl"):
        load_documents(train_file=path, validation_file=path)


def test_json_without_end_is_named(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json cannot be read as json"):
        load_documents(train_file=path)


MISSING = [("bert", "mlm", token) for token in ("cls_token", "sep_token", "mask_token", "pad_token")]


@pytest.mark.parametrize(("kind", "objective", "token"), [*MISSING, ("gpt", "clm", "eos_token")])
def test_a_tokenizer_without_a_special_token(tmp_path, tokenizers, kind, objective, token):
    tokenizers[kind].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    stated = json.loads(path.read_text())
    path.write_text(
        json.dumps({**stated, **dict.fromkeys([token], None), "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert getattr(tokenizer, token) is None
    with pytest.raises(ValueError, match=f"no {token}.*which {objective} needs"):
        check_tokenizer(load_tokenizer(tmp_path), objective)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"model": {"type": "nothing"}}', "\x00" * 100])
def test_a_damaged_tokenizer_is_named(tmp_path, tokenizers, kind, damage):
    tokenizers[kind].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(ValueError, match=f"no tokenizer could be loaded from '{tmp_path}'"):
        load_tokenizer(str(tmp_path))


def flip_header(content):
    return content[:20] + bytes(b ^ 0x55 for b in content[20:60]) + content[60:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"more",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: bytes(len(content)),
        flip_header,
    ],
)
@pytest.mark.parametrize("load", [AutoModel.from_pretrained, lambda folder: load_model(folder, STOCK_CLASSES)])
def test_damaged_weights_are_refused(tmp_path, kind, damage, load):
    tiny_model(kind).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded"):
        load(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path, kind):
    tiny_model(kind).save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[0].unlink()
    for load in (AutoModel.from_pretrained, lambda folder: load_model(folder, STOCK_CLASSES)):
        with pytest.raises((OSError, ValueError), match=str(tmp_path)):
            load(str(tmp_path))


def test_missing_tensors_are_named(tmp_path, kind):
    model = tiny_model(kind)
    state = {name: tensor for name, tensor in model.state_dict().items() if "projection" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ValueError, match=f"{tmp_path} lacks weights of a {LANGUAGE_MODELS[kind].__name__}: .*projection"
    ):
        load_model(str(tmp_path), STOCK_CLASSES)


def test_a_bound_on_predictions_that_does_not_hold():
    labels = torch.full((2, 8), -100)
    labels[:, :3] = 1
    assert len(predicted_positions(labels, 6)) == 6
    with pytest.raises(ValueError, match="num_predictions=5 must be at least the number of labels in a batch, 6"):
        predicted_positions(labels, 5)
