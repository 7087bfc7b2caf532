"""Fine-tuning on question answering: from rows to records, with and without answers, in two stages."""

import json
import runpy
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForMaskedLM

from ..conftest import TEXT, TINY, tiny_model

ROOT = Path(__file__).parents[2]
ANIMALS = ("fox", "dog", "owl", "cat", "hen", "cow")
CONTEXT = " ".join(sentence.strip() + " ." for sentence in TEXT.split(".") if sentence.strip())


def rows(number, every_answered=True):
    """Who hunts, barks, sees … in the text: what a word says about itself is answered by the word before it."""
    found = []
    for i in range(number):
        animal = ANIMALS[i % len(ANIMALS)]
        answered = every_answered or i % 3
        start = CONTEXT.index(animal)
        answers = {"text": [animal] if answered else [], "answer_start": [start] if answered else []}
        found.append({"id": str(i), "question": f"the {animal} ?", "context": CONTEXT, "answers": answers})
    return found


@pytest.fixture
def main():
    return runpy.run_path(str(ROOT / "scripts" / "finetune.py"))["main"]


@pytest.fixture
def places(tokenizers, tmp_path):
    """A saved model and files of questions."""

    def places(kind="bert", every_answered=True):
        model = (
            BertForMaskedLM(BertConfig(**TINY | {"vocab_size": 320}))
            if kind == "stock"
            else tiny_model(kind, vocab_size=320)
        )
        model.save_pretrained(tmp_path / "model")
        tokenizers["gpt" if kind == "gpt" else "bert"].save_pretrained(tmp_path / "model")
        for name, number in (("train", 24), ("validation", 8)):
            Dataset.from_list(rows(number, every_answered)).to_parquet(tmp_path / f"{name}.parquet")
        files = [
            "--train_file",
            str(tmp_path / "train.parquet"),
            "--validation_file",
            str(tmp_path / "validation.parquet"),
        ]
        options = ["--max_length", "40", "--stride", "8", "--num_train_epochs", "3", "--use_cpu", "true"]
        return [str(ROOT / "configs/finetune/squad.yaml"), "--model", str(tmp_path / "model"), *files, *options]

    return places


@pytest.mark.parametrize("kind", ["bert", "stock"])
def test_runs_and_resumes(main, places, tmp_path, kind):
    command = [*places(kind), "--output_dir", str(tmp_path / "out"), "--learning_rate", "1e-2"]
    assert main([*command, "--seeds", "0,1"]) == 0
    record = json.loads((tmp_path / "out" / "records" / "squad-0.json").read_text())
    assert 0 <= record["exact_match"] <= record["f1"] <= 100
    assert record["threshold"] is None
    assert record["train"]["questions"] == 24
    predictions = json.loads((tmp_path / "out" / "seed-0" / "predictions.json").read_text())
    assert set(predictions) == {str(i) for i in range(8)}
    assert all(predictions.values())
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out" / "seed-0")
    table = (tmp_path / "out" / "squad.md").read_text()
    assert "±" in table
    time = (tmp_path / "out" / "records" / "squad-0.json").stat().st_mtime_ns
    assert main([*command, "--seeds", "0,1"]) == 0
    assert (tmp_path / "out" / "records" / "squad-0.json").stat().st_mtime_ns == time


def test_it_learns_where_the_answer_is(main, places, tmp_path):
    command = places()
    for name in ("train", "validation"):  # always the same answer, at the same place
        same = [row for row in rows(60) if row["answers"]["text"] == ["owl"]]
        Dataset.from_list(same).to_parquet(tmp_path / f"{name}.parquet")
    options = ["--num_train_epochs", "20", "--learning_rate", "1e-2", "--per_device_train_batch_size", "8"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), *options]) == 0
    assert json.loads((tmp_path / "out" / "records" / "squad-0.json").read_text())["exact_match"] == 100


def test_predictions_are_of_their_own_questions(main, places, tmp_path):
    command = places()
    # Contexts of different lengths, with different answers, the first word of each.
    questions = []
    for i, animal in enumerate(ANIMALS * 4):
        context = f"{animal} " + "the " * (1 + 3 * i % 20)
        answers = {"text": [animal], "answer_start": [0]}
        questions.append({"id": str(i), "question": "the ?", "context": context, "answers": answers})
    for name in ("train", "validation"):
        Dataset.from_list(questions).to_parquet(tmp_path / f"{name}.parquet")
    options = ["--num_train_epochs", "10", "--learning_rate", "1e-2", "--per_device_train_batch_size", "8"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), *options]) == 0
    record = json.loads((tmp_path / "out" / "records" / "squad-0.json").read_text())
    assert (record["exact_match"], record["score"]) == (100, 1)


def test_without_answers_and_an_intermediate_set(main, places, tmp_path):
    command = [*places(every_answered=False), "--output_dir", str(tmp_path / "out"), "--without_answers", "true"]
    assert main([*command, "--intermediate_file", str(tmp_path / "train.parquet")]) == 0
    record = json.loads((tmp_path / "out" / "records" / "squad-0.json").read_text())
    assert isinstance(record["threshold"], float)
    assert record["f1"] >= 100 * 3 / 8  # at worst no question is answered, and three have no answer
    first = tmp_path / "out" / "intermediate" / "seed-0" / "config.json"
    time = first.stat().st_mtime_ns
    # As after a kill between training and the record.
    (tmp_path / "out" / "records" / "squad-0.json").unlink()
    assert main([*command, "--intermediate_file", str(tmp_path / "train.parquet")]) == 0
    assert json.loads((tmp_path / "out" / "records" / "squad-0.json").read_text())["f1"] == pytest.approx(record["f1"])
    assert first.stat().st_mtime_ns == time


def test_what_cannot_be_trained_is_refused(main, places, tmp_path, capsys):
    command = [*places(), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--max_train_samples", "0"]) == 2
    assert "max_train_samples=0 must be 1 or more" in capsys.readouterr().err
    assert main([*command, "--max_length", "400"]) == 2
    assert "max_length=400 is more than the model's max_position_embeddings=40" in capsys.readouterr().err
    assert main([*places("gpt"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "GPT2Tokenizer has no [CLS]" in capsys.readouterr().err
