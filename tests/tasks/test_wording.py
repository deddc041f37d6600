"""Facts in varied wording: a function of the seed, answerable, diverse, and with nothing shared between the splits."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from condense_core.tasks.facts import KINDS, Fact, split_of
from condense_core.tasks.generators import TaskConfig, make_task, make_tasks
from condense_core.tasks.metrics import contained, normalize
from condense_core.tasks.sources import ProseWriter
from condense_core.tasks.wording import (
    LONGEST_STATEMENT,
    WORDINGS,
    draw_varied_facts,
    draw_worded_facts,
    frame_split,
    frames,
    groups_of,
    tables,
)

SPLITS = ("train", "eval")


def draw(count: int, seed: int, **options: object) -> list[Fact]:
    return draw_varied_facts(count, random.Random(seed), **options)


@pytest.fixture(scope="module")
def many() -> dict[str, list[Fact]]:
    """Two thousand facts of each split, in draws of twenty."""
    return {split: [fact for seed in range(100) for fact in draw(20, seed, split=split)] for split in SPLITS}


def skeleton(text: str, fact: Fact) -> str:
    """The words of a sentence without entity and answer: what a model could learn by heart."""
    return (
        text.replace(fact.entity, "E").replace(fact.entity[:1].upper() + fact.entity[1:], "E").replace(fact.answer, "V")
    )


def test_the_seed_decides() -> None:
    assert draw(10, 1) == draw(10, 1)
    assert draw(10, 1) != draw(10, 2)
    assert draw(10, 1)[:4] == draw(4, 1)


def test_the_splits_share_no_entity_and_no_answer(many: dict[str, list[Fact]]) -> None:
    for part in ("entity", "answer"):
        train, held_out = ({getattr(fact, part) for fact in many[split]} for split in SPLITS)
        assert len(train) > 800
        assert len(held_out) > 500
        assert not train & held_out
    assert {split_of(fact.entity) for fact in many["eval"]} == {"eval"}


def test_one_date_or_number_in_two_spellings_belongs_to_one_split(many: dict[str, list[Fact]]) -> None:
    def plain(answer: str) -> str:
        if found := re.fullmatch(r"([A-Z][a-z]+) (\d+), (\d{4})", answer):
            return f"{found[2]} {found[1]} {found[3]}"
        return answer.replace(",", "").removeprefix("$").partition(" ")[0] if answer[0] in "$123456789" else answer

    train, held_out = ({plain(fact.answer) for fact in many[split]} for split in SPLITS)
    dates = [{text for text in found if re.fullmatch(r"\d+ [A-Z][a-z]+ \d{4}", text)} for found in (train, held_out)]
    assert not dates[0] & dates[1]
    numbers = [{fact.answer for fact in many[split] if fact.answer.isdigit()} for split in SPLITS]
    assert not {split_of(number) for number in numbers[0]} & {"eval"}
    assert not {split_of(number) for number in numbers[1]} & {"train"}


def test_the_splits_share_no_frame_of_a_statement_or_a_question() -> None:
    for what in ("statements", "questions", "leads", "tails"):
        train, held_out = (set(frames(what, split)) for split in SPLITS)
        if what in ("statements", "questions"):
            for found, split in ((train, "train"), (held_out, "eval")):
                found |= {f for r in tables().relations for g in groups_of(r, split) for f in getattr(g, what)}
        assert not train & held_out
        assert len(train) > len(held_out) > 1


def test_sentences_of_the_splits_differ_by_more_than_entity_and_answer(many: dict[str, list[Fact]]) -> None:
    """What is drawn, not what the tables say."""
    for text in ("statement", "question"):
        train, held_out = ({skeleton(getattr(f, text), f) for f in many[split]} for split in SPLITS)
        assert not train & held_out


def test_the_split_of_a_frame_never_changes() -> None:
    """Written down: a change of the hash would show held-out frames to models trained before it."""
    assert frame_split("{e}, whose {a} is {v}, was discussed at length.") == "train"
    assert frame_split("the {a} of {e} is {v}.") == "train"
    assert frame_split("the {a} for {e} remains {v}.") == "eval"
    assert frame_split("! {e}: {a} {v}.") == frame_split("{e}: {a} {v}.")


def test_hundreds_of_surface_forms(many: dict[str, list[Fact]]) -> None:
    for split, least in (("train", 700), ("eval", 350)):
        assert len({skeleton(fact.statement, fact) for fact in many[split]}) > least
        assert len({skeleton(fact.question, fact) for fact in many[split]}) > least / 3


def test_every_kind_and_every_relation_occurs(many: dict[str, list[Fact]]) -> None:
    for facts in many.values():
        kinds = Counter(fact.kind for fact in facts)
        assert set(kinds) == set(KINDS)
        assert min(kinds.values()) > len(facts) / 10
        assert {fact.attribute for fact in facts} == {relation.attribute for relation in tables().relations}


def test_a_statement_holds_entity_and_answer_and_a_question_the_entity_only(many: dict[str, list[Fact]]) -> None:
    for fact in [*many["train"], *many["eval"]]:
        assert contained(fact.statement, fact.answer), fact
        assert fact.entity.lower() in fact.statement.lower(), fact
        assert fact.entity.lower() in fact.question.lower(), fact
        assert not contained(fact.question, fact.answer), fact
        assert normalize(fact.answer)
        for text in (fact.statement, fact.question):
            assert text[0].isupper() or text[0].isdigit() or text[0] in '$"' or text.startswith(fact.answer), fact
            assert text[-1] in "?.", fact
            assert not re.search(r"[{}!]|  |\.\.|,,|s's ", text), fact
        assert len(fact.statement) < LONGEST_STATEMENT["varied"]


@pytest.mark.parametrize("relatedness", [0.0, 0.4, 1.0])
def test_keys_are_unique_within_a_draw(relatedness: float) -> None:
    for seed in range(20):
        facts = draw(24, seed, relatedness=relatedness)
        assert len({fact.key for fact in facts}) == len(facts) == 24


def test_relatedness_makes_neither_entity_nor_attribute_enough() -> None:
    def shared(part: int, relatedness: float) -> float:
        draws = [draw(20, seed, relatedness=relatedness) for seed in range(30)]
        return sum(20 - len({fact.key[part] for fact in facts}) for facts in draws) / 600

    assert shared(1, 0.0) < 0.05
    assert shared(1, 1.0) > 0.3
    assert shared(0, 1.0) > shared(0, 0.0)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_only(kind: str, split: str) -> None:
    assert {fact.kind for fact in draw(30, 0, kinds=(kind,), split=split, relatedness=1.0)} == {kind}


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="split: got 'test', expected one of train, eval"):
        draw(1, 0, split="test")
    with pytest.raises(ValueError, match="kinds: got colour, expected some of name"):
        draw(1, 0, kinds=("colour",))
    with pytest.raises(ValueError, match="wording: got 'odd', expected one of plain, varied"):
        draw_worded_facts("odd", 1, random.Random(0))
    with pytest.raises(ValueError, match="wording: got 'odd', expected one of plain, varied"):
        TaskConfig(wording="odd")
    with pytest.raises(ValueError, match="num_facts: got 34, expected at most min_chars/180 = 33"):
        TaskConfig(wording="varied", num_facts=34)


def test_tasks_hold_what_they_ask_for() -> None:
    config = TaskConfig(min_chars=1800, max_chars=2000, num_facts=10, num_questions=10, wording="varied")
    for made in make_tasks("question", ProseWriter(), 20, seed=3, config=config):
        assert 1800 <= len(made.context) <= 2000
        assert len(made.turns) == 10
        for turn in made.turns:
            assert turn.answer in made.context
    assert WORDINGS == ("plain", "varied")


def test_the_default_wording_is_the_plain_one() -> None:
    plain = TaskConfig(wording="plain")
    assert make_task("question", ProseWriter(), seed=1) == make_task("question", ProseWriter(), seed=1, config=plain)
