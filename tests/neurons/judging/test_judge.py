"""The judge pays for what the LLM still knows, and for nothing else. The embedded model reads."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.judging.trivial import trivial_compressions
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import read_tiers
from condense_core.tasks.generators import Turn, running_text
from condense_core.tasks.sources import open_source

TIER = read_tiers().tiers["research"]


@pytest.fixture(scope="module")
def judge(condenser: Condenser) -> Judge:
    return Judge(condenser)


def test_a_trained_compressor_earns_and_what_needs_no_work_does_not(
    judge: Judge, asked: tuple[Ask, tuple[Turn, ...]]
) -> None:
    ask, turns = asked
    good = judge.condenser.compress(ask.text, 4)
    noise = torch.randn(good.embeds.shape, generator=torch.Generator().manual_seed(0)) * good.embeds.std()
    worthless = {
        "noise": replace(good, embeds=noise),
        "zeros": replace(good, embeds=torch.zeros_like(good.embeds)),
        **{f"trivial {i}": soft for i, soft in enumerate(trivial_compressions(judge.condenser, ask.text, 4.0))},
    }
    earned, soft = judge.score(good.to_bytes(), ask, TIER, turns, 0.5)
    assert soft is not None
    assert earned.value > 0.5, earned
    for name, bad in worthless.items():
        found, _ = judge.score(bad.to_bytes(), ask, TIER, turns, 0.5)
        assert found.value <= 0.05 * earned.value, (name, found)


def test_what_is_invalid_or_late_is_worth_nothing_and_is_not_read(
    judge: Judge, asked: tuple[Ask, tuple[Turn, ...]]
) -> None:
    ask, turns = asked
    good = judge.condenser.compress(ask.text, 4)
    judge.reference(ask, turns)
    before = judge.readings
    other = judge.condenser.compress(ask.text + " More.", 4)
    low = judge.condenser.compress(ask.text, 2)
    for sent, seconds, why in [
        (good.to_bytes(), 8.01, "late: 8.01 s, expected at most 8"),
        (b"", 0.1, "answer: "),
        (good.to_bytes()[:-3], 0.1, "answer: "),
        (b"\x00" * 1000, 0.1, "answer: "),
        (other.to_bytes(), 0.1, "answer: soft tokens of another context"),
        (low.to_bytes(), 0.1, "a ratio of 2, expected at least 4"),
        (replace(good, model_id="other", model_digest="").to_bytes(), 0.1, "answer: soft tokens were"),
        (replace(good, model_digest="0" * 64).to_bytes(), 0.1, "with other weights"),
        (replace(good, embeds=good.embeds[:, :8].clone()).to_bytes(), 0.1, "answer: "),
    ]:
        found, soft = judge.score(sent, ask, TIER, turns, seconds)
        assert (found.value, soft) == (0.0, None)
        assert why in found.why
    assert judge.readings == before


def test_references_are_read_once_for_all_miners(judge: Judge, asked: tuple[Ask, tuple[Turn, ...]]) -> None:
    ask, turns = asked
    fresh = Judge(judge.condenser)
    body = judge.condenser.compress(ask.text, 4).to_bytes()
    scores = [fresh.score(body, ask, TIER, turns, 0.5)[0] for _ in range(5)]
    assert len(set(scores)) == 1
    assert fresh.readings == 5 + 6  # full, none and four trivial ones


def test_the_full_text_keeps_what_it_is_compared_with(judge: Judge, asked: tuple[Ask, tuple[Turn, ...]]) -> None:
    ask, turns = asked
    reference = judge.reference(ask, turns)
    assert reference.is_telling
    assert sum(reference.full.losses) < sum(reference.none.losses)
    assert [reference.full] == judge.readings_of([ask.text], turns)


def test_a_context_that_does_not_help_scores_nobody(judge: Judge, tmp_path: Path) -> None:
    text = running_text(open_source(None), random.Random(1), 1200)
    turns = (Turn("Who keeps the moon?", "nobody knows", "made up"),)
    ask = Ask(tier="research", text=text, ratio=4.0)
    fresh = Judge(judge.condenser)
    fresh.reference(ask, turns)
    key = next(iter(fresh._references))
    asked, known = fresh._references[key]
    fresh._references[key] = asked, replace(known, none=known.full)
    found, soft = fresh.score(judge.condenser.compress(text, 4).to_bytes(), ask, TIER, turns, 0.5)
    assert (found.value, found.why) == (0.0, "the challenge is not telling")
    assert isinstance(soft, SoftTokens)


@pytest.mark.parametrize("ratio", [2.0, 2.5, 3.0, 12.0])
def test_every_ratio_of_a_challenge_has_its_trivial_compressions(judge: Judge, ratio: float) -> None:
    text = running_text(open_source(None), random.Random(2), 1200)
    count = -(-judge.context_tokens(text) // ratio)
    assert [len(soft) for soft in trivial_compressions(judge.condenser, text, ratio)] == [count] * 4


def test_questions_that_the_llm_cannot_answer_with_the_full_context_are_not_asked(
    judge: Judge, asked: tuple[Ask, tuple[Turn, ...]]
) -> None:
    ask, turns = asked
    unknown = Turn("Who keeps the moon?", "nobody knows", "made up")
    telling = judge.telling(Challenge("research", ask, (unknown, *turns)), len(turns))
    assert telling is not None
    assert telling.pool == turns
    assert telling.ask == ask
    assert judge.telling(Challenge("research", ask, (unknown, *turns)), len(turns) + 1) is None
    before = judge.readings
    some = judge.reference(ask, turns[1:3])  # each question was read by itself, so that none is read again
    assert judge.readings == before
    anew = Judge(judge.condenser).reference(ask, turns[1:3])
    for one, other in ((some.full, anew.full), (some.none, anew.none), *zip(some.trivial, anew.trivial, strict=True)):
        assert one.losses == pytest.approx(other.losses, abs=1e-4)
        assert one.correct == other.correct
    cheap = ask.model_copy(update={"ratio": 1.0})  # all of it can be kept
    assert judge.telling(Challenge("research", cheap, turns), 1) is None
