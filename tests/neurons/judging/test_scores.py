"""The answers of many miners are judged at once: each gets what it gets alone, from no more reading than needed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import astuple, replace

import pytest
import torch

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.incentive.score import Score
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import read_tiers
from condense_core.tasks.answers import Answers, answer_loss
from condense_core.tasks.generators import Turn
from condense_core.tasks.metrics import contained

TIER = read_tiers().tiers["research"]
SECONDS = 0.5

# Losses differ by less than 1e-4 nats, of a context's help of more than 0.1 (LEAST_GAIN) for each question. Scores are
# as far apart where the LLM says the same; what it says is compared as well.
TOLERANCE = 1e-3

Found = Mapping[str, tuple[Score, SoftTokens | None]]


Asked = tuple[Ask, tuple[Turn, ...]]


@pytest.fixture
def judge(condenser: Condenser) -> Judge:
    return Judge(condenser)


def scored(judge: Judge, asked: Asked, sent: Mapping[str, SoftTokens | bytes], seconds: float = SECONDS) -> Found:
    bodies = {hotkey: made if isinstance(made, bytes) else made.to_bytes() for hotkey, made in sent.items()}
    return judge.scores({hotkey: (body, seconds) for hotkey, body in bodies.items()}, asked[0], TIER, asked[1])


def noisy(soft: SoftTokens, share: float, seed: int = 0) -> SoftTokens:
    drawn = torch.randn(soft.embeds.shape, generator=torch.Generator().manual_seed(seed))
    return replace(soft, embeds=soft.embeds + share * soft.embeds.std() * drawn)


def of_all_kinds(condenser: Condenser, asked: Asked) -> dict[str, SoftTokens | bytes]:
    """Good, worse and bad answers, of two lengths, hostile and invalid ones."""
    good = condenser.compress(asked[0].text, asked[0].ratio)
    zeros = torch.zeros_like(good.embeds)
    sent: dict[str, SoftTokens | bytes] = {f"noisy {i}": noisy(good, 0.15 * i, i) for i in range(8)}
    return sent | {
        "shorter": condenser.compress(asked[0].text, 16),
        "half": good.to(dtype=torch.float16),
        "bfloat": good.to(dtype=torch.bfloat16),
        "zeros": replace(good, embeds=zeros),
        "large": replace(good, embeds=zeros + 65504),
        "one large row": replace(good, embeds=torch.cat([good.embeds[:-1], zeros[:1] + 65504])),
        "invalid": b"soft tokens",
        "none": b"",
    }


def assert_alike(one: Score, other: Score) -> None:
    assert one.why == other.why
    assert astuple(one)[:-1] == pytest.approx(astuple(other)[:-1], abs=TOLERANCE)


def test_each_miner_gets_what_it_gets_alone(condenser: Condenser, asked: Asked, judge: Judge) -> None:
    sent = of_all_kinds(condenser, asked)
    together = scored(judge, asked, sent)
    assert list(together) == list(sent)
    for hotkey, answer in sent.items():
        alone = scored(judge, asked, {hotkey: answer})
        assert_alike(together[hotkey][0], alone[hotkey][0])
    values = [together[f"noisy {i}"][0].value for i in range(8)]
    assert values[0] > 0.5
    assert len(set(values)) == 8


def test_neither_order_nor_number_of_miners_changes_a_score(condenser: Condenser, asked: Asked, judge: Judge) -> None:
    sent = of_all_kinds(condenser, asked)
    together = scored(judge, asked, sent)
    for count in (len(sent), len(sent) // 2):
        some = random.Random(count).sample(sorted(sent), count)
        found = scored(judge, asked, {hotkey: sent[hotkey] for hotkey in some})
        for hotkey in some:
            assert_alike(found[hotkey][0], together[hotkey][0])


def test_readings_are_those_of_whole_prompts(condenser: Condenser, asked: Asked, judge: Judge) -> None:
    """What the judge is measured by itself: every prompt by itself, without batches and branches."""
    turns = asked[1]
    contexts = [one for one in of_all_kinds(condenser, asked).values() if isinstance(one, SoftTokens)]
    for context, reading in zip(contexts, judge.readings_of(contexts, turns), strict=True):
        for turn, loss, correct in zip(turns, reading.losses, reading.correct, strict=True):
            assert loss == pytest.approx(answer_loss(condenser, context, turn.question, turn.answer), abs=1e-4)
            text = condenser.generate(context, turn.question, max_new_tokens=judge.max_new_tokens)
            assert correct == max(float(contained(text, right)) for right in turn.accepted)


def test_the_same_soft_tokens_are_read_once_and_have_latencies_of_their_own(
    condenser: Condenser, asked: Asked, judge: Judge
) -> None:
    good = condenser.compress(asked[0].text, asked[0].ratio)
    exact = good.to(dtype=torch.bfloat16)
    sent = {
        "first": (good.to_bytes(), 0.5),
        "again": (good.to_bytes(), 4.0),
        "other words about it": (replace(good, method="other", model_id=f"org/{good.model_id}").to_bytes(), 0.5),
        "bfloat": (exact.to_bytes(), 0.5),
        "bfloat in 32 bits": (exact.to(dtype=torch.float32).to_bytes(), 0.5),
    }
    found = judge.scores(sent, asked[0], TIER, asked[1])
    assert judge.readings == 2 + 6  # full, none and four trivial ones
    first, again = found["first"][0], found["again"][0]
    assert first == found["other words about it"][0]
    assert found["bfloat"][0] == found["bfloat in 32 bits"][0]
    assert (first.seconds, again.seconds) == (0.5, 4.0)
    assert first.efficiency - again.efficiency == pytest.approx(3.5 / TIER.timeout / 2)
    assert replace(again, seconds=0.5, efficiency=first.efficiency, value=first.value) == first


def test_what_is_late_or_invalid_costs_no_reading_and_without_others_no_references(
    condenser: Condenser, asked: Asked, judge: Judge
) -> None:
    good = condenser.compress(asked[0].text, asked[0].ratio)
    late = scored(judge, asked, {"late": good, "late too": noisy(good, 0.1)}, seconds=TIER.timeout + 0.01)
    bad = scored(judge, asked, {"none": b"", "invalid": good.to_bytes()[:-1]})
    assert judge.readings == 0
    assert all((found.value, soft) == (0.0, None) for found, soft in (*late.values(), *bad.values()))
    assert scored(judge, asked, {}) == {}
    assert judge.readings == 0
    scored(judge, asked, {"good": good, "none": b"", "invalid": b"x" * 1000})
    assert judge.readings == 1 + 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hostile_values_are_worth_nothing_and_disturb_nobody(dtype: torch.dtype, asked: Asked) -> None:
    """The largest that are valid."""
    judge = Judge(Condenser.from_pretrained(embedded_model_path(), method="pool", device="cpu", dtype=dtype))
    good = judge.condenser.compress(asked[0].text, asked[0].ratio).to(dtype=torch.float32)
    large = torch.full_like(good.embeds, 65504)
    signs = torch.randn(good.embeds.shape, generator=torch.Generator().manual_seed(0)).sign()
    hostile = {"large": large, "signs": large * signs, "zeros": large * 0}
    # Fillers that are harmless, so that both batches have the same shape: what is good must not change by a bit.
    harmless = {name: noisy(good, 0.1, seed) for seed, name in enumerate(hostile)}
    found = scored(judge, asked, {name: replace(good, embeds=rows) for name, rows in hostile.items()} | {"good": good})
    assert found["good"][0] == scored(judge, asked, {**harmless, "good": good})["good"][0]
    assert found["good"][0].value > 0.5
    assert [found[name][0].value for name in hostile] == [0] * len(hostile)


def test_a_reading_without_a_number_is_worth_nothing(
    condenser: Condenser, asked: Asked, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the LLM then said the right things."""
    turns = asked[1]
    good = condenser.compress(asked[0].text, asked[0].ratio)
    judge.reference(asked[0], turns)
    for loss in (math.nan, math.inf):
        said = Answers([turn.answer for turn in turns], [loss] * len(turns), 1.0)
        monkeypatch.setattr("condense_core.neurons.judging.judge.answers_about_many", lambda *_, said=said: [said])
        found, _ = judge.score(good.to_bytes(), asked[0], TIER, turns, SECONDS)
        assert found.correctness == 1
        assert (found.recovered, found.value) == (0, 0)
