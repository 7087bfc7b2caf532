"""Fine-tuning on data of one's own: texts and pairs, labels of words, and multiple choice."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, List
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    EvalPrediction,
)

from shared_bert.data.tasks import Task, load_file, task_of_rows, tokenize_task
from shared_bert.evaluation.classification import TaskArguments
from shared_bert.training.metrics import task_metrics

from ..conftest import TINY, tiny_model

ROOT = Path(__file__).parents[2]
WORDS = ("the fox hunts", "the dog barks", "the owl sees", "the cat naps")
ANIMALS = ("fox", "dog", "owl", "cat", "hen", "cow")


@pytest.fixture
def finetune(tokenizers, tmp_path):
    """Return a function that writes files of rows, fine-tunes a model of a kind on them, and returns the record."""
    main = runpy.run_path(str(ROOT / "scripts" / "finetune.py"))["main"]

    def finetune(recipe, rows, *options, model="bert"):
        own = BertForMaskedLM(BertConfig(**TINY | {"vocab_size": 320})) if model == "stock" else None
        (own or tiny_model(model, vocab_size=320)).save_pretrained(tmp_path / "model")
        tokenizers["gpt" if model == "gpt" else "bert"].save_pretrained(tmp_path / "model")
        for name, of_split in rows.items():
            Dataset.from_list(of_split).to_json(tmp_path / f"{name}.jsonl")
        files = [f"--{name}_file={tmp_path / name}.jsonl" for name in rows]
        out = tmp_path / "out"
        command = [str(ROOT / "configs" / "finetune" / f"{recipe}.yaml"), "--model", str(tmp_path / "model"), *files]
        command += ["--use_cpu", "true", "--max_length", "16", "--output_dir", str(out), *options]
        assert main(command) == 0
        return json.loads((out / "records" / "train-0.json").read_text()), out / "train" / "seed-0"

    return finetune


def test_pairs_with_named_labels(finetune):
    def rows(labels):
        return [{"a": WORDS[i % 4], "b": WORDS[0], "answer": label} for i, label in enumerate(labels)]

    data = {"train": rows(["yes", "no", "perhaps"] * 4), "validation": rows(["no", "yes", "no"])}
    columns = ["--text_columns", "a,b", "--label_column", "answer"]
    record, folder = finetune("text", data, *columns, "--num_train_epochs", "1")
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.id2label == {
        0: "no",
        1: "perhaps",
        2: "yes",
    }
    assert (record["metric"], record["rows"]) == ("accuracy", {"train": 12, "validation": 3})
    assert json.loads((folder / "run.json").read_text())["data"]["train_file"].endswith("train.jsonl")


def test_numbers_to_predict(finetune):
    rows = [{"text": WORDS[i % 4], "size": float(i)} for i in range(8)]
    options = ["--label_column", "size", "--regression", "true", "--num_train_epochs", "1"]
    record, _ = finetune("text", {"train": rows, "validation": rows}, *options)
    assert list(record["metrics"]) == ["pearson", "spearmanr"]


@pytest.mark.parametrize("model", ["bert", "gpt", "stock"])
def test_names_are_found_in_sentences(finetune, model):
    def row(i):
        animal, other = ANIMALS[i % 6], ANIMALS[(i + 1) % 6]
        tags = ["O", "B-ANIMAL", "O", "O", "B-ANIMAL", "O"]
        return {"tokens": ["the", animal, "hunts", "the", other, "."], "tags": tags}

    data = {"train": [row(i) for i in range(48)], "validation": [row(i) for i in range(6)]}
    options = ["--label_column", "tags", "--num_train_epochs", "8", "--learning_rate", "1e-2"]
    record, folder = finetune("tokens", data, *options, "--per_device_train_batch_size", "8", model=model)
    assert record["metric"] == "span_f1"
    assert record["metrics"] == dict.fromkeys(("span_f1", "span_precision", "span_recall", "accuracy"), 1.0)
    assert AutoModelForTokenClassification.from_pretrained(folder).config.id2label == {0: "B-ANIMAL", 1: "O"}


@pytest.mark.parametrize("columns", [["--choice_columns", "first,second,third"], ["--choice_columns", "choices"]])
def test_the_choice_that_belongs_to_the_text(finetune, columns):
    def row(i):
        choices = [ANIMALS[(i + shift) % 6] for shift in range(3)]
        parts = dict(zip(("first", "second", "third"), choices, strict=True))
        return {"text": "the", "choices": choices, **parts, "label": "abc"[choices.index(min(choices))]}

    data = {"train": [row(i) for i in range(48)], "validation": [row(i) for i in range(6)]}
    options = ["--text_columns", "text", "--num_train_epochs", "12", "--learning_rate", "1e-2", *columns]
    record, folder = finetune("choice", data, *options)
    assert record["metrics"] == {"accuracy": 1.0}
    AutoModelForMultipleChoice.from_pretrained(folder)


def test_a_decoder_has_no_head_for_choices(finetune, capsys):
    rows = [{"text": "the", "choices": ["fox", "owl"], "label": i % 2} for i in range(4)]
    with pytest.raises(AssertionError):
        finetune(
            "choice",
            {"train": rows, "validation": rows},
            *("--text_columns", "text", "--choice_columns", "choices"),
            model="gpt",
        )
    assert "is a shared_gpt, which has no head ForMultipleChoice" in capsys.readouterr().err


def test_the_first_token_of_a_word_has_its_label(tokenizers):
    words = ["the", "foxhunts", "owl"]
    task = Task(("tokens",), ("a", "b", "c"), ("accuracy",), kind="tokens")
    (row,) = tokenize_task(Dataset.from_list([{"tokens": words, "label": [0, 1, 2]}]), task, tokenizers["bert"], 16)
    pieces = [tokenizers["bert"].tokenize(word) for word in words]
    assert len(pieces[1]) > 1
    assert row["labels"] == [-100, 0, 1, *[-100] * (len(pieces[1]) - 1), 2, *[-100] * (len(pieces[2]) - 1), -100]
    assert row["input_ids"] == tokenizers["bert"](" ".join(words))["input_ids"]


def test_words_of_a_byte_level_tokenizer_have_their_space(tokenizers):
    words = ["the", "fox", "hunts"]
    task = Task(("tokens",), ("a", "b"), ("accuracy",), kind="tokens")
    (row,) = tokenize_task(Dataset.from_list([{"tokens": words, "label": [0, 1, 0]}]), task, tokenizers["gpt"], 16)
    assert row["input_ids"] == tokenizers["gpt"](" the fox hunts")["input_ids"]


def test_choices_are_pairs(tokenizers):
    task = Task(("before", "start"), ("0", "1"), ("accuracy",), kind="choice", choices=("first", "second"))
    rows = [{"before": "the fox", "start": "the", "first": "owl", "second": "hen lays", "label": 1}]
    (row,) = tokenize_task(Dataset.from_list(rows), task, tokenizers["bert"], 16)
    expected = tokenizers["bert"](["the fox", "the fox"], ["the owl", "the hen lays"])
    assert {name: row[name] for name in expected} == dict(expected)
    assert (row["labels"], row["length"]) == (1, max(map(len, expected["input_ids"])))


def test_tokens_are_cached(tokenizers, tmp_path, monkeypatch):
    task = Task(("text",), ("0", "1"), ("accuracy",))
    Dataset.from_dict({"text": list(WORDS), "label": [0, 1, 0, 1]}).to_parquet(tmp_path / "rows.parquet")

    def tokenize(max_length):
        return tokenize_task(load_file(tmp_path / "rows.parquet"), task, tokenizers["bert"], max_length)

    first = tokenize(16)
    tokenizers["bert"]("other text", padding="max_length", truncation=True, max_length=7)  # leaves its settings behind
    again, other = tokenize(16), tokenize(3)
    assert again.cache_files == first.cache_files
    assert other.cache_files != first.cache_files
    assert set(other["length"]) == {3}


def test_spans_by_hand():
    task = Task(("tokens",), ("O", "B-X", "I-X"), ("span_f1", "span_precision", "accuracy"), kind="tokens")
    labels = np.array([[-100, 1, 2, 0, 1, -100], [-100, 0, 1, 0, -100, -100]])
    # In the first row one of two spans is found, in the second a span that is not there, beside one that is.
    predictions = np.array([[0, 1, 2, 0, 0, 2], [1, 1, 1, 0, 1, 1]])
    logits = np.eye(3)[predictions]
    precision, recall = 2 / 3, 2 / 3
    assert task_metrics(task)(EvalPrediction(logits, labels)) == {
        "span_f1": pytest.approx(2 * precision * recall / (precision + recall)),
        "span_precision": pytest.approx(precision),
        "accuracy": 5 / 7,
    }


def test_labels_keep_their_names():
    names = ["O", "B-X"]
    rows = Dataset.from_dict({"words": [["a", "b"]], "tags": [[0, 1]]}).cast_column(
        "tags", List(ClassLabel(names=names))
    )
    task, splits = task_of_rows({"train": rows, "validation": rows}, ("words",), "tags", kind="tokens")
    assert task.labels == ("O", "B-X")
    assert task.metrics[0] == "span_f1"
    assert splits["validation"][0] == {"words": ["a", "b"], "label": [0, 1]}


def test_rows_are_checked():
    def of(labels, **columns):
        return Dataset.from_dict({"text": [WORDS[0]] * len(labels), "label": labels, **columns})

    with pytest.raises(ValueError, match="validation: the labels c are not in the training rows"):
        task_of_rows({"train": of(["a", "b"]), "validation": of(["a", "c"])}, ("text",))
    with pytest.raises(ValueError, match="train: there is no column 'texts', only text, label"):
        task_of_rows({"train": of(["a"]), "validation": of(["a"])}, ("texts",))
    task, splits = task_of_rows({"train": of(["a", "b"]), "validation": of(["b", "b"])}, ("text",))
    assert (task.labels, splits["validation"]["label"][:]) == (("a", "b"), [1, 1])
    words = of([[0, 1], [0]], tokens=[["a", "b"], ["a", "b"]])
    with pytest.raises(ValueError, match="train, row 1: there are 2 words, but 1 labels"):
        task_of_rows({"train": words, "validation": words}, ("tokens",), kind="tokens")
    choices = of([0, 1], choices=[["a", "b"], ["a", "b", "c"]])
    with pytest.raises(ValueError, match="train, row 1: there are 3 choices, but 2 different labels"):
        task_of_rows({"train": choices, "validation": choices}, ("text",), kind="choice", choices=("choices",))
    for labels, message in (([-1, -1], "all labels are -1"), ([0, None], "a label is missing")):
        with pytest.raises(ValueError, match=message):
            task_of_rows({"train": of(labels), "validation": of(labels)}, ("text",))
    with pytest.raises(ValueError, match="the columns text and label must hold a list in each row"):
        task_of_rows({"train": of([0, 1]), "validation": of([0, 1])}, ("text",), kind="tokens")
    with pytest.raises(ValueError, match="a column is named twice: label, label"):
        task_of_rows({"train": of([0, 1]), "validation": of([0, 1])}, ("label",))


def test_labels_are_in_order_of_their_numbers():
    rows = Dataset.from_dict({"text": ["a"] * 12, "label": [str(i) for i in range(12)]})
    task, splits = task_of_rows({"train": rows, "validation": rows}, ("text",))
    assert task.labels == tuple(map(str, range(12)))
    assert splits["train"]["label"][:] == list(range(12))


def test_files_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.json does not exist"):
        load_file(tmp_path / "missing.json")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl is empty"):
        load_file(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either train_file and validation_file, or dataset_name"),
        ({"train_file": "a.json"}, "give either"),
        ({"dataset_name": "a", "train_file": "a.json"}, "give either"),
        ({"dataset_name": "a", "text_columns": "a,b,c"}, "text_columns='a,b,c': text takes 2 at most"),
        ({"dataset_name": "a", "text_columns": "a,b", "kind": "tokens"}, "tokens takes 1 at most"),
        ({"dataset_name": "a", "kind": "choice"}, "choice_columns=None is for kind=choice, which needs it"),
        ({"dataset_name": "a", "metrics": "acuracy"}, "'acuracy' is not a metric; the nearest is 'accuracy'"),
        ({"dataset_name": "a", "kind": "tokens", "regression": True}, "regression=true is for kind=text"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TaskArguments(model="any", **options)
