"""Tasks with labels: the GLUE tasks as one table, tasks of other files, and how their rows become tokens."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..modeling.losses import IGNORED
from .sources import FORMATS
from .tokenizers import serialized

TOKENIZING_VERSION = 1  # increase it with every change to the tokens of the same rows
GLUE_ON_THE_HUB = "nyu-mll/glue"
LABEL = "label"


@dataclass(frozen=True)
class Task:
    """What a task's rows hold.

    Args:
        texts: the columns of one text, or of a pair. Of kind "tokens": the column of the lists of words. Of kind
            "choice": the first text is read with each choice; a second one begins each choice.
        labels: the names of the classes, in the order of their numbers; None for a task whose label is a number.
        metrics: names in `training.metrics`; the first is the task's score.
        validation: the splits to evaluate on.
        kind: "text" has a label per row, "tokens" a label per word, and the label of "choice" is the right choice.
        choices: of kind "choice": the columns of the choices, or the one column of their lists.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)
    kind: str = "text"
    choices: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.texts, *self.choices, LABEL)

    def choices_of(self, row: Mapping) -> list[str]:
        return list(row[self.choices[0]]) if len(self.choices) == 1 else [row[column] for column in self.choices]


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
    rows = load_from_hub(GLUE_ON_THE_HUB, name) if folder is None else _from_folder(Path(folder, name), splits)
    return {split: check_split(rows[split], task, f"{name}, {split}") for split in splits}


def load_from_hub(dataset_name: str, config_name: str | None = None) -> DatasetDict:
    """Load all splits of a data set of the Hub.

    Raises:
        FileNotFoundError: it does not exist, or the Hub cannot be reached.
    """
    try:
        return load_dataset(dataset_name, config_name)
    except (OSError, DatasetGenerationError, DatasetNotFoundError) as error:
        of_config = f" ({config_name})" if config_name else ""
        raise FileNotFoundError(
            f"{dataset_name}{of_config} could not be loaded from the Hub; give local files: {error}"
        ) from error


def _from_folder(folder: Path, splits: tuple[str, ...]) -> dict[str, Dataset]:
    rows = {}
    for split in splits:
        found = [path for suffix in FORMATS if suffix != ".txt" and (path := folder / f"{split}{suffix}").is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has no file {split}.parquet, {split}.jsonl or {split}.json")
        rows[split] = load_file(found[0])
    return rows


def load_file(path: str | Path) -> Dataset:
    """Load the rows of a .parquet, .jsonl or .json file.

    Raises:
        ValueError: a file that cannot be read.
        FileNotFoundError: a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if FORMATS.get(path.suffix, "text") == "text":
        raise ValueError(f"{path} must end in .parquet, .jsonl or .json")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        return load_dataset(FORMATS[path.suffix], data_files=escape(str(path)), split="train")
    except (DatasetGenerationError, ValueError) as error:  # a ValueError where there are no rows
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def task_of_rows(
    rows: dict[str, Dataset],
    texts: tuple[str, ...],
    label_column: str = LABEL,
    regression: bool = False,
    metrics: tuple[str, ...] = (),
    kind: str = "text",
    choices: tuple[str, ...] = (),
) -> tuple[Task, dict[str, Dataset]]:
    """Return the task of rows in columns of one's own, and the rows in its columns.

    Args:
        rows: "train" and "validation".
        texts, kind, choices: see `Task`.
        label_column: numbers to predict with `regression`; else classes, as numbers or names, in a list for each row
            if the kind is "tokens". The labels of the training rows are the classes.
        metrics: by default accuracy; for regression Pearson's and Spearman's correlation; for labels of words that
            mark spans (B-PER, I-PER) the spans' F1, precision and recall besides.

    Raises:
        ValueError: a missing column, no rows, or labels that are not in the training rows.
    """
    columns = [*texts, *choices, label_column]
    if len(set(columns)) < len(columns):
        raise ValueError(f"a column is named twice: {', '.join(columns)}")
    for split, of_split in rows.items():
        check_columns(of_split, columns, split)
        of_split = of_split.select_columns(columns)
        rows = {**rows, split: of_split if label_column == LABEL else of_split.rename_column(label_column, LABEL)}
    labels = None
    if not regression:
        feature = _label_feature(rows["train"])
        known = getattr(feature, "names", None) or _in_order(set(_labels(rows["train"])))
        if len(known) < 2:
            raise ValueError(f"train: all labels are {known[0]!r}, as in a split whose labels are not public")
        labels = tuple(map(str, known))
        if not isinstance(feature, ClassLabel):
            rows = {split: _numbered(of_split, known, split) for split, of_split in rows.items()}
    if not metrics:
        metrics = _default_metrics(kind, labels)
    task = Task(texts, labels, metrics, kind=kind, choices=choices)
    return task, {split: check_split(of_split, task, split) for split, of_split in rows.items()}


def _in_order(labels: set) -> list:
    """Return labels by number where all are numbers, such as "2" and "10", else by name."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)
    except TypeError as error:  # None
        raise ValueError("train: a label is missing") from error


def _default_metrics(kind: str, labels: tuple[str, ...] | None) -> tuple[str, ...]:
    if labels is None:
        return ("pearson", "spearmanr")
    if kind == "tokens" and any(label.startswith("B-") for label in labels):
        return ("span_f1", "span_precision", "span_recall", "accuracy")
    return ("accuracy",)


def _label_feature(rows: Dataset):
    feature = rows.features[LABEL]
    return getattr(feature, "feature", feature)  # of a list


def _labels(rows: Dataset) -> Iterator:
    """Yield the label of each row, or of each word."""
    for label in rows[LABEL]:
        yield from label if isinstance(label, list) else (label,)


def _numbered(rows: Dataset, labels: list, origin: str) -> Dataset:
    """Replace labels by their place in `labels`."""
    numbers = {label: number for number, label in enumerate(labels)}
    if unknown := set(_labels(rows)) - numbers.keys():
        names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"{origin}: the labels {names} are not in the training rows")
    found = [[numbers[word] for word in row] if isinstance(row, list) else numbers[row] for row in rows[LABEL]]
    return rows.remove_columns(LABEL).add_column(LABEL, found)


