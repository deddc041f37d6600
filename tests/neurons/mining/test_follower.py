"""A miner follows the chain: its gate hears who may ask, others find it, and trouble passes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from condense_core.neurons.chain.errors import ConnectionLost, NotRegistered
from condense_core.neurons.mining.follower import Follower
from condense_core.neurons.mining.gate import Forbidden, Gate
from condense_testing.chains import World, key


class Stop(Exception):
    """The test has seen enough."""


def follow(world: World, gate: Gate, looks: int, address: Any = None, between: Any = lambda look: None) -> list[float]:
    """Start and look so many times; returns how long it waited before each look."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > looks:
            raise Stop
        between(len(waits))

    async def use() -> None:
        chain = world.sees(key("miner1"), max_age=0.0)
        follower = Follower(chain, gate, address, sleep=sleep)
        await follower.start()
        with pytest.raises(Stop):
            await follower.run()
        await chain.close()

    asyncio.run(use())
    return waits


def test_the_gate_hears_who_may_ask() -> None:
    world, gate = World(), Gate()
    follow(world, gate, 0)
    assert gate.check(world.validator.ss58_address) == 9
    with pytest.raises(Forbidden):
        gate.check(key("miner2").ss58_address)


def test_an_address_is_announced_and_again_when_it_changes() -> None:
    world = World({"serving_rate_limit": 0})
    ports = [8091, 8091, 8092]
    seen: list[int | None] = []

    def look(_: int) -> None:
        seen.append(world.net.neurons[1].axon.get("port"))
        world.chain.advance(1)

    follow(world, Gate(), 3, lambda: ("10.1.2.3", ports[min(len(seen), 2)]), look)
    assert seen == [8091, 8091, 8092]


def test_a_hotkey_without_a_uid_is_told_at_the_start() -> None:
    async def use() -> None:
        chain = World().sees(key("stranger"))
        with pytest.raises(NotRegistered, match="has no uid on subnet 7, expected a registered one"):
            await Follower(chain, Gate(), None).start()
        await chain.close()

    asyncio.run(use())


def test_trouble_is_waited_out_longer_each_time_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    world, gate = World(), Gate()
    from condense_core.neurons.chain.sdk import SdkChain

    metagraph, broken = SdkChain.metagraph, {2, 3, 4}
    calls = [0]

    async def sometimes(self: Any, *, max_age: float | None = None) -> Any:
        calls[0] += 1
        if calls[0] in broken:
            raise ConnectionLost("the chain does not answer")
        return await metagraph(self, max_age=max_age)

    monkeypatch.setattr(SdkChain, "metagraph", sometimes)
    assert follow(world, gate, 4) == [60.0, 120.0, 240.0, 480.0, 60.0]


def test_a_miner_that_lost_its_uid_goes_on_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    from condense_core.neurons.chain.sdk import SdkChain

    async def refused(self: Any, *, max_age: float | None = None) -> Any:
        raise NotRegistered("the hotkey has no uid")

    def lose(look: int) -> None:
        if look == 1:
            monkeypatch.setattr(SdkChain, "metagraph", refused)

    assert follow(World(), Gate(), 2, between=lose) == [60.0, 600.0, 600.0]
