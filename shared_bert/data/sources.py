"""Sources of text: the Hub, local files, or the installed documentation."""

import json
from collections.abc import Sequence
from functools import partial
from glob import escape, glob
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from .python_docs import load_python_docs

PYTHON_DOCS = "python-docs"
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SAMPLE_BY = ("document", "paragraph", "line")

Documents = Dataset | IterableDataset
Files = str | Path | Sequence[str | Path]


def load_documents(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: Files | None = None,
    validation_file: Files | None = None,
    text_column: str = "text",
    sample_by: str = "document",
    streaming: bool = False,
    validation_split: float | None = 0.02,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> dict[str, Documents]:
    """Load the documents of a source: one row each, in the column `text`, by split ("train", "validation").

    Args:
        dataset_name: a data set's name on the Hub, a local folder that `datasets.load_dataset` reads, or
            "python-docs" (which also has a `label`). Give this or `train_file`.
        dataset_config_name: the configuration of the Hub's data set.
        train_file, validation_file: a path, a list of paths, a glob pattern or a folder: .txt, .parquet, or
            .json and .jsonl with one object per line or one list of objects.
        text_column: the column of the source that holds the text.
        sample_by: the documents of a .txt file: "document" (the whole file), "paragraph" or "line".
        streaming: read while iterating, instead of into the cache first.
        validation_split: the share of the train documents that is split off if the source has no validation
            split; None splits off nothing. A hash of the text decides, so the order and number of documents do not
            matter.
        max_train_samples, max_eval_samples: keep this many documents, the first ones.
        seed: of the validation split.

    Raises:
        ValueError: for contradictory arguments, unreadable or mixed files and missing text columns.
        FileNotFoundError: for files that do not exist and data sets that cannot be reached.
    """
    if (dataset_name is None) == (train_file is None):
        raise ValueError("give exactly one of dataset_name and train_file")
    if validation_file is not None and train_file is None:
        raise ValueError("validation_file goes with train_file, not with dataset_name")
    if sample_by not in SAMPLE_BY:
        raise ValueError(f"sample_by must be one of {', '.join(SAMPLE_BY)}, not {sample_by!r}")
    if validation_split is not None and not 0 < validation_split < 1:
        raise ValueError(f"validation_split is a share between 0 and 1, not {validation_split}")

    if dataset_name == PYTHON_DOCS:
        corpus = load_python_docs()
        splits = {"train": corpus.to_iterable_dataset() if streaming else corpus}
    elif dataset_name is not None:
        splits = _load_hub(dataset_name, dataset_config_name, text_column, streaming)
    else:
        files = {"train": train_file, "validation": validation_file}
        splits = {
            split: _load_files(patterns, text_column, sample_by, streaming)
            for split, patterns in files.items()
            if patterns is not None
        }
    if "validation" not in splits and validation_split is not None:
        split_off = _split_stream if streaming else _split
        splits = split_off(splits["train"], validation_split, seed)
    limits = {"train": max_train_samples, "validation": max_eval_samples}
    return {split: first_rows(documents, limits[split]) for split, documents in splits.items()}


def _load_hub(name: str, config: str | None, text_column: str, streaming: bool) -> dict[str, Documents]:
    try:
        splits = load_dataset(name, config, streaming=streaming)
    except (OSError, DatasetGenerationError) as error:
        raise FileNotFoundError(
            f"the data set {name!r} could not be loaded; dataset_name is a name on the Hub (which must be "
            f"reachable), a folder of data files, or {PYTHON_DOCS!r}: {error}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"the data set {name!r} has no split 'train', only {', '.join(splits)}")
    return {
        split: _only_text(splits[split], text_column, f"the data set {name!r}")
        for split in ("train", "validation")
        if split in splits
    }


def _load_files(patterns: Files, text_column: str, sample_by: str, streaming: bool) -> Documents:
    files = _find_files([patterns] if isinstance(patterns, str | Path) else patterns)
    formats = {FORMATS[file.suffix] for file in files}
    if len(formats) > 1:
        raise ValueError(f"files of several formats cannot be mixed: {', '.join(map(str, files))}")
    for file in files:
        _check_file(file, text_column, streaming)
    (kind,) = formats
    options = {"sample_by": sample_by} if kind == "text" else {}
    names = [str(file) for file in files]
    try:
        # load_dataset reads names as patterns.
        dataset = load_dataset(kind, data_files=[*map(escape, names)], split="train", streaming=streaming, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"cannot read {', '.join(names)}: {error.__cause__ or error}") from error
    return _only_text(dataset, "text" if kind == "text" else text_column, ", ".join(names))


def _find_files(patterns: Sequence[str | Path]) -> list[Path]:
    files = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.suffix in FORMATS]
        else:
            found = [path] if path.exists() else [Path(match) for match in glob(str(pattern), recursive=True)]
        if not found:
            raise FileNotFoundError(f"no file found at {str(pattern)!r}")
        files += sorted(found)
    unknown = [str(file) for file in files if file.suffix not in FORMATS]
    if unknown or not files:
        raise ValueError(f"text files end in {', '.join(FORMATS)}; given: {', '.join(unknown) or 'none'}")
    return files


def _check_file(file: Path, text_column: str, streaming: bool) -> None:
    """Raise the loader's error with the file's name, if a file, or the first MiB of a stream, cannot be read."""
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty")
    try:
        if file.suffix == ".parquet":
            columns = pq.read_schema(file).names
        else:
            with file.open(encoding="utf-8", newline="") as lines:
                columns = [text_column] if file.suffix == ".txt" else list(_first_json_object(lines))
                while lines.read(1 << 20) and not streaming:
                    pass
    except (OSError, ValueError, TypeError, LookupError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as {FORMATS[file.suffix]}: {error}") from error
    if text_column not in columns:
        raise ValueError(f"{file} has no column {text_column!r}, only {', '.join(map(str, columns))}")


def _first_json_object(lines) -> dict:
    first_line = next((line for line in lines if line.strip()), "")
    if not first_line.lstrip().startswith("["):
        return json.loads(first_line)
    lines.seek(0)
    return json.load(lines)[0]


def _only_text(dataset: Documents, text_column: str, origin: str) -> Documents:
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know its columns
    if text_column not in columns:
        raise ValueError(f"{origin} has no column {text_column!r}, only {', '.join(columns)}")
    feature = dataset.features[text_column] if dataset.features else Value("string")
    dtype = getattr(feature, "dtype", "several types or a structure")
    if dtype not in ("string", "large_string"):
        raise ValueError(f"the column {text_column!r} of {origin} holds {dtype}, not text")
    dataset = dataset.select_columns(text_column)
    return dataset if text_column == "text" else dataset.rename_column(text_column, "text")


def _hash(text: str | None, seed: int) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    digest = blake2b((text or "").encode("utf-8", "replace"), digest_size=6, salt=seed.to_bytes(8, "big"))
    return int.from_bytes(digest.digest(), "big") / 2**48


def _split(dataset: Dataset, share: float, seed: int) -> dict[str, Dataset]:
    if len(dataset) < 2:
        raise ValueError(
            f"the train split is {len(dataset)} document(s), too few for a validation split: give a "
            "validation_file, or for .txt files sample_by='paragraph' or 'line'"
        )
    hashes = np.array([_hash(text, seed) for text in dataset["text"]])
    held_out = hashes < share
    if held_out.all() or not held_out.any():
        held_out = np.arange(len(hashes)) == hashes.argmin()
    return {"train": dataset.select(np.flatnonzero(~held_out)), "validation": dataset.select(np.flatnonzero(held_out))}


def _split_stream(dataset: IterableDataset, share: float, seed: int) -> dict[str, IterableDataset]:
    def keep(held_out: bool) -> IterableDataset:
        return dataset.filter(partial(_is_in, held_out, share=share, seed=seed), input_columns="text")

    return {"train": keep(False), "validation": keep(True)}


def _is_in(held_out: bool, text: str | None, share: float, seed: int) -> bool:
    return (_hash(text, seed) < share) == held_out


def first_rows(dataset: Documents, limit: int | None) -> Documents:
    """Return no more rows than `limit`, the first ones; None returns all.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is None:
        return dataset
    if limit < 1:
        raise ValueError(f"at least one row must be kept, not {limit}")
    return dataset.take(limit if isinstance(dataset, IterableDataset) else min(limit, len(dataset)))
