"""Facts: a function of the seed, unique, findable, and never shared between the splits."""

from __future__ import annotations

import random
import re

import pytest

from condense_core.tasks.facts import KINDS, Fact, draw_facts, split_of, vocabulary_text

# What an answer of each kind looks like, written down independently of the vocabulary.
SHAPES = {
    "name": r"[A-Z][a-z]+ [A-Z][a-z]+",
    "code": r"[A-Z]\d{4}",
    "date": r"([1-9]|1\d|2[0-8]) [JFMASOND][a-z]+ (1[789]\d\d|20[012]\d)",
    "place": r"[A-Z][a-z]+",
    "amount": r"[1-9]\d{1,3} [a-z]+",
}


def draw(count: int, seed: int, **options: object) -> list[Fact]:
    return draw_facts(count, random.Random(seed), **options)


@pytest.fixture(scope="module")
def many() -> dict[str, list[Fact]]:
    """Two thousand facts of each split, in draws of twenty."""
    return {split: [fact for seed in range(100) for fact in draw(20, seed, split=split)] for split in ("train", "eval")}


def test_the_seed_decides() -> None:
    assert draw(10, 1) == draw(10, 1)
    assert draw(10, 1) != draw(10, 2)
    assert draw(10, 1)[:4] == draw(4, 1)


def test_the_splits_share_no_entity_and_no_answer(many: dict[str, list[Fact]]) -> None:
    for part in ("entity", "answer"):
        train, held_out = ({getattr(fact, part) for fact in many[split]} for split in ("train", "eval"))
        assert len(train) > 500
        assert len(held_out) > 200
        assert not train & held_out
        assert {split_of(text) for text in train} == {"train"}
        assert {split_of(text) for text in held_out} == {"eval"}


def test_a_fifth_of_the_vocabulary_is_held_out() -> None:
    shares = [split_of(f"word {i}") == "eval" for i in range(5000)]
    assert 0.17 < sum(shares) / 5000 < 0.23  # 5 standard deviations around 0.2


def test_the_split_of_a_text_never_changes() -> None:
    """Written down: a change of the hash would leak held-out entities into models trained before it."""
    train = ("the amber abbey", "the yellow workshop", "Ada Alderbach", "Abadia", "B2001")
    held_out = ("the red mill", "A1234", "1 January 1900")
    assert {split_of(text) for text in train} == {"train"}
    assert {split_of(text) for text in held_out} == {"eval"}


def test_every_kind_occurs_with_answers_of_its_shape(many: dict[str, list[Fact]]) -> None:
    for facts in many.values():
        kinds = [fact.kind for fact in facts]
        assert set(kinds) == set(KINDS)
        assert min(kinds.count(kind) for kind in KINDS) > len(facts) / 10
        for fact in facts:
            assert re.fullmatch(SHAPES[fact.kind], fact.answer), fact
            assert re.fullmatch(r"the [a-z]+ [a-z]+", fact.entity), fact


def test_a_statement_holds_its_answer_and_a_question_does_not(many: dict[str, list[Fact]]) -> None:
    for fact in [*many["train"], *many["eval"]]:
        assert fact.statement.endswith(f" {fact.answer}.")
        assert fact.attribute in fact.statement
        assert fact.entity in fact.statement
        assert fact.attribute in fact.question
        assert fact.entity in fact.question
        assert fact.answer not in fact.question
        assert fact.question[-1] in "?."
        assert "{" not in fact.statement + fact.question


@pytest.mark.parametrize("relatedness", [0.0, 0.4, 1.0])
def test_keys_are_unique_within_a_draw(relatedness: float) -> None:
    for seed in range(20):
        facts = draw(24, seed, relatedness=relatedness)
        assert len({fact.key for fact in facts}) == len(facts) == 24
        assert all(fact.key == (fact.attribute, fact.entity) for fact in facts)


def test_relatedness_makes_neither_entity_nor_attribute_enough() -> None:
    def shared(part: int, relatedness: float) -> float:
        draws = [draw(20, seed, relatedness=relatedness) for seed in range(30)]
        return sum(20 - len({fact.key[part] for fact in facts}) for facts in draws) / 600

    assert shared(1, 0.0) < 0.05  # entities repeat by chance alone
    assert shared(1, 1.0) > 0.3
    assert shared(0, 1.0) > shared(0, 0.0)


def test_one_kind_only() -> None:
    assert {fact.kind for fact in draw(30, 0, kinds=("code",))} == {"code"}


def test_a_split_or_a_kind_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="split: got 'test', expected one of train, eval"):
        draw(1, 0, split="test")
    with pytest.raises((ValueError, KeyError), match="colour"):
        draw(1, 0, kinds=("colour",))


def test_vocabulary_text_shows_the_train_split_only(many: dict[str, list[Fact]]) -> None:
    lines = vocabulary_text(3, 200)
    assert lines == vocabulary_text(3, 200)
    assert len(lines) == 200
    text = "\n".join(lines)
    entities = set(re.findall(r"the [a-z]+ [a-z]+(?=[ .,?])", text))
    assert not {fact.entity for fact in many["eval"]} & entities
    assert {fact.entity for fact in many["train"]} & entities
