"""Files in SQuAD's format: what is read, what is refused, and the contexts that are made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from condense_core.tasks import squad as module
from condense_core.tasks.generators import Task, Turn
from condense_core.tasks.squad import Paragraph, SquadConfig, read_squad, squad_tasks
from condense_core.tasks.tally import Tally
from tests.tasks.squad_file import squad_data, write_squad

CONFIG = SquadConfig(min_chars=1400, max_chars=2000, num_questions=6)


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory: pytest.TempPathFactory) -> list[Paragraph]:
    """40 paragraphs of 8 articles, some 400 characters and 3 questions each."""
    return read_squad(write_squad(tmp_path_factory.mktemp("squad") / "file.json"))


def parts_of(task: Task, paragraphs: list[Paragraph]) -> list[Paragraph]:
    by_text = {paragraph.text: paragraph for paragraph in paragraphs}
    return [by_text[text] for text in task.context.split("\n\n")]


def test_everything_is_read(paragraphs: list[Paragraph]) -> None:
    assert len(paragraphs) == 40
    assert Counter(paragraph.article for paragraph in paragraphs) == dict.fromkeys(range(8), 5)
    first = paragraphs[0]
    assert first.turns[0] == Turn("Who opened the harbor of ward 0-0?", "Keeper0x0", "who", others=("by Keeper0x0",))
    assert [turn.kind for turn in first.turns] == ["who", "when", "how many"]


def test_what_squad_2_marks_as_impossible_is_left_out(tmp_path: Path) -> None:
    data = squad_data(2, 2)
    questions = data["data"][0]["paragraphs"][0]["qas"]
    questions[0] |= {"is_impossible": True, "answers": []}
    questions[1] |= {"is_impossible": False}
    path = tmp_path / "file.json"
    path.write_text(json.dumps(data))
    assert [len(paragraph.turns) for paragraph in read_squad(path)] == [2, 3, 3, 3]


def test_contexts_are_whole_paragraphs_of_different_articles_each_used_once(paragraphs: list[Paragraph]) -> None:
    tasks = list(squad_tasks(paragraphs, 9, seed=0, config=CONFIG))  # of four or five paragraphs
    used: Counter[str] = Counter()
    for task in tasks:
        assert 1400 <= len(task.context) <= 2000
        parts = parts_of(task, paragraphs)
        assert len({part.article for part in parts}) == len(parts)
        used.update(part.text for part in parts)
        known = {turn: part for part in parts for turn in part.turns}
        assert len(task.turns) == len(set(task.turns)) == 6
        asked = Counter(known[turn].text for turn in task.turns)
        assert set(asked) == {part.text for part in parts}  # each paragraph before any a second time
        assert max(asked.values()) - min(asked.values()) <= 1
        for turn in task.turns:
            assert all(answer in task.context for answer in turn.accepted)
    assert set(used.values()) == {1}
    assert len(used) == 40


def test_seed_and_index_decide(paragraphs: list[Paragraph]) -> None:
    def make(count: int, seed: int) -> list[Task]:
        return list(squad_tasks(paragraphs, count, seed=seed, config=CONFIG))

    assert make(12, 1) == make(12, 1)
    assert make(4, 1) == make(12, 1)[:4]
    assert make(4, 1) != make(4, 2)
    further = make(30, 1)  # more than the paragraphs make once
    assert all(1400 <= len(task.context) <= 2000 for task in further)
    assert len({task.context for task in further}) == 30


def test_a_file_of_few_articles_repeats_them_within_a_context(tmp_path: Path) -> None:
    one = read_squad(write_squad(tmp_path / "one.json", articles=1, paragraphs=12))
    for task in squad_tasks(one, 2, seed=0, config=CONFIG):
        assert 1400 <= len(task.context) <= 2000
        assert len(set(task.context.split("\n\n"))) == len(task.context.split("\n\n"))


def test_paragraphs_of_very_different_lengths(tmp_path: Path) -> None:
    long = squad_data(6, 2, sentences=25)["data"]
    short = squad_data(8, 5, sentences=1)["data"]
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"data": long + short}))
    for task in squad_tasks(read_squad(path), 20, seed=0, config=CONFIG):
        assert 1400 <= len(task.context) <= 2000
        assert task.turns


def test_the_best_of_several_answers_counts() -> None:
    tally = Tally()
    turn = Turn("How many?", "the 308 points of 2015", "how many", others=("308 points", "308"))
    tally.add(turn, "They scored 308 in all.", 1.0)
    tally.add(turn, "308 points", 1.0)
    assert tally.contained == [1.0, 1.0]
    assert tally.exact_match == [0.0, 1.0]
    assert tally.f1 == pytest.approx([1 / 3, 1.0])


# -- bad files ---------------------------------------------------------------------------------------------------------


def first_question(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["data"][0]["paragraphs"][0]["qas"][0]
    return found


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    data = squad_data(2, 2)
    change(data)
    return json.dumps(data).encode()


QUESTION = "data[0].paragraphs[0].qas[0]"
BAD = {
    "empty": (b"", "empty"),
    "not UTF-8": (b'{"data": "\xff"}', "byte offset 10 (0xff)"),
    "UTF-16": ('{"data": []}'.encode("utf-16"), "UTF-16"),
    "not JSON": (b'{"data": [}', "line 1: not JSON"),
    "nested without end": (b"[" * 200_000, "nested too deeply"),
    "a list": (b"[]", "a list, expected an object with a field 'data'"),
    "no data": (b"{}", "no 'data', expected a field 'data'"),
    "data of another type": (b'{"data": {}}', "data: an object, expected a list"),
    "no article": (b'{"data": []}', "data: an empty list, expected at least one item"),
    "an article of another type": (b'{"data": [3]}', "data[0]: a number, expected an object with a field 'paragraphs'"),
    "no paragraph": (changed(lambda d: d["data"][0].update(paragraphs=[])), "data[0].paragraphs: an empty list"),
    "no context": (changed(lambda d: d["data"][0]["paragraphs"][0].pop("context")), "paragraphs[0]: no 'context'"),
    "a blank context": (
        changed(lambda d: d["data"][0]["paragraphs"][0].update(context=" \n")),
        "data[0].paragraphs[0].context: a blank string",
    ),
    "half a character": (
        changed(lambda d: d["data"][0]["paragraphs"][0].update(context="a \ud800 b")),
        "data[0].paragraphs[0].context: not valid Unicode",
    ),
    "no questions": (changed(lambda d: d["data"][1]["paragraphs"][1].pop("qas")), "data[1].paragraphs[1]: no 'qas'"),
    "a blank question": (changed(lambda d: first_question(d).update(question="")), f"{QUESTION}.question: a blank"),
    "a question of another type": (
        changed(lambda d: first_question(d).update(question=7)),
        "a number, expected a string",
    ),
    "no answers": (changed(lambda d: first_question(d).pop("answers")), f"{QUESTION}: no 'answers'"),
    "an empty list of answers": (
        changed(lambda d: first_question(d).update(answers=[])),
        f"{QUESTION}.answers: an empty",
    ),
    "an answer of another type": (changed(lambda d: first_question(d).update(answers=["x"])), "answers[0]: a string"),
    "an answer without text": (
        changed(lambda d: first_question(d)["answers"][0].pop("text")),
        f"{QUESTION}.answers[0]: no 'text'",
    ),
    "an answer without a place": (
        changed(lambda d: first_question(d)["answers"][0].pop("answer_start")),
        f"{QUESTION}.answers[0]: no 'answer_start'",
    ),
    "a place of another type": (
        changed(lambda d: first_question(d)["answers"][0].update(answer_start="34")),
        f"{QUESTION}.answers[0].answer_start: a string, expected an integer",
    ),
    "a place that is true": (
        changed(lambda d: first_question(d)["answers"][0].update(answer_start=True)),
        "answer_start: a boolean, expected an integer",
    ),
    "an answer of another paragraph": (
        changed(lambda d: first_question(d)["answers"][0].update(text="Keeper9x9")),
        f"{QUESTION}.answers[0]: the answer 'Keeper9x9' does not stand in its paragraph",
    ),
    "an answer at another place": (
        changed(lambda d: first_question(d)["answers"][0].update(answer_start=0)),
        f"{QUESTION}.answers[0].answer_start: 0, where the paragraph has 'The harbo'",
    ),
    "a place beyond the paragraph": (
        changed(lambda d: first_question(d)["answers"][0].update(answer_start=10**9)),
        "answer_start: 1000000000, where the paragraph has ''",
    ),
    "a place before the paragraph": (
        changed(lambda d: first_question(d)["answers"][0].update(answer_start=-5)),
        "answer_start: -5, where",
    ),
    "impossible of another type": (
        changed(lambda d: first_question(d).update(is_impossible="no")),
        f"{QUESTION}.is_impossible: a string, expected true or false",
    ),
    "no question at all": (
        changed(lambda d: [p.update(qas=[]) for a in d["data"] for p in a["paragraphs"]]),
        "holds no question that has an answer",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_name_and_place(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_squad(path)
    assert message in str(caught.value)
    assert "questions.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(ValueError, match=r"squad: .* is not a file"):
            read_squad(path)
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_squad(write_squad(tmp_path / "large.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_chars": 0}, "min_chars, max_chars: got 0, 7000"),
        ({"min_chars": 8000}, "min_chars, max_chars: got 8000, 7000; expected 1 <= min <= max"),
        ({"num_questions": 0}, "num_questions: got 0, expected at least 1"),
    ],
)
def test_a_bad_config(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SquadConfig(**changes)


def test_contexts_that_cannot_be_made(paragraphs: list[Paragraph]) -> None:
    with pytest.raises(
        ValueError, match="min_chars, max_chars: got 60000, 70000; no such context can be made of the 40"
    ):
        next(squad_tasks(paragraphs, 1, seed=0, config=SquadConfig(60_000, 70_000)))
    with pytest.raises(ValueError, match="max_chars: got 50, less than every paragraph"):
        next(squad_tasks(paragraphs, 1, seed=0, config=SquadConfig(10, 50)))
