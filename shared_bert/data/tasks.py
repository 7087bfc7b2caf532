"""Tasks of text classification and regression: the GLUE tasks as one table, and how their rows become tokens."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from .sources import FORMATS

GLUE_ON_THE_HUB = "nyu-mll/glue"
LABEL = "label"


@dataclass(frozen=True)
class Task:
    """What a task's rows hold.

    Args:
        texts: the columns of one text, or of a pair.
        labels: the names of the classes, in the order of their numbers; None for a task whose label is a number.
        metrics: names in `training.metrics`; the first is the task's score.
        validation: the splits to evaluate on.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)


# Wang et al., arXiv 1804.07461; metrics as Kowsher et al., arXiv 2412.00359, report them, with F1 as GLUE does.
GLUE = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), None, ("pearson", "spearmanr")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}


def glue_task(name: str) -> Task:
    """Return a task of GLUE.

    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    if name not in GLUE:
        (nearest,) = difflib.get_close_matches(name, GLUE, n=1, cutoff=0)
        raise ValueError(f"{name!r} is not a GLUE task; the nearest is {nearest!r}, and all are {', '.join(GLUE)}")
    return GLUE[name]


def load_glue(name: str, folder: str | Path | None = None) -> dict[str, Dataset]:
    """Load the training and validation splits of a GLUE task.

    Args:
        folder: has a folder per task, with a file per split (``sst2/train.parquet``), in the columns of the Hub; None
            loads from the Hub.

    Raises:
        ValueError: an unknown task, a missing column, a split without rows or without labels, an unknown label.
        FileNotFoundError: missing files, or a Hub that cannot be reached.
    """
    task = glue_task(name)
    splits = ("train", *task.validation)
    rows = _from_hub(name) if folder is None else _from_folder(Path(folder, name), splits)
    return {split: check_split(rows[split], task, f"{name}, {split}") for split in splits}


def _from_hub(name: str) -> DatasetDict:
    try:
        return load_dataset(GLUE_ON_THE_HUB, name)
    except (OSError, DatasetGenerationError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"the task {name!r} could not be loaded from {GLUE_ON_THE_HUB!r}; give a folder of local files: {error}"
        ) from error


def _from_folder(folder: Path, splits: tuple[str, ...]) -> dict[str, Dataset]:
    rows = {}
    for split in splits:
        found = [path for suffix in FORMATS if suffix != ".txt" and (path := folder / f"{split}{suffix}").is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has no file {split}.parquet, {split}.jsonl or {split}.json")
        rows[split] = _read(found[0])
    return rows


def _read(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if FORMATS.get(path.suffix, "text") == "text":
        raise ValueError(f"{path} must end in .parquet, .jsonl or .json")
    try:
        return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError) as error:  # a ValueError where there are no rows
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def load_task(
    files: dict[str, str],
    texts: tuple[str, ...],
    label_column: str = LABEL,
    regression: bool = False,
    metrics: tuple[str, ...] = ("accuracy",),
) -> tuple[Task, dict[str, Dataset]]:
    """Return the task of files of texts, or of pairs of texts, with labels, and its rows by split.

    Args:
        files: of "train" and "validation".
        texts: the columns of the text or of the pair.
        label_column: numbers to predict with `regression`; else classes, as numbers or names. The labels of the
            training file are the classes.

    Raises:
        ValueError: a file that cannot be read, a missing column, no rows, or labels that are not in the training file.
        FileNotFoundError: a missing file.
    """
    rows = {split: _read(Path(path)) for split, path in files.items()}
    for split, of_split in rows.items():
        for column in (*texts, label_column):
            if column not in of_split.column_names:
                names = ", ".join(of_split.column_names)
                raise ValueError(f"{files[split]}: there is no column {column!r}, only {names}")
        of_split = of_split.select_columns([*texts, label_column])
        rows[split] = of_split if label_column == LABEL else of_split.rename_column(label_column, LABEL)
    if regression:
        task = Task(texts, None, metrics)
    else:
        feature = rows["train"].features[LABEL]
        known = list(feature.names) if isinstance(feature, ClassLabel) else sorted(set(rows["train"][LABEL]), key=str)
        task = Task(texts, tuple(map(str, known)), metrics)
        if not isinstance(feature, ClassLabel):
            rows = {split: _numbered(of_split, known, files[split]) for split, of_split in rows.items()}
    return task, {split: check_split(of_split, task, files[split]) for split, of_split in rows.items()}


def _numbered(rows: Dataset, labels: list, origin: str) -> Dataset:
    """Replace labels by their place in `labels`."""
    numbers = {label: number for number, label in enumerate(labels)}
    if unknown := set(rows[LABEL]) - numbers.keys():
        raise ValueError(f"{origin}: the labels {', '.join(map(str, unknown))} are not in the training file")
    found = [numbers[label] for label in rows[LABEL]]
    return rows.remove_columns(LABEL).add_column(LABEL, found)


def check_split(rows: Dataset, task: Task, origin: str) -> Dataset:
    """Return the rows of a split with the columns of its task only.

    Args:
        origin: names the rows in errors.

    Raises:
        ValueError: a missing column, no rows, or labels that the task does not have.
    """
    columns = (*task.texts, LABEL)
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(f"{origin}: there is no column {column!r}, only {', '.join(rows.column_names)}")
    if len(rows) == 0:
        raise ValueError(f"{origin}: there are no rows")
    rows = rows.select_columns(list(columns))
    if task.labels is None:
        return rows
    feature = rows.features[LABEL]
    if isinstance(feature, ClassLabel) and tuple(feature.names) != task.labels:
        raise ValueError(f"{origin}: the labels are {', '.join(feature.names)}, not {', '.join(task.labels)}")
    unknown = sorted(set(rows.unique(LABEL)) - set(range(len(task.labels))), key=str)
    if unknown == [-1]:
        raise ValueError(f"{origin}: all labels are -1, as in a test split whose labels are not public")
    if unknown:
        names = ", ".join(map(str, unknown))
        raise ValueError(f"{origin}: the labels {names} are not from 0 to {len(task.labels) - 1}")
    return rows


def tokenize_task(
    rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, padding: bool | str = False
) -> Dataset:
    """Tokenize the rows of a split; `datasets` caches the result.

    Args:
        max_length: tokens at most; the longer text of a pair is cut first.
        padding: False leaves it to the collator; "max_length" pads every row to `max_length`.

    Returns:
        Rows with the tokenizer's columns, `labels` (int or float) and `length` in tokens.
    """

    def tokenize(batch: Mapping[str, list]) -> dict[str, list]:
        texts = (batch[column] for column in task.texts)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=padding)
        labels = batch[LABEL] if task.labels else [float(label) for label in batch[LABEL]]
        return {**encoded, "labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}

    return rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc="Tokenizing")
