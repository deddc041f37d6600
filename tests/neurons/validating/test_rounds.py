"""Supply and rounds: what is asked is ready before it is needed, and what was judged can be judged again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from condense_core.compressor.condenser import Condenser
from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.asking.client import Peer, Reply
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.judging.supply import AHEAD, Supply
from condense_core.neurons.tiers import Tiers, read_tiers
from condense_core.neurons.validating.ledger import Ledger
from condense_core.neurons.validating.loop import tiers_in_turn
from condense_core.neurons.validating.replay import replayed
from condense_core.neurons.validating.rounds import Round, play
from condense_core.tasks.generators import Turn
from condense_core.tasks.sources import ListSource, ProseWriter
from condense_core.tasks.squad import Paragraph
from condense_testing.arena import readable_challenge

TIERS = read_tiers()
TIER = TIERS.tiers["research"]


def paragraphs(count: int = 40) -> list[Paragraph]:
    """Of 400 characters, each with a question that nothing else answers."""
    return [
        Paragraph(
            n,
            f"The keeper number {n} is Mr {n}{n}. " + f"He counts {n} lamps. " * 18,
            (Turn(f"Who {n}?", f"Mr {n}{n}", "x"),),
        )
        for n in range(count)
    ]


def test_challenges_wait_before_they_are_asked_for() -> None:
    async def run() -> None:
        supply = Supply(TIERS, ProseWriter(), secret="s")
        first = await supply.next("research")
        for _ in range(100):
            if supply._waiting["research"].full():
                break
            await asyncio.sleep(0.05)
        assert supply._waiting["research"].qsize() == AHEAD
        again = Supply(TIERS, ProseWriter(), secret="s")
        assert first == again.make("research")
        assert await supply.next("research") == again.make("research")
        assert first.ask.tier == "research"
        await supply.aclose()

    asyncio.run(run())


def test_both_kinds_of_challenges_come_and_no_two_are_alike() -> None:
    supply = Supply(TIERS, ProseWriter(), paragraphs(), secret="s")
    made = [supply.make("research") for _ in range(40)]
    asked = sum("keeper number" in one.ask.text for one in made)
    assert 8 < asked < 32
    assert len({one.ask.text for one in made}) == 40
    for one in made:
        one.ask.tier_of(TIERS)  # keeps to its limits
        assert len(one.pool) >= 2
    other = Supply(TIERS, ProseWriter(), paragraphs(), secret="t")
    assert {one.ask.text for one in made}.isdisjoint(other.make("research").ask.text for _ in range(40))


def test_questions_that_fit_no_tier_leave_the_running_text() -> None:
    long = [Paragraph(0, "x" * 9000, (Turn("q", "x", "x"),))]
    assert Supply(TIERS, ProseWriter(), long).make("research").ask.text


def test_a_text_that_cannot_be_read_any_more_is_said_and_ends_nothing(tmp_path: Path) -> None:
    class Gone:
        def __len__(self) -> int:
            return 3

        def document(self, index: int) -> str:
            raise OSError("the disk is gone")

    async def run() -> None:
        supply = Supply(TIERS, Gone())
        for _ in range(3):
            with pytest.raises(OSError, match="the disk is gone"):
                await supply.next("research")
        await supply.aclose()

    asyncio.run(run())


def test_tiers_without_a_share_come_now_and_then() -> None:
    shares = {"research": 1.0, "inference_0": 0.0}
    turns = [tiers_in_turn(shares, number) for number in range(8)]
    assert [len(turn) for turn in turns] == [2, 1, 1, 1, 2, 1, 1, 1]
    assert all("research" in turn for turn in turns)


# -- with the embedded model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiers() -> Tiers:
    one = TIER.model_copy(update={"model": "condense-tiny", "max_chars": 1400})
    return TIERS.model_copy(update={"tiers": {"research": one}})


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Condenser.from_pretrained(embedded_model_path(), method="pool"))


class Compressing:
    """Peers that answer with what a function makes of the honest answer."""

    def __init__(self, judge: Judge, changes: dict[str, Any]) -> None:
        self.judge, self.changes = judge, changes

    def serving(self, _: str) -> list[Peer]:
        return [Peer(name, "127.0.0.1:1", uid) for uid, name in enumerate(self.changes)]

    async def ask(self, peer: Peer, ask: Any, **_: Any) -> Reply:
        change = self.changes[peer.hotkey]
        if change is None:
            return Reply(b"", 8.0, "late: 8 s")
        trained = next(ratio for ratio in self.judge.condenser.config.ratios if ratio >= ask.ratio)
        soft = self.judge.condenser.compress(ask.text, trained)
        return Reply(change(soft), 0.5, "", 200)


def noisy(soft: Any) -> bytes:
    noise = torch.randn(soft.embeds.shape, generator=torch.Generator().manual_seed(0)) * soft.embeds.std()
    return replace(soft, embeds=soft.embeds + 4 * noise).to_bytes()  # nothing of it is left


@pytest.fixture(scope="module")
def played(judge: Judge, tiers: Tiers) -> Round:
    peers: Any = Compressing(
        judge,
        {
            "honest": lambda soft: soft.to_bytes(),
            "copier": lambda soft: replace(soft, embeds=2 * soft.embeds.flip(0)).to_bytes(),
            "noisy": noisy,
            "invalid": lambda soft: soft.to_bytes()[:-4],
            "late": None,
        },
    )
    made = readable_challenge(tiers, "research", secret="round", index=0)
    made = replace(made, ask=made.ask.model_copy(update={"ratio": 8.0}))  # more than can be kept without work
    return asyncio.run(play("research", tiers.tiers["research"], made, judge, peers, [Peer("gone", "", 9)]))


def test_a_round_pays_what_answers_are_worth(played: Round) -> None:
    found = {outcome.hotkey: outcome for outcome in played.outcomes}
    assert set(found) == {"honest", "copier", "noisy", "invalid", "late", "gone"}
    assert found["honest"].value > 0
    assert found["honest"].share + found["copier"].share == pytest.approx(1.0)
    best = max(found["honest"].score.value, found["copier"].score.value)
    assert found["honest"].value + found["copier"].value <= best
    assert found["noisy"].value == 0.0
    assert found["invalid"].score.why.startswith("answer: ")
    assert found["late"].score.why == "late: 8 s"
    assert found["gone"].score.why == "not there"
    assert [found[name].value for name in ("invalid", "late", "gone")] == [0.0] * 3
    assert played.counts
    assert len(played.turns) == TIER.questions


def test_a_round_is_computed_again_from_its_log(played: Round, judge: Judge, tiers: Tiers, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    kept = ledger.round(ledger.record(played))
    rows = replayed(kept, judge, tiers.tiers["research"])
    assert all(row["agrees"] for row in rows)
    assert {row["hotkey"]: row["then"] for row in rows} == {h: round(v, 6) for h, v in played.values.items()}
    first = next(o for o in kept.outcomes if o.hotkey == "honest")
    changed = replace(first, score=replace(first.score, value=0.123))
    forged = replace(kept, outcomes=(changed, *(o for o in kept.outcomes if o.hotkey != "honest")))
    assert [row["hotkey"] for row in replayed(forged, judge, tiers.tiers["research"]) if not row["agrees"]] == [
        "honest"
    ]
    with pytest.raises(ValueError, match="the answers of 4 miners are not kept any more"):
        replayed(replace(kept, bodies={}), judge, tiers.tiers["research"])


def test_running_text_of_short_documents_serves_as_well(tiers: Tiers) -> None:
    source = ListSource([f"Short text number {n} tells of {n} lamps. " * 5 for n in range(30)])
    assert Supply(tiers, source).make("research").ask.text
