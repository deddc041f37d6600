"""A clock that is off is found as far as blocks tell, whenever in a block it is looked at."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from condense_core.neurons.chain.clock import MOST, ClockWatch, WrongClock
from condense_testing.chains import World


@dataclass
class Blocks:
    """A chain with a block every 12 s, seen a second later, and a host whose clock is ``ahead``."""

    ahead: float = 0.0
    now: float = 1_000_000.0
    stands_still: bool = False
    behind: float = 1.0  # seconds until a block is seen

    async def block_time(self) -> float:
        return 12.0

    async def timestamp(self) -> float:
        seen = 1_000_000.0 if self.stands_still else self.now - self.behind
        return seen - seen % 12

    def watch(self) -> ClockWatch:
        async def sleep(seconds: float) -> None:
            self.now += seconds

        return ClockWatch(self, clock=lambda: self.now + self.ahead, sleep=sleep)


PHASES = [1_000_000.0 + second for second in range(0, 12, 3)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("ahead", [-9.0, -5.0, -1.0, 0.0, 1.0, 5.0, 9.0])
def test_a_clock_that_is_near_enough_passes_within_a_block(phase: float, ahead: float) -> None:
    blocks = Blocks(ahead, phase)
    asyncio.run(blocks.watch().check())
    assert blocks.now - phase <= 13


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("ahead", "words"), [(-13.0, "behind"), (-60.0, "behind"), (15.0, "ahead of"), (1e6, "ahead")])
def test_a_clock_that_is_off_is_refused_in_one_line(phase: float, ahead: float, words: str) -> None:
    with pytest.raises(
        WrongClock, match=f"clock: this host's is at least .* s {words}.*, expected at most 10 s"
    ) as told:
        asyncio.run(Blocks(ahead, phase).watch().check())
    assert "\n" not in str(told.value)
    said = float(str(told.value).split("at least ")[1].split(" s ")[0])
    assert MOST <= said <= abs(ahead) + 1


def test_a_chain_that_stands_still_ends_no_start() -> None:
    blocks = Blocks(0.0, 1_000_100.0, stands_still=True)
    asyncio.run(blocks.watch().check())
    assert blocks.now - 1_000_100.0 <= 2 * 12 + 3 + 1


def test_a_clock_that_goes_off_later_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    blocks, slept = Blocks(), [0.0]

    async def sleep(seconds: float) -> None:
        blocks.now += seconds
        slept[0] += seconds
        if slept[0] > 2000:
            raise asyncio.CancelledError
        if slept[0] > 1000:
            blocks.ahead = -60.0

    async def use() -> None:
        with pytest.raises(asyncio.CancelledError):
            await ClockWatch(blocks, clock=lambda: blocks.now + blocks.ahead, sleep=sleep).run()

    asyncio.run(use())
    told = [record.detail for record in caplog.records]
    assert len(told) == 2  # at 1200 and at 1800 s
    assert all("s behind the chain's" in line for line in told)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_the_sdk_reads_the_time_of_a_chain(offset: float) -> None:
    async def use() -> None:
        world = World()
        world.chain.set_time_offset(offset)
        chain = world.sees()
        watch = ClockWatch(chain, sleep=no_wait)
        if offset:
            with pytest.raises(WrongClock, match="at least 300 s behind the chain's"):
                await watch.check()
        else:
            await watch.check()
        await chain.close()

    asyncio.run(use())


async def no_wait(seconds: float) -> None:
    """Waits for nothing."""


def test_a_running_chain_dates_its_blocks() -> None:
    from condense_core.neurons.chain.memory import MemoryChain

    at = [100.0]
    chain: Any = MemoryChain(block_time=12.0, clock=lambda: at[0])
    first = chain.timestamp
    at[0] += 5
    assert chain.timestamp == pytest.approx(first - 5, abs=0.5)  # the same block, as the machine's clock went on by 0
    at[0] += 7
    assert chain.timestamp == pytest.approx(first, abs=0.5)
