"""Challenges look like any request, are the same for whoever knows the secret, and ask about all of the context."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from condense_core.neurons.judging.challenges import RATIOS, Challenge, challenge, challenge_of, clozes, whole_sentences
from condense_core.neurons.protocol.messages import read_ask
from condense_core.neurons.tiers import read_tiers
from condense_core.tasks.generators import Task, Turn
from condense_core.tasks.sources import open_source

TIERS = read_tiers()
SOURCE = open_source(None)


def made(index: int, tier: str = "research", secret: str = "s") -> Challenge:
    return challenge(TIERS, tier, SOURCE, secret=secret, index=index)


@pytest.mark.parametrize("tier", TIERS.tiers)
def test_a_challenge_is_a_request_within_the_limits_of_its_tier(tier: str) -> None:
    for index in range(20):
        one = made(index, tier)
        read, limits = read_ask(one.ask.to_bytes(), TIERS)
        assert read == one.ask
        assert limits.min_ratio <= read.ratio <= limits.max_ratio
        assert read.ratio in RATIOS or read.ratio == int(read.ratio)
        assert len(one.pool) >= limits.questions


def test_lengths_ratios_and_questions_vary_as_those_of_applications_do() -> None:
    challenges = [made(index) for index in range(80)]
    lengths = sorted(len(one.ask.text) for one in challenges)
    limits = TIERS.tiers["research"]
    quarter = (limits.max_chars - limits.min_chars) / 4
    counts = Counter(int((length - limits.min_chars) / quarter) for length in lengths)
    assert all(counts[part] >= 8 for part in range(4))  # 20 each are expected
    assert len({one.ask.ratio for one in challenges}) >= 5
    assert 8 <= sum(one.ask.question is not None for one in challenges) <= 36  # 20 are expected


def test_the_same_secret_makes_the_same_challenge_and_another_one_another() -> None:
    assert made(3) == made(3)
    assert made(3).ask.text != made(4).ask.text
    assert made(3).ask.text != made(3, secret="t").ask.text


def test_the_right_answers_stand_in_the_context() -> None:
    for index in range(20):
        one = made(index)
        for turn in one.pool:
            assert turn.answer in one.ask.text, turn
        kinds = {turn.kind for turn in one.pool}
        assert "cloze" in kinds
        assert len(kinds) > 1


def test_a_question_that_is_sent_along_is_not_asked() -> None:
    sent = [one for one in map(made, range(60)) if one.ask.question is not None]
    assert sent
    for one in sent:
        assert all(turn.question[:500] != one.ask.question for turn in one.pool)


def test_questions_are_drawn_later_and_for_all_alike() -> None:
    one = made(0)
    drawn = one.drawn(4, "round 1")
    assert drawn == one.drawn(4, "round 1")
    assert len(set(drawn)) == 4
    assert set(drawn) <= set(one.pool)
    assert len({one.drawn(4, f"round {n}") for n in range(20)}) > 10
    assert len(one.drawn(1000, "all")) == len(one.pool)


def test_a_sentence_is_asked_for_only_where_its_beginning_stands_once() -> None:
    twice = "The old keeper of the north archive counts the lamps at dusk. "
    once = "A young clerk in the south harbour writes down the names of every ship. "
    turns = clozes(twice * 2 + once, 5, random.Random(0))
    assert [turn.answer for turn in turns] == ["of every ship"]
    assert "A young clerk in the south harbour writes down the names ..." in turns[0].question
    assert clozes("no sentence at all", 5, random.Random(0)) == []


def test_questions_that_people_asked_are_taken_where_their_text_fits() -> None:
    turn = Turn("Who counts?", "the keeper", "squad")
    fits = Task("question", "The keeper counts the lamps of the north archive at dusk. " * 20, (turn,))
    found = challenge_of(TIERS, "research", fits, secret="s")
    assert found is not None
    assert turn in found.pool or found.ask.question == turn.question
    assert challenge_of(TIERS, "inference_1", fits, secret="s") is None


def test_a_text_ends_where_a_sentence_does() -> None:
    texts = [made(index).ask.text for index in range(20)]
    assert all(text[-1] in ".!?" for text in texts)
    assert len({len(text) for text in texts}) > 15


@pytest.mark.parametrize(
    ("text", "least", "left"),
    [
        ("One. Two. Thr", 4, "One. Two."),
        ('He said: "Go!" She wen', 4, 'He said: "Go!"'),
        ("One. Two. Thr", 12, "One. Two. Thr"),
        ("no end", 1, "no end"),
        ("3.5 lamps. Mor", 1, "3.5 lamps."),
    ],
)
def test_what_is_left_is_whole_sentences(text: str, least: int, left: str) -> None:
    assert whole_sentences(text, least) == left
