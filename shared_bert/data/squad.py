"""SQuAD: questions and contexts to windows of tokens, and the official scores of answers.

Rajpurkar et al., arXiv 1606.05250 (v1.1) and arXiv 1806.03822 (v2.0, with questions that have no answer).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .tasks import check_columns, load_file
from .tokenizers import serialized

WINDOWS_VERSION = 1  # increase it with every change to the windows of the same rows
COLUMNS = ("id", "question", "context", "answers")


def load_squad(path: str | Path) -> Dataset:
    """Load a file in SQuAD's columns, as on the Hub: `id`, `question`, `context`, `answers` {text, answer_start}.

    Raises:
        ValueError: a file that cannot be read, without rows, or without a column; a row that lacks a value.
        FileNotFoundError: a missing file.
    """
    rows = load_file(path)
    check_columns(rows, COLUMNS, str(path))
    rows = rows.select_columns(list(COLUMNS))
    if set(getattr(rows.features["answers"], "keys", tuple)()) < {"text", "answer_start"}:
        raise ValueError(f"{path}: the column 'answers' must hold text and answer_start, a list each")
    for i, row in enumerate(rows):
        if None in (*row.values(), *row["answers"].values()):
            raise ValueError(f"{path}, row {i}: a value is missing")
    return rows


@dataclass
class WindowReport:
    """What became of the answers when contexts were cut into windows.

    Attributes:
        questions, windows: their numbers.
        misplaced: ids of questions whose answer does not stand at its place in the context; they are left out.
        uncovered: ids of questions whose answer is longer than any window shows at once; they are left out.
        shortened: ids of questions that took more than half a window, or left no room for the stride; they were cut.
    """

    questions: int
    windows: int
    misplaced: list[str]
    uncovered: list[str]
    shortened: list[str]


def training_windows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 384, stride: int = 128
) -> tuple[Dataset, WindowReport]:
    """Return the windows to train on: `input_ids` and the like, `start_positions` and `end_positions`.

    The first answer counts. A window without the whole answer has both positions at the first token, [CLS].

    Args:
        max_length: tokens of a window, question included.
        stride: tokens that neighbouring windows of a context share.

    Raises:
        ValueError: a tokenizer that is not fast, a stride that leaves no room in a window, or no answer to train on.
    """
    misplaced = {i for i, row in enumerate(rows) if _is_misplaced(row)}
    kept = rows.select([i for i in range(len(rows)) if i not in misplaced])
    answered = {row["id"] for row in kept if row["answers"]["text"]}
    windows = _windows(kept, tokenizer, max_length, stride, _answer_positions) if len(kept) else kept
    if len(kept):
        covered = {name for name, end in zip(windows["id"], windows["end_positions"], strict=True) if end}
        windows = windows.select(
            [i for i, name in enumerate(windows["id"]) if name in covered or name not in answered]
        )
    if len(windows) == 0:
        raise ValueError(f"none of {len(rows)} questions has its answer in its context")
    report = WindowReport(
        questions=len(rows),
        windows=len(windows),
        misplaced=[rows[i]["id"] for i in sorted(misplaced)],
        uncovered=sorted(answered - covered),
        shortened=_shortened(windows),
    )
    return windows.remove_columns(["id", "is_shortened"]), report


def evaluation_windows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 384, stride: int = 128
) -> tuple[Dataset, WindowReport]:
    """Return the windows to predict on: `input_ids` and the like, the question's `id`, and `offsets`.

    `offsets` has the place of each token in the context, [start, end], or None where it is not of the context.

    Args, raises: as of `training_windows`.
    """
    windows = _windows(rows, tokenizer, max_length, stride, _context_offsets)
    report = WindowReport(len(rows), len(windows), misplaced=[], uncovered=[], shortened=_shortened(windows))
    return windows.remove_columns("is_shortened"), report


def _is_misplaced(row: dict[str, Any]) -> bool:
    texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
    return bool(texts) and row["context"][starts[0] : starts[0] + len(texts[0])] != texts[0]


def _shortened(windows: Dataset) -> list[str]:
    pairs = zip(windows["id"], windows["is_shortened"], strict=True)
    return list(dict.fromkeys(name for name, is_shortened in pairs if is_shortened))


def _windows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    more: Callable[[BatchEncoding, int, dict[str, list]], dict[str, Any]],
) -> Dataset:
    """Return windows with the tokenizer's columns, `id`, `is_shortened`, and the columns of `more`; they are cached.

    A question is cut to half a window, or to what leaves room for the stride.
    """
    most = min(max_length // 2, max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride - 1)
    if most < 1:
        raise ValueError(f"stride={stride} leaves no room for a question in max_length={max_length}: lower the stride")

    def cut(batch: dict[str, list]) -> dict[str, list]:
        questions = [question.strip() for question in batch["question"]]
        alone = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        is_shortened = [len(offsets) > most for offsets in alone]
        for i, offsets in enumerate(alone):
            if is_shortened[i]:
                questions[i] = questions[i][: offsets[most - 1][1]]
        windows = tokenizer(
            questions,
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        row_of = windows["overflow_to_sample_mapping"]
        columns = [more(windows, i, batch["answers"][row]) for i, row in enumerate(row_of)]
        return {
            **{name: windows[name] for name in tokenizer.model_input_names if name in windows},
            "id": [batch["id"][row] for row in row_of],
            "is_shortened": [is_shortened[row] for row in row_of],
            **{name: [of_window[name] for of_window in columns] for name in (columns[0] if columns else ())},
        }

    key = [WINDOWS_VERSION, rows._fingerprint, serialized(tokenizer), max_length, stride, more.__name__]
    return rows.map(
        cut, batched=True, remove_columns=rows.column_names, new_fingerprint=Hasher.hash(key), desc="Cutting windows"
    )


def _answer_positions(windows: BatchEncoding, i: int, answers: dict[str, list]) -> dict[str, int]:
    start, end = 0, 0
    if answers["text"]:
        # White space at the edges is in no token.
        text = answers["text"][0]
        first = answers["answer_start"][0] + len(text) - len(text.lstrip())
        start, end = _token_span(windows, i, first, first + len(text.strip()))
    return {"start_positions": start, "end_positions": end}


def _context_offsets(windows: BatchEncoding, i: int, answers: dict[str, list]) -> dict[str, list]:
    pairs = zip(windows["offset_mapping"][i], windows.sequence_ids(i), strict=True)
    return {"offsets": [offset if kind == 1 else None for offset, kind in pairs]}


def _token_span(windows: BatchEncoding, i: int, start: int, end: int) -> tuple[int, int]:
    """Return the first and last token of an answer in window i, or (0, 0) if it is not wholly inside."""
    places = [
        (token, offset)
        for token, (offset, kind) in enumerate(zip(windows["offset_mapping"][i], windows.sequence_ids(i), strict=True))
        if kind == 1
    ]
    inside = [token for token, (a, b) in places if a < end and b > start]
    if not inside or places[0][1][0] > start or places[-1][1][1] < end:
        return 0, 0
    return inside[0], inside[-1]


@dataclass
class Answer:
    """The best answer to a question: its text, its score, and the score of having none."""

    text: str
    score: float
    no_answer_score: float
    n_best: list[tuple[str, float]] = field(default_factory=list)


def best_answers(
    windows: Iterable[dict[str, Any]],
    start_logits: Sequence[Sequence[float]],
    end_logits: Sequence[Sequence[float]],
    contexts: dict[str, str],
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> dict[str, Answer]:
    """Return the best answer to each question over all its windows.

    The score of a span is the sum of its start and end logits; that of no answer is the sum at [CLS], the smallest
    over the windows.

    Args:
        windows: of `evaluation_windows`.
        start_logits, end_logits: [windows][tokens].
        contexts: by the question's id.
    """
    candidates: dict[str, list[tuple[float, str]]] = {}
    without: dict[str, float] = {}
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        name, offsets = window["id"], window["offsets"]
        none = float(starts[0] + ends[0])
        without[name] = min(without.get(name, none), none)
        found = candidates.setdefault(name, [])
        places = [i for i, offset in enumerate(offsets) if offset is not None]
        best_starts = sorted(places, key=lambda i: -starts[i])[:n_best]
        best_ends = sorted(places, key=lambda i: -ends[i])[:n_best]
        for start in best_starts:
            for end in best_ends:
                if start <= end < start + max_answer_tokens:
                    text = contexts[name][offsets[start][0] : offsets[end][1]]
                    found.append((float(starts[start] + ends[end]), text))
    answers = {}
    for name, found in candidates.items():
        ranked = sorted(found, key=lambda candidate: -candidate[0])[:n_best] or [(-float("inf"), "")]
        n_best_of = [(text, score) for score, text in ranked]
        answers[name] = Answer(ranked[0][1], ranked[0][0], without[name], n_best_of)
    return answers


def normalize_answer(text: str) -> str:
    """Return an answer as the official scorer compares it: lower case, no punctuation, articles or extra spaces."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """Return the F1 of the words of two answers; where one is empty, whether both are."""
    found, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))


def squad_scores(
    predictions: dict[str, str], rows: Iterable[dict[str, Any]], without_answers: bool = True
) -> dict[str, float]:
    """Return "exact_match" and "f1" in percent, each the best over the answers of a question (one without: "").

    Args:
        without_answers: by the rules of v2.0, where an answer of punctuation or articles alone counts as none. By
            those of v1.1 it stays, and its F1 is 0.

    Raises:
        ValueError: a question without a prediction.
    """
    matches, f1s = [], []
    for row in rows:
        if row["id"] not in predictions:
            raise ValueError(f"there is no prediction for the question {row['id']!r}")
        prediction, answers = predictions[row["id"]], row["answers"]["text"]
        if without_answers:
            answers = [text for text in answers if normalize_answer(text)]
        answers = answers or [""]
        matches.append(max(exact_match(prediction, answer) for answer in answers))
        counts = without_answers or normalize_answer(prediction)
        f1s.append(max(f1(prediction, answer) if counts else 0.0 for answer in answers))
    return {"exact_match": 100 * sum(matches) / len(matches), "f1": 100 * sum(f1s) / len(f1s)}


def best_threshold(answers: dict[str, Answer], rows: Sequence[dict[str, Any]]) -> float:
    """Return the threshold on `no_answer_score - score` with the best F1 on `rows`.

    A question whose margin is above the threshold has no answer.
    """
    gains = []
    for row in rows:
        answer = answers[row["id"]]
        with_answer = squad_scores({row["id"]: answer.text}, [row])["f1"]
        without = squad_scores({row["id"]: ""}, [row])["f1"]
        gains.append((_margin(answer), with_answer - without))
    gains.sort()
    best, threshold, total = 0.0, gains[0][0] - 1.0, 0.0  # no question is answered
    for i, (margin, gain) in enumerate(gains):
        total += gain
        is_last_of_equals = i + 1 == len(gains) or gains[i + 1][0] > margin
        if total > best and is_last_of_equals:
            best, threshold = total, margin
    return threshold


def _margin(answer: Answer) -> float:
    return answer.no_answer_score - answer.score


def with_threshold(answers: dict[str, Answer], threshold: float) -> dict[str, str]:
    """Return the predictions where a question whose margin is above `threshold` has no answer, ""."""
    return {name: "" if _margin(answer) > threshold else answer.text for name, answer in answers.items()}
