import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from shared_bert.data import load_documents, sources

from .conftest import sentences

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
TEXTS = sentences(40)


def texts(documents):
    return [row["text"] for row in documents]


def all_texts(splits):
    assert list(splits) == ["train", "validation"]
    return sorted(texts(splits["train"]) + texts(splits["validation"]))


def write(folder, name, rows=TEXTS):
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": rows, "url": rows}), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": row, "n": 1}) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": row} for row in rows]), encoding="utf-8")
    else:
        path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_local_formats(name, streaming, tmp_path):
    path = write(tmp_path, name)
    splits = load_documents(train_file=path, sample_by="line", streaming=streaming, validation_split=0.3)
    assert all_texts(splits) == sorted(TEXTS)
    assert next(iter(splits["train"])).keys() == {"text"}
    assert isinstance(splits["train"], IterableDataset if streaming else Dataset)


def test_lists_globs_folders_and_validation_files(tmp_path):
    first, second = write(tmp_path, "a.txt", TEXTS[:20]), write(tmp_path, "b.txt", TEXTS[20:])
    for train_file in ([first, second], str(tmp_path / "*.txt"), tmp_path):
        splits = load_documents(train_file=train_file, validation_file=str(second), sample_by="line")
        assert texts(splits["train"]) == TEXTS
        assert texts(splits["validation"]) == TEXTS[20:]


def test_sample_by(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree")
    counts = {
        unit: len(load_documents(train_file=path, validation_file=path, sample_by=unit)["train"])
        for unit in ("document", "paragraph", "line")
    }
    assert counts == {"document": 1, "paragraph": 2, "line": 4}


def test_another_text_column_and_first_samples(tmp_path):
    path = write(tmp_path, "a.parquet")
    splits = load_documents(
        train_file=path, validation_file=path, text_column="url", max_train_samples=3, max_eval_samples=99
    )
    assert texts(splits["train"]) == TEXTS[:3]
    assert splits["validation"].column_names == ["text"]
    assert len(splits["validation"]) == len(TEXTS)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_split_depends_on_each_text_alone(streaming, tmp_path):
    def held_out(rows, seed=0):
        path = write(tmp_path, "a.jsonl", rows)
        return set(
            texts(load_documents(train_file=path, validation_split=0.3, streaming=streaming, seed=seed)["validation"])
        )

    once = held_out(TEXTS)
    assert 0 < len(once) < len(TEXTS)
    assert held_out(TEXTS[::-1]) == once
    assert held_out(TEXTS[:20]) == once & set(TEXTS[:20])
    assert held_out(TEXTS, seed=1) != once


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_neither_split_is_empty(share, tmp_path):
    path = write(tmp_path, "a.jsonl", TEXTS[:2])
    splits = load_documents(train_file=path, validation_split=share)
    assert len(splits["train"]) == len(splits["validation"]) == 1


def test_one_document_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="too few for a validation split"):
        load_documents(train_file=write(tmp_path, "a.txt"))


def test_local_folder_as_data_set_name(tmp_path):
    write(tmp_path, "train.jsonl", TEXTS[:30])
    write(tmp_path, "validation.jsonl", TEXTS[30:])
    splits = load_documents(str(tmp_path))
    assert texts(splits["validation"]) == TEXTS[30:]
    assert splits["train"].column_names == ["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of dataset_name and train_file"),
        ({"dataset_name": "x", "train_file": "y"}, "exactly one of dataset_name and train_file"),
        ({"dataset_name": "x", "validation_file": "y"}, "validation_file goes with train_file"),
        ({"train_file": "y", "sample_by": "word"}, "document, paragraph, line, not 'word'"),
        ({"train_file": "y", "validation_split": 0}, "between 0 and 1"),
        ({"train_file": []}, "given: none"),
    ],
)
def test_contradictory_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_documents(**arguments)


def test_missing_files_are_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere/\*.txt"):
        load_documents(train_file="nowhere/*.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"", "bad.txt is empty"),
        ("bad.txt", b"fine\n" * 500_000 + b"\xff\xfe", "bad.txt cannot be read as text: 'utf-8'"),
        ("bad.parquet", b"PAR1 no", "bad.parquet cannot be read as parquet"),
        ("bad.jsonl", b'{"body": "x"}\n', "bad.jsonl has no column 'text', only body"),
        ("bad.jsonl", b"not json\n", "bad.jsonl cannot be read as json"),
        ("bad.jsonl", b'{"text": "x"}\n{"text"\n', "cannot read .*bad.jsonl"),
        ("bad.json", b"[]", "bad.json cannot be read as json"),
        ("bad.csv", b"text\nx\n", ".txt, .jsonl, .json, .parquet; given: .*bad.csv"),
    ],
)
def test_bad_files_are_named(name, content, message, tmp_path):
    good = write(tmp_path, "good" + Path(name).suffix.replace(".csv", ".txt"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(train_file=[good, tmp_path / name])


def test_a_column_that_holds_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl holds int64, not text"):
        load_documents(train_file=path)


def test_mixed_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="several formats"):
        load_documents(train_file=[write(tmp_path, "a.txt"), write(tmp_path, "b.jsonl")])


def test_unreachable_data_set(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(sources, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'some/corpus' could not be loaded.*no route to the Hub"):
        load_documents("some/corpus")


def test_data_sets_without_the_split_or_column(monkeypatch, corpus):
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: DatasetDict(test=corpus))
    with pytest.raises(ValueError, match="no split 'train', only test"):
        load_documents("some/corpus")
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: DatasetDict(train=corpus))
    with pytest.raises(ValueError, match="no column 'body', only text"):
        load_documents("some/corpus", text_column="body")


def test_real_articles():
    path = SHARED / "data/corpus/wiki_validation.parquet"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    assert len(all_texts(load_documents(train_file=path))) == 280