def check_columns(rows: Dataset, columns: Sequence[str], origin: str):
    """Raise a ValueError unless the rows have all columns; `origin` names the rows."""
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(f"{origin}: there is no column {column!r}, only {', '.join(rows.column_names)}")


def check_split(rows: Dataset, task: Task, origin: str) -> Dataset:
    """Return the rows of a split with the columns of its task only.

    Args:
        origin: names the rows in errors.

    Raises:
        ValueError: a missing column, no rows, labels that the task does not have, or other numbers of labels than of
            words, or of choices than of labels.
    """
    check_columns(rows, task.columns, origin)
    if len(rows) == 0:
        raise ValueError(f"{origin}: there are no rows")
    rows = rows.select_columns(list(task.columns))
    if task.labels is None:
        _check_numbers(rows[LABEL], origin)
        return rows
    if task.kind == "tokens" and not all(isinstance(rows[0][column], list) for column in task.columns):
        raise ValueError(f"{origin}: the columns {' and '.join(task.columns)} must hold a list in each row")
    feature = _label_feature(rows)
    if isinstance(feature, ClassLabel) and tuple(feature.names) != task.labels:
        raise ValueError(f"{origin}: the labels are {', '.join(feature.names)}, not {', '.join(task.labels)}")
    unknown = sorted(set(_labels(rows)) - set(range(len(task.labels))), key=str)
    if unknown == [-1]:
        raise ValueError(f"{origin}: all labels are -1, as in a test split whose labels are not public")
    if unknown:
        names = ", ".join(map(str, unknown))
        raise ValueError(f"{origin}: the labels {names} are not from 0 to {len(task.labels) - 1}")
    if task.kind != "text":
        for place, row in enumerate(rows):
            _check_lengths(row, task, f"{origin}, row {place}")
    return rows


def _check_numbers(labels: Sequence[float | None], origin: str):
    if any(label is None or not math.isfinite(label) for label in labels):
        raise ValueError(f"{origin}: a label is missing, NaN or infinite")
    if all(label == -1 for label in labels):
        raise ValueError(f"{origin}: all labels are -1, as in a test split whose labels are not public")


def _check_lengths(row: Mapping, task: Task, origin: str):
    if task.kind == "tokens" and len(row[task.texts[0]]) != len(row[LABEL]):
        raise ValueError(f"{origin}: there are {len(row[task.texts[0]])} words, but {len(row[LABEL])} labels")
    if task.kind == "choice" and (number := len(task.choices_of(row))) != len(task.labels):
        raise ValueError(f"{origin}: there are {number} choices, but {len(task.labels)} different labels")


def tokenize_task(
    rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, padding: bool | str = False
) -> Dataset:
    """Tokenize the rows of a split; `datasets` caches the result.

    Args:
        max_length: tokens at most; the longer text of a pair is cut first.
        padding: False leaves it to the collator; "max_length" pads every row to `max_length`.

    Returns:
        Rows with the tokenizer's columns (of kind "choice": a list for each choice), `labels` (int or float; of kind
        "tokens" one for each token, that of a word at its first token, and -100 elsewhere) and `length` in tokens.
    """

    def encode(*texts, **options):
        return tokenizer(*texts, truncation=True, max_length=max_length, padding=padding, **options)

    def text(batch: Mapping[str, list]) -> dict[str, list]:
        encoded = encode(*(batch[column] for column in task.texts))
        labels = batch[LABEL] if task.labels else [float(label) for label in batch[LABEL]]
        return {**encoded, "labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}

    # To a byte-level tokenizer, a word without the space before it is another word.
    space = " " if tokenizer.tokenize(" a") != tokenizer.tokenize("a") else ""

    def tokens(batch: Mapping[str, list]) -> dict[str, list]:
        words = [[space + word for word in row] for row in batch[task.texts[0]]]
        encoded = encode(words, is_split_into_words=True)
        labels = [_at_first_tokens(encoded.word_ids(row), of_row) for row, of_row in enumerate(batch[LABEL])]
        return {**encoded, "labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}

    def choice(row: Mapping) -> dict:
        first, *start = (row[column] for column in task.texts)
        choices = [" ".join([*start, choice]) for choice in task.choices_of(row)]
        encoded = encode([first] * len(choices), choices)
        return {**encoded, "labels": row[LABEL], "length": max(map(len, encoded["input_ids"]))}

    tokenize = {"text": text, "tokens": tokens, "choice": choice}[task.kind]
    # `datasets` would hash the tokenizer, which changes with every call.
    key = [TOKENIZING_VERSION, rows._fingerprint, serialized(tokenizer), task, max_length, padding]
    return rows.map(
        tokenize,
        batched=task.kind != "choice",
        remove_columns=rows.column_names,
        new_fingerprint=Hasher.hash(key),
        desc="Tokenizing",
    )


def _at_first_tokens(words: list[int | None], labels: list[int]) -> list[int]:
    """Return a label for each token: that of its word at the word's first token, else -100."""
    return [
        labels[word] if word is not None and word != previous else IGNORED
        for previous, word in zip([None, *words], words, strict=False)
    ]
