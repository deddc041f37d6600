"""The doctor scores a miner with the validator's code: what it says is what the judge says of the same bytes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import EMBEDDED_NAME, embedded_model_path
from condense_core.neurons.incentive.score import Score
from condense_core.neurons.judging import opened
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.judging.supply import Supply
from condense_core.neurons.mining.backends import served_ratio
from condense_core.neurons.mining.doctor import examine, examined
from condense_core.neurons.mining.opened import BackendChoice
from condense_core.neurons.mining.verdict import YOURS, Examined, as_table, lines, share, verdict
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import Tier, Tiers, read_tiers
from condense_core.serving.errors import DeadlineExceeded
from condense_core.tasks.sources import open_source
from condense_core.tasks.squad import read_squad


def tiers(**changes: Any) -> Tiers:
    """The subnet's, with the embedded model as the LLM of all tiers."""
    known = read_tiers()
    own = {name: tier.model_copy(update={"model": EMBEDDED_NAME, **changes}) for name, tier in known.tiers.items()}
    return known.model_copy(update={"tiers": own})


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Condenser.from_pretrained(embedded_model_path(), method="pool"))


class Own:
    """A backend of one's own that does something to good soft tokens."""

    is_ready = is_healthy = True

    def __init__(self, condenser: Condenser) -> None:
        self.condenser, self.sent = condenser, list[SoftTokens]()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def serves(self, tier: Tier) -> bool:
        return tier.model == EMBEDDED_NAME

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        made = self.condenser.compress(ask.text, served_ratio(ask.ratio, "pool", [2, 4, 8, 16]))
        self.sent.append(await self.done(made))
        return self.sent[-1]

    async def done(self, made: SoftTokens) -> SoftTokens:
        return made


class Broken(Own):
    async def done(self, made: SoftTokens) -> SoftTokens:
        return replace(made, embeds=made.embeds * torch.nan)


class Foreign(Own):
    async def done(self, made: SoftTokens) -> SoftTokens:
        return replace(made, model_id="another/model", model_digest="")


class Slow(Own):
    async def done(self, made: SoftTokens) -> SoftTokens:
        await asyncio.sleep(0.6)
        return made


class Stuck(Own):
    async def done(self, made: SoftTokens) -> SoftTokens:
        await asyncio.sleep(60)
        return made


class Overloaded(Own):
    async def done(self, made: SoftTokens) -> SoftTokens:
        raise DeadlineExceeded("the deadline has passed")


def made(known: Tiers, count: int) -> list[Challenge]:
    """Challenges as a validator's supply makes them."""
    supply = Supply(known, open_source(None), secret="a secret")
    return [supply.make("research") for _ in range(count)]


def scores_of(backend: Own, judge: Judge, rounds: int = 1, **changes: Any) -> list[Examined]:
    known = tiers(**changes)
    challenges = made(known, 100)
    return asyncio.run(examine(backend, judge, known.tiers["research"], iter(challenges), rounds, secret="a secret"))


def test_what_it_says_is_what_the_judge_says_of_the_same_bytes(judge: Judge) -> None:
    backend = Own(judge.condenser)
    own, *baselines = scores_of(backend, judge, rounds=2)
    assert (own.name, [each.name for each in baselines]) == (YOURS, ["select", "mean"])
    known = tiers()
    asked = made(known, 8)
    sent = backend.sent[1:]  # the first was to warm up
    for soft, found in zip(sent, own.scores, strict=True):
        one = next(
            c
            for c in asked
            if SoftTokens.from_bytes(soft.to_bytes()).context_sha256 == hashlib.sha256(c.ask.text.encode()).hexdigest()
        )
        telling = judge.telling(one, known.tiers["research"].questions)
        assert telling is not None
        turns = telling.drawn(known.tiers["research"].questions, "a secret")
        again, _ = judge.score(soft.to_bytes(), one.ask, known.tiers["research"], turns, found.seconds)
        assert again == found
    assert sum(score.value for score in own.scores) > 0.5


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Broken, "embeds has NaN or infinite values"),
        (Foreign, "answer: soft tokens were made by 'another/model'"),
        (Slow, "late: 0."),
        (Stuck, "late: nothing within 1 s, expected at most 0.5"),
        (Overloaded, "the deadline has passed"),
    ],
)
def test_it_names_what_makes_an_answer_worth_nothing(judge: Judge, kind: type[Own], why: str) -> None:
    own = scores_of(kind(judge.condenser), judge, timeout=0.5 if kind in (Slow, Stuck) else 60.0)[0]
    assert own.scores[0].value == 0
    assert own.scores[0].why.startswith(why)
    told = verdict(tiers(), "research", [own, Examined("select", [Score(0.5)])], "a model")
    assert told["rows"][0]["invalid"] == {own.scores[0].why: 1}
    assert any("1 of 1 answers would be worth nothing" in line for line in lines(told))
    assert "A score of 0 earns nothing, whoever the other miners are." in lines(told)


