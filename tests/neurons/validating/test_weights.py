"""Weights: set once an epoch shortly before its end, tried again where that helps, and said where it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from condense_core.neurons.chain.errors import NotAuthorized
from condense_core.neurons.tiers import read_tiers
from condense_core.neurons.validating.ledger import Ledger
from condense_core.neurons.validating.weights import WeightSetter
from condense_testing.chains import World, key
from condense_testing.subnets import played_round

ROUND = {key("miner1").ss58_address: 0.8, key("miner2").ss58_address: 0.4}


class Ended(Exception):
    """Enough was seen."""


def ledger(folder: Path, rounds: int = 4) -> Ledger:
    made = Ledger(folder)
    for _ in range(rounds):
        made.record(played_round(ROUND))
    return made


async def seen(setter: WeightSetter, chain: Any) -> None:
    with pytest.raises(Ended):
        await setter.run()
    await chain.close()


def other_consensus(world: World) -> None:
    """Only the validator with the most stake sets weights, and that is another."""
    world.net.consensus_mode = "Null"
    world.chain.register(7, key("larger").ss58_address, stake=5000, permit=True)
    world.net.neurons[0].permit = False


def test_weights_are_set_once_an_epoch_before_it_ends(tmp_path: Path) -> None:
    async def run() -> None:
        world = World({"tempo": 360})
        chain, own = world.sees(world.validator, max_age=0.0), ledger(tmp_path)
        when: list[int] = []

        async def sleep(seconds: float) -> None:
            row = world.net.weights.get((0, 0))
            when.append(world.chain.block if row is not None and not when else -1)
            if len(when) > 6:
                raise Ended
            world.chain.advance(round(seconds / 12))

        setter = WeightSetter(chain, own, read_tiers(), sleep=sleep)
        updates = []

        async def told(seconds: float) -> None:
            updates.append((world.chain.block, world.net.neurons[0].last_update[0]))
            await sleep(seconds)

        setter._sleep = told
        await seen(setter, chain)
        set_at = sorted({at for _, at in updates})[1:]  # the first is of its registration
        assert len(set_at) >= 2
        for block in set_at:
            assert 0 < (world.net.last_epoch - block) % 360 <= 21
        assert all(abs(later - earlier - 360) <= 2 for earlier, later in pairwise(set_at))
        row = world.net.weights[0, 0]
        assert row[1] / row[2] == pytest.approx(4, rel=0.01)  # 0.8^2 to 0.4^2
        assert own.rows("SELECT count(*) FROM weights") == [(len(set_at),)]
        assert setter.waiting == ""

    asyncio.run(run())


def refused(tmp_path: Path, prepare: Callable[[World], None], **sees: Any) -> tuple[list[float], WeightSetter, World]:
    """What the setter waits, from shortly before an epoch's end, where the chain refuses at first."""
    world = World({"tempo": 360})
    waits: list[float] = []

    async def run() -> WeightSetter:
        chain, own = world.sees(world.validator, max_age=0.0, **sees), ledger(tmp_path)
        left = world.net.next_epoch
        assert left is not None
        world.chain.advance(left - world.chain.block - 10)
        prepare(world)

        async def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                raise Ended
            world.chain.advance(round(seconds / 12))

        setter = WeightSetter(chain, own, read_tiers(), sleep=sleep)
        await seen(setter, chain)
        return setter

    return waits, asyncio.run(run()), world


def test_a_refusal_that_passes_is_waited_out(tmp_path: Path) -> None:
    def too_fast(world: World) -> None:
        world.net.neurons[0].last_update[0] = world.chain.block - 97

    waits, setter, world = refused(tmp_path, too_fast)
    assert waits[0] == pytest.approx(3 * 12, abs=12)  # three blocks of the rate limit
    assert world.net.weights[0, 0]
    assert setter.waiting == ""


def test_a_refusal_that_stays_is_said_and_looked_at_later(tmp_path: Path) -> None:
    waits, setter, world = refused(tmp_path, other_consensus)
    assert waits[0] == 900.0
    assert (0, 0) not in world.net.weights
    assert setter.waiting != ""
    assert "trying again in 900 s" in setter.waiting


def test_software_that_is_too_old_for_the_subnet_says_so(tmp_path: Path) -> None:
    def newer(world: World) -> None:
        world.net.version_key = 99

    waits, setter, world = refused(tmp_path, newer)
    assert waits[0] == 900.0
    assert "expected 99 or more" in setter.waiting
    assert (0, 0) not in world.net.weights


def test_where_nobody_has_earned_anything_the_row_stays(tmp_path: Path) -> None:
    async def run() -> None:
        world = World()
        chain, own = world.sees(world.validator), Ledger(tmp_path)
        setter = WeightSetter(chain, own, read_tiers())
        assert await setter.set_once() is None
        own.record(played_round(dict.fromkeys(ROUND, 0.0)))
        assert await setter.set_once() is None
        assert (0, 0) not in world.net.weights
        await chain.close()

    asyncio.run(run())


def test_who_may_not_set_weights_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        world = World()
        other_consensus(world)
        chain, own = world.sees(world.validator), ledger(tmp_path)
        with pytest.raises(NotAuthorized):
            await WeightSetter(chain, own, read_tiers()).set_once()
        await chain.close()

    asyncio.run(run())
