"""The validator's loop: who is asked, what is counted, and that nothing that goes wrong ends it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from condense_core.neurons.asking.client import Peer, Reply
from condense_core.neurons.asking.peers import Peers
from condense_core.neurons.chain.errors import ConnectionLost
from condense_core.neurons.chain.sdk import SdkChain
from condense_core.neurons.incentive.score import Score, failed
from condense_core.neurons.judging.audits import AuditSpool
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.judging.supply import Supply
from condense_core.neurons.protocol.identity import Identity
from condense_core.neurons.protocol.messages import VERSION, Ask, MessageError
from condense_core.neurons.tiers import read_tiers
from condense_core.neurons.validating.ledger import Ledger, LedgerError
from condense_core.neurons.validating.loop import NoMiners, Validator
from condense_core.tasks.sources import ProseWriter
from condense_testing.chains import NETUID, World, key

TIERS = read_tiers()
MODEL = TIERS.tiers["research"].model
KEY = X25519PrivateKey.generate()


class Miners:
    """Answers in the name of all miners: a body that says what it is worth."""

    def __init__(self, worth: Mapping[str, float | None]) -> None:
        """worth: by name of the key; None: it serves nothing."""
        self.worth = {key(name).ss58_address: value for name, value in worth.items()}
        self.asked: list[tuple[str, Ask]] = []

    async def identity(self, peer: Peer, *, timeout: float = 5.0) -> Identity:
        if self.worth.get(peer.hotkey) is None:
            raise MessageError("identity: not reached")
        return Identity.of(peer.hotkey, ["research"], KEY, VERSION)

    async def ask(self, peer: Peer, ask: Ask, **limits: Any) -> Reply:
        self.asked.append((peer.hotkey, ask))
        worth = self.worth[peer.hotkey]
        return Reply(str(worth).encode(), 0.5, "", 200) if worth else Reply(b"", 8.0, "late: 8 s")

    async def aclose(self) -> None:
        pass


class Reader:
    """A judge that believes what a body says."""

    broken: Exception | None = None

    def telling(self, challenge: Challenge, questions: int) -> Challenge:
        return challenge

    def scores(self, answers: Mapping[str, tuple[bytes, float]], *_: Any) -> dict[str, tuple[Score, None]]:
        if self.broken is not None:
            raise self.broken
        return {hotkey: (Score(float(body), seconds=seconds), None) for hotkey, (body, seconds) in answers.items()}

    def score(self, body: bytes, ask: Ask, tier: Any, turns: Sequence[Any], seconds: float) -> tuple[Score, None]:
        return (Score(float(body)) if body else failed("answer: none")), None


async def announced(world: World, *names: str) -> None:
    """Give miners an address; an SDK chain for each, as they would."""
    for port, name in enumerate(names, 8000):
        chain = world.sees(key(name))
        await chain.announce("127.0.0.1", port)
        await chain.close()


def validator(world: World, miners: Miners, folder: Path, **more: Any) -> Validator:
    chain: SdkChain = world.sees(world.validator, max_age=0.0)
    judges: Any = {MODEL: Reader()}
    client: Any = miners
    supply = Supply(TIERS, ProseWriter())
    return Validator(chain, client, TIERS, judges, supply, Ledger(folder), look_seconds=0.0, **more)


async def ended(made: Validator) -> None:
    await made.supply.aclose()
    await made.chain.close()
    made.ledger.close()


def standing(made: Validator, name: str) -> float:
    return made.standing("research", key(name).ss58_address)


def test_every_miner_is_asked_in_every_round_a_new_one_from_the_first(tmp_path: Path) -> None:
    async def run() -> None:
        world, miners = World(), Miners({"miner1": 0.8, "miner2": 0.4, "miner3": None, "late": 0.6})
        await announced(world, "miner1", "miner2", "miner3")
        made = validator(world, miners, tmp_path)
        for _ in range(3):
            played = await made.round("research")
            assert len(played.outcomes) == 2  # the third does not say that it serves the tier
        world.chain.register(NETUID, key("late").ss58_address)
        await announced(world, "late")
        for _ in range(2):
            played = await made.round("research")
            assert {o.hotkey for o in played.outcomes} == {key(n).ss58_address for n in ("miner1", "miner2", "late")}
        asked = Counter(hotkey for hotkey, _ in miners.asked)
        assert asked == {key("miner1").ss58_address: 5, key("miner2").ss58_address: 5, key("late").ss58_address: 2}
        texts = [ask.text for _, ask in miners.asked]
        assert len(set(texts)) == 5  # one for all of a round, another in each
        assert standing(made, "miner1") > standing(made, "miner2") > 0
        await ended(made)

    asyncio.run(run())


def test_who_goes_away_fails_and_a_uid_that_changes_hands_begins_anew(tmp_path: Path) -> None:
    async def run() -> None:
        world, miners = World(), Miners({"miner1": 0.8, "miner2": 0.8, "heir": 0.5})
        await announced(world, "miner1", "miner2")
        made = validator(world, miners, tmp_path)
        for _ in range(4):
            await made.round("research")
        before = standing(made, "miner2")
        miners.worth[key("miner2").ss58_address] = None
        made.peers = Peers(made.client)  # as after some minutes
        played = await made.round("research")
        gone = next(o for o in played.outcomes if o.hotkey == key("miner2").ss58_address)
        assert (gone.value, gone.score.why) == (0.0, "not there")
        assert standing(made, "miner2") < before
        world.chain.hand_over(NETUID, 2, key("heir").ss58_address)
        await announced(world, "heir")
        played = await made.round("research")
        assert {o.uid for o in played.outcomes} == {1, 2}
        assert standing(made, "miner2") == 0.0
        assert made.ledger.standings.by_tier["research"][key("heir").ss58_address].rounds == 1
        await ended(made)

    asyncio.run(run())


def test_a_round_in_which_nobody_scored_changes_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        world, miners = World(), Miners({"miner1": 0.8, "miner2": 0.4})
        await announced(world, "miner1", "miner2")
        made = validator(world, miners, tmp_path)
        await made.round("research")
        before = made.ledger.standings
        miners.worth = dict.fromkeys(miners.worth, 0.0)
        played = await made.round("research")
        assert not played.counts
        assert made.ledger.standings == before
        await ended(made)

    asyncio.run(run())


def test_without_a_miner_there_is_no_round(tmp_path: Path) -> None:
    async def run() -> None:
        made = validator(World(), Miners({}), tmp_path)
        with pytest.raises(NoMiners, match="no miner of subnet 7 says that it serves research"):
            await made.round("research")
        await ended(made)

    asyncio.run(run())


def test_a_chain_that_is_away_for_a_while_stops_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        world, miners = World(), Miners({"miner1": 0.8})
        await announced(world, "miner1")
        made = validator(world, miners, tmp_path)

        async def away(**_: Any) -> Any:
            raise ConnectionLost("the chain does not answer")

        seen = made.chain.metagraph
        monkeypatch.setattr(made.chain, "metagraph", away)
        with pytest.raises(ConnectionLost):
            await made.round("research")
        monkeypatch.setattr(made.chain, "metagraph", seen)
        await made.round("research")
        monkeypatch.setattr(made.chain, "metagraph", away)
        assert (await made.round("research")).counts
        await ended(made)

    asyncio.run(run())


def test_it_goes_on_behind_whatever_goes_wrong_and_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        world, miners = World(), Miners({"miner1": 0.8})
        await announced(world, "miner1")
        waits: list[tuple[float, str]] = []

        async def sleep(seconds: float) -> None:
            waits.append((seconds, made.waiting))
            if len(waits) == 1:
                monkeypatch.setattr(made.ledger, "record", record)
                made.judges[MODEL].broken = RuntimeError("a secret text")
            else:
                made.judges[MODEL].broken = None
            await asyncio.sleep(0)

        made = validator(world, miners, tmp_path, sleep=sleep)
        record = made.ledger.record

        def full(_: Any) -> int:
            raise LedgerError("state: validator.db cannot be written (database or disk is full)")

        monkeypatch.setattr(made.ledger, "record", full)
        monkeypatch.setattr(made.setter, "run", lambda: asyncio.sleep(3600))
        await made.run(rounds=2, every=0.0)
        assert [seconds for seconds, _ in waits] == [2.0, 4.0]
        assert "disk is full" in waits[0][1]
        assert "a mistake of this software (RuntimeError at" in waits[1][1]
        assert "secret" not in waits[1][1]
        assert made.waiting == ""
        assert made.ledger.newest() == 2
        await ended(made)

    asyncio.run(run())


def test_it_ends_behind_the_round_that_runs(tmp_path: Path) -> None:
    async def run() -> None:
        world, miners = World(), Miners({"miner1": 0.8})
        await announced(world, "miner1")
        made = validator(world, miners, tmp_path)
        made.on_round = lambda _: made.stop()
        await asyncio.wait_for(made.run(every=3600.0), 20)
        assert made.ledger.newest() == 1
        await ended(made)

    asyncio.run(run())


@pytest.mark.parametrize(("value", "counted"), [(0.0, True), (0.3, True), (0.5, False), (1.0, False)])
def test_an_audit_counts_where_it_is_far_below_what_a_miner_usually_gets(
    tmp_path: Path, value: float, counted: bool
) -> None:
    async def run() -> None:
        world, miners = World(), Miners({"miner1": 0.8, "miner2": 0.8})
        await announced(world, "miner1", "miner2")
        spool = AuditSpool(tmp_path / "audits")
        made = validator(world, miners, tmp_path / "state", audits=spool)
        for _ in range(4):
            await made.round("research")
        before = standing(made, "miner1")
        assert before == pytest.approx(0.8)
        text = " ".join(f"The keeper number {n} of the north archive counts {n} old lamps at dusk." for n in range(40))
        spool.put(
            Ask(tier="research", text=text[:2400], ratio=4.0), key("miner1").ss58_address, str(value).encode(), 0.5
        )
        spool.put(Ask(tier="research", text=text[:2400], ratio=4.0), key("stranger").ss58_address, b"0.0", 0.5)
        made.on_round = lambda _: made.stop()
        await made.run(every=0.0)
        assert len(spool) == 0
        assert (standing(made, "miner1") < standing(made, "miner2")) == counted
        await ended(made)

    asyncio.run(run())
