"""SQuAD: windows keep every answer, and scores follow the official scorer's rules."""

import random

import pytest
from datasets import Dataset

from shared_bert.data import squad

from ..conftest import TEXT

CONTEXT = " ".join([TEXT] * 3)


def row(question, answer=None, occurrence=0, name="q"):
    if answer is None:
        return {"id": name, "question": question, "context": CONTEXT, "answers": {"text": [], "answer_start": []}}
    start = -1
    for _ in range(occurrence + 1):
        start = CONTEXT.index(answer, start + 1)
    return {
        "id": name,
        "question": question,
        "context": CONTEXT,
        "answers": {"text": [answer], "answer_start": [start]},
    }


@pytest.mark.parametrize("occurrence", [0, 1, 2])
@pytest.mark.parametrize("answer", ["owl sees", "the", "cow stands ."])
def test_a_span_of_tokens_is_the_answer(tokenizers, answer, occurrence):
    question = row("the fox ?", answer, occurrence)
    tokenizer = tokenizers["bert"]
    windows, report = squad.training_windows(Dataset.from_list([question]), tokenizer, max_length=24, stride=8)
    assert report.windows == len(windows) > 3
    found = [w for w in windows if (w["start_positions"], w["end_positions"]) != (0, 0)]
    assert found
    for window in found:
        span = window["input_ids"][window["start_positions"] : window["end_positions"] + 1]
        assert tokenizer.decode(span).replace(" ", "") == answer.replace(" ", "")
    assert all(len(window["input_ids"]) <= 24 for window in windows)
    # Every place of the context is in a window, and the answer at its own place.
    pieces, _ = squad.evaluation_windows(Dataset.from_list([question]), tokenizer, max_length=24, stride=8)
    assert len(pieces) == len(windows)
    covered = {place for window in pieces for offset in window["offsets"] if offset for place in range(*offset)}
    assert covered >= {i for i, character in enumerate(CONTEXT) if character != " "}
    start = question["answers"]["answer_start"][0]
    for window, piece in zip(windows, pieces, strict=True):
        if window["end_positions"]:
            assert piece["offsets"][window["start_positions"]][0] == start
            assert piece["offsets"][window["end_positions"]][1] == start + len(answer)


def test_answers_that_are_lost_are_counted(tokenizers):
    wrong = row("what ?", "owl", name="wrong")
    wrong["answers"]["answer_start"] = [1]
    rows = Dataset.from_list([wrong, row("the fox " * 20, "owl", name="long"), row("the fox ?", name="none")])
    windows, report = squad.training_windows(rows, tokenizers["bert"], max_length=24, stride=4)
    assert (report.questions, report.misplaced, report.shortened) == (3, ["wrong"], ["long"])
    assert all(len(window["input_ids"]) <= 24 for window in windows)
    none, _ = squad.training_windows(rows.select([2]), tokenizers["bert"], max_length=24, stride=4)
    assert {(window["start_positions"], window["end_positions"]) for window in none} == {(0, 0)}


def test_answers_that_no_window_shows_are_counted(tokenizers):
    whole = {"id": "whole", "question": "the fox ?", "context": CONTEXT}
    whole["answers"] = {"text": [CONTEXT], "answer_start": [0]}
    rows = Dataset.from_list([whole, row("the fox ?", "owl", name="short"), row("the fox ?", name="none")])
    windows, report = squad.training_windows(rows, tokenizers["bert"], max_length=24, stride=4)
    assert report.uncovered == ["whole"]
    kept, _ = squad.training_windows(rows.select([1, 2]), tokenizers["bert"], max_length=24, stride=4)
    assert windows[:] == kept[:]
    with pytest.raises(ValueError, match="none of 1 questions has its answer in its context"):
        squad.training_windows(rows.select([0]), tokenizers["bert"], max_length=24, stride=4)


@pytest.mark.parametrize(("text", "start"), [("owl ", 6), (" owl", 5), ("owl\n", 6)])
def test_space_around_an_answer_is_no_part_of_it(tokenizers, text, start):
    context = f"it is {text.strip()}" + text[len(text.rstrip()) :]
    question = {"id": "a", "question": "what ?", "context": context}
    question["answers"] = {"text": [text], "answer_start": [start]}
    windows, report = squad.training_windows(Dataset.from_list([question]), tokenizers["bert"], 24, 4)
    assert (report.misplaced, report.uncovered) == ([], [])
    (window,) = windows
    span = window["input_ids"][window["start_positions"] : window["end_positions"] + 1]
    assert tokenizers["bert"].decode(span) == "owl"


@pytest.mark.parametrize("stride", [10, 12, 18])
def test_a_long_question_leaves_room_for_the_stride(tokenizers, stride):
    rows = Dataset.from_list([row("the fox " * 20, "owl")])
    windows, report = squad.training_windows(rows, tokenizers["bert"], max_length=24, stride=stride)
    assert report.shortened == ["q"]
    assert all(len(window["input_ids"]) <= 24 for window in windows)
    with pytest.raises(ValueError, match="stride=20 leaves no room for a question in max_length=24"):
        squad.training_windows(rows, tokenizers["bert"], max_length=24, stride=20)