def test_questions_that_people_asked_can_be_challenges(judge: Judge, tmp_path: Path) -> None:
    words = "The {0} tower stands near the {0} river and has {1} steps of pale stone. "
    paragraphs = [
        {"context": words.format(name, 100 + i) * 9, "qas": [{"question": f"How many steps has the {name} tower?",
         "answers": [{"text": str(100 + i), "answer_start": words.format(name, 100 + i).index(str(100 + i))}]}]}
        for i, name in enumerate(("Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel"))
    ]  # fmt: skip
    (tmp_path / "squad.json").write_text(
        json.dumps({"data": [{"title": str(i), "paragraphs": [p]} for i, p in enumerate(paragraphs)]})
    )
    known = tiers()
    supply = Supply(known, open_source(None), read_squad(tmp_path / "squad.json"), secret="s")
    asked = [one for one in (supply.make("research") for _ in range(12)) if " tower stands near the " in one.ask.text]
    assert len({one.ask.text for one in asked}) >= 3
    assert all("steps has the" in turn.question for one in asked for turn in one.pool if turn.kind != "cloze")
    assert all(1000 <= len(one.ask.text) <= 2500 for one in asked)


def test_a_share_goes_with_the_power_of_the_score() -> None:
    assert share(0.5, 0.5, 9, 2.0) == pytest.approx(0.1)
    assert share(0.4, 0.8, 1, 2.0) == pytest.approx(0.2)
    assert share(0.4, 0.8, 1, 1.0) == pytest.approx(1 / 3)
    assert share(0.4, 0.0, 9, 2.0) == 1.0
    assert share(0.0, 0.0, 9, 2.0) == 0.0


def test_a_verdict_is_a_table_and_sentences_of_the_same_figures() -> None:
    own = Examined(YOURS, [Score(0.4, 0.5, 1.0, 0.5, 0.6, 4.0, 0.2), Score(0.8, 0.9, 1.0, 0.9, 0.6, 8.0, 0.4)])
    told = verdict(tiers(), "research", [own, Examined("select", [Score(0.2), Score(0.4)])], "a model")
    row = told["rows"][0]
    assert row["score"] == pytest.approx(0.6)
    assert (row["interval"], row["ratio"], row["slowest"]) == (pytest.approx([0.4, 0.8]), 6.0, 0.4)
    assert told["share_beside"]["select"]["9"] == pytest.approx(0.36 / (0.36 + 9 * 0.09))
    table = as_table(told)
    assert [next(iter(column.cells)) for column in table.columns][:3] == [YOURS, "0.60 [0.40, 0.80]", "0.70"]
    said = "\n".join(lines(told))
    assert "took 0.40 s on this machine" in said
    assert "beside 9 that compress as `select` does, 31%" in said
    assert "100% of the incentive" in said


def test_a_machine_that_cannot_hold_the_model_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "free_memory", lambda device: 10**7)
    with pytest.raises(
        ValueError, match=r"'condense-tiny' needs 0\.0 GB as a whole in float32, and cpu has 0\.0 GB free"
    ):
        opened.open_judge(EMBEDDED_NAME, device="cpu")


def test_a_tier_that_is_not_served_is_refused() -> None:
    other = read_tiers()  # Mistral's
    choice = BackendChoice(model=str(embedded_model_path()), threads=1)
    with pytest.raises(
        ValueError, match=r"tier: 'research' is not served by this backend, expected the model mistralai"
    ):
        asyncio.run(examined(choice, other, ["research"], rounds=1))
    with pytest.raises(ValueError, match=r"backend: it serves no tier, expected the model mistralai"):
        asyncio.run(examined(choice, other, rounds=1))