@pytest.mark.parametrize(
    ("prediction", "answers", "of_v1", "of_v2"),
    [("", ["the"], (100, 0), (100, 100)), ("", ["5", ""], (100, 0), (0, 0)), ("5", ["5", ""], (100, 100), (100, 100))],
)
def test_empty_answers_differ_between_the_versions(prediction, answers, of_v1, of_v2):
    rows = [{"id": "a", "answers": {"text": answers}}]
    for without_answers, expected in ((False, of_v1), (True, of_v2)):
        found = squad.squad_scores({"a": prediction}, rows, without_answers)
        assert (found["exact_match"], found["f1"]) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("an apple, a day", "apple day", 1, 1),
        ("U.S.A.", "usa", 1, 1),
        ("the cat sat", "cat sat down", 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("cat cat dog", "cat dog dog", 0, 2 / 3),
        ("Paris", "London", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("Paris", "", 0, 0),
        ("", "Paris", 0, 0),
    ],
)
def test_official_rules(prediction, answer, exact, f1):
    assert squad.exact_match(prediction, answer) == exact
    assert squad.f1(prediction, answer) == pytest.approx(f1)


def test_the_best_of_several_answers_counts():
    rows = [
        {"id": "a", "answers": {"text": ["in 1990", "1990"]}},
        {"id": "b", "answers": {"text": []}},
        {"id": "c", "answers": {"text": ["the", "."]}},  # nothing is left of these: no answer
        {"id": "d", "answers": {"text": ["red car", "big red bus"]}},
    ]
    found = squad.squad_scores({"a": "1990.", "b": "", "c": "", "d": "red bus"}, rows)
    assert found == {"exact_match": 75.0, "f1": pytest.approx(100 * (3 + 0.8) / 4)}
    with pytest.raises(ValueError, match="no prediction for the question 'd'"):
        squad.squad_scores({"a": "", "b": "", "c": ""}, rows)


def test_the_best_span_over_all_windows():
    windows = [
        {"id": "q", "offsets": [None, None, (0, 3), (4, 7), (8, 11)]},
        {"id": "q", "offsets": [None, None, (8, 11), (12, 15), None]},
    ]
    starts = [[1.0, 9.0, 2.0, 0.0, 0.0], [0.0, 9.0, 0.0, 3.0, 9.0]]
    ends = [[1.0, 9.0, 0.0, 2.5, 0.0], [0.5, 9.0, 0.0, 2.0, 9.0]]
    found = squad.best_answers(windows, starts, ends, {"q": "one two six ten"})["q"]
    assert (found.text, found.score, found.no_answer_score) == ("ten", 5.0, 0.5)
    assert found.n_best[1] == ("one two", 4.5)
    short = squad.best_answers(windows[:1], starts[:1], ends[:1], {"q": "one two six ten"}, max_answer_tokens=1)["q"]
    assert short.text == "two"  # 0 + 2.5
    # The end is never before the start.
    backwards = squad.best_answers(windows[:1], [[0, 0, 0, 0, 5.0]], [[0, 0, 5.0, 0, 0]], {"q": "one two six ten"})[
        "q"
    ]
    assert backwards.text in ("one", "six", "one two", "one two six")


def test_the_threshold_is_the_best_of_all():
    draw = random.Random(0)
    for _ in range(20):
        rows, answers = [], {}
        for i in range(12):
            has_answer = draw.random() < 0.6
            rows.append({"id": str(i), "answers": {"text": ["red bus"] if has_answer else []}})
            text = draw.choice(["red bus", "red", "blue"])
            answers[str(i)] = squad.Answer(
                text, draw.choice([0.0, 1.0, 2.0, draw.random()]), draw.choice([0.0, 1.0, draw.random()])
            )
        threshold = squad.best_threshold(answers, rows)
        found = squad.squad_scores(squad.with_threshold(answers, threshold), rows)["f1"]
        margins = [answer.no_answer_score - answer.score for answer in answers.values()]
        every = [
            squad.squad_scores(squad.with_threshold(answers, t), rows)["f1"] for t in [min(margins) - 1, *margins]
        ]
        assert found == pytest.approx(max(every))


def test_files_are_checked(tmp_path):
    good = Dataset.from_list([row("what ?", "owl")])
    good.to_parquet(tmp_path / "good.parquet")
    assert squad.load_squad(tmp_path / "good.parquet")[0]["answers"]["text"] == ["owl"]
    good.remove_columns("answers").to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="there is no column 'answers'"):
        squad.load_squad(tmp_path / "bad.parquet")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        squad.load_squad(tmp_path / "missing.parquet")
    good.map(lambda row: {"question": None}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none.parquet, row 0: a value is missing"):
        squad.load_squad(tmp_path / "none.parquet")
    good.remove_columns("answers").add_column("answers", ["owl"]).to_parquet(tmp_path / "flat.parquet")
    with pytest.raises(ValueError, match="the column 'answers' must hold text and answer_start"):
        squad.load_squad(tmp_path / "flat.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="cannot be read"):
        squad.load_squad(tmp_path / "broken.parquet")
