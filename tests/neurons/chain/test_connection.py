"""Connections that break, calls that are cancelled, and everything that happens at the same time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")

from bittensor.result import ChainError, RpcPolicyError

from condense_core.neurons.chain import errors
from condense_core.neurons.chain.refusals import refusal
from condense_core.neurons.chain.sdk import Backoff
from condense_testing.chains import World, key


@pytest.mark.parametrize("drops", [1, 3])
def test_a_read_survives_dropped_connections_and_waits_longer_each_time(drops: int) -> None:
    world = World()

    async def run() -> None:
        chain = world.sees()
        await chain.block()
        world.node.drop(drops)
        assert len((await chain.metagraph()).neurons) == 4

    asyncio.run(run())
    assert world.slept == [1.0, 2.0, 4.0][:drops]


def test_a_connection_that_breaks_while_it_is_opened_is_opened_again() -> None:
    """The SDK reads the symbols of tokens when it connects: the connection is open by then, and breaks."""
    world = World()

    async def run() -> None:
        world.node.drop(method="query_map")
        assert await world.sees().block() == 101

    asyncio.run(run())
    assert world.slept == [1.0]


def test_attempts_are_bounded_and_the_last_error_is_temporary() -> None:
    world = World()

    async def run() -> None:
        chain = world.sees()
        await chain.block()
        world.node.drop(4)
        with pytest.raises(errors.ConnectionLost) as caught:
            await chain.block()
        assert caught.value.retry_after == 8.0
        assert await chain.block() == 101  # the next call opens the connection again

    asyncio.run(run())
    assert world.slept == [1.0, 2.0, 4.0]


def test_a_chain_that_never_answered_is_no_chain() -> None:
    world = World()

    async def run() -> None:
        world.node.drop(4)
        await world.sees().block()

    with pytest.raises(errors.NoChain):
        asyncio.run(run())


@pytest.mark.parametrize(("failures", "share", "wait"), [(1, 0.0, 0.5), (1, 1.0, 1.0), (4, 1.0, 8.0), (9999, 0.5, 7.5)])
def test_the_wait_doubles_up_to_a_bound_and_is_partly_random(failures: int, share: float, wait: float) -> None:
    assert Backoff(attempts=9, first=1.0, most=10.0).wait(failures, share) == wait


def test_a_node_that_does_not_answer_in_time_counts_as_lost() -> None:
    world = World()

    async def run() -> None:
        chain = world.sees(read_timeout=0.05)
        await chain.block()
        world.node.delay = 10.0
        with pytest.raises(errors.ConnectionLost):
            await chain.block()

    asyncio.run(run())


@pytest.mark.parametrize("after", [False, True])
def test_a_row_whose_answer_was_lost_is_on_the_chain_once(after: bool) -> None:
    """Sent again if the chain did not get it, and not refused for its own rate limit if it did."""
    world = World()

    async def run() -> None:
        chain = world.sees(world.validator)
        await chain.block()
        world.chain.advance()
        world.node.drop(method="submit", after=after)
        done = await chain.set_weights({1: 1.0})
        assert (done.sent, done.block) == (True, 102)

    asyncio.run(run())
    assert world.net.weights == {(0, 0): {1: 65535}}
    assert world.node.requests.count("submit") == (1 if after else 2)
    assert world.chain.nonces == {world.validator.ss58_address: 1}


@pytest.mark.parametrize("after", [False, True])
def test_an_address_whose_answer_was_lost_is_published_once(after: bool) -> None:
    world = World()

    async def run() -> None:
        chain = world.sees(key("miner1"))
        world.node.drop(method="submit", after=after)
        assert await chain.announce("203.0.113.7", 8091)

    asyncio.run(run())
    assert world.net.neurons[1].axon["port"] == 8091
    assert world.node.requests.count("submit") == (1 if after else 2)


def test_a_row_that_never_arrives_is_a_lost_connection() -> None:
    world = World()

    async def run() -> None:
        world.node.drop(4, method="submit")
        await world.sees(world.validator).set_weights({1: 1.0})

    with pytest.raises(errors.ConnectionLost):
        asyncio.run(run())
    assert world.net.weights == {}


def test_a_cancelled_row_leaves_the_chain_usable() -> None:
    world = World()

    async def run() -> None:
        chain = world.sees(world.validator)
        await chain.block()
        world.node.delay = 10.0
        slow = asyncio.create_task(chain.set_weights({1: 1.0}))
        queued = asyncio.create_task(chain.set_weights({2: 1.0}))
        await asyncio.sleep(0.05)
        slow.cancel()
        queued.cancel()
        results = await asyncio.gather(slow, queued, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2
        world.node.delay = 0.0
        assert (await chain.set_weights({3: 1.0})).sent
        assert (await chain.metagraph(max_age=0)).neurons[0].last_update == 101

    asyncio.run(run())
    assert world.net.weights == {(0, 0): {3: 65535}}


def test_a_cancelled_fetch_does_not_cancel_who_waits_for_it() -> None:
    world = World()

    async def run() -> None:
        chain = world.sees()
        await chain.block()
        world.node.delay = 0.05
        first = asyncio.create_task(chain.metagraph())
        second = asyncio.create_task(chain.metagraph())
        await asyncio.sleep(0.01)
        first.cancel()
        assert len((await second).neurons) == 4

    asyncio.run(run())


def test_rows_set_at_once_are_sent_one_after_another() -> None:
    world = World(settings={"weights_rate_limit": 0})

    async def run() -> None:
        chain = world.sees(world.validator)
        done = await asyncio.gather(*(chain.set_weights({uid: 1.0}) for uid in (1, 2, 3)))
        assert all(row.sent for row in done)

    asyncio.run(run())  # with one nonce for two of them the chain would have refused as Stale
    assert world.chain.nonces == {world.validator.ss58_address: 3}


def test_reads_go_on_while_a_row_is_sent() -> None:
    world = World()

    async def run() -> None:
        chain, sent = world.sees(world.validator), asyncio.Event()
        let_go = asyncio.Event()
        real = world.node.request

        async def slow(method: str, params: dict[str, object]) -> object:
            if method == "submit":
                sent.set()
                await let_go.wait()
            return await real(method, params)

        world.node.request = slow  # type: ignore[method-assign]
        row = asyncio.create_task(chain.set_weights({1: 1.0}))
        await sent.wait()
        assert len((await chain.metagraph(max_age=0)).neurons) == 4
        let_go.set()
        assert (await row).sent

    asyncio.run(run())


def test_a_second_event_loop_is_refused() -> None:
    chain = World().sees()
    assert asyncio.run(chain.block()) == 101
    with pytest.raises(RuntimeError, match="second event loop"):
        asyncio.run(chain.block())


def test_a_closed_chain_refuses_and_closes_again() -> None:
    async def run() -> None:
        chain = World().sees()
        await chain.block()
        await chain.close()
        await chain.close()
        await chain.block()

    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(run())


def test_a_break_in_the_middle_of_a_transaction_is_a_lost_connection() -> None:
    """The SDK's own backend raises it as a ``ChainError`` without a name or code."""

    def wrapped(cause: Exception) -> ChainError:
        try:
            raise ChainError(str(cause)) from cause
        except ChainError as error:
            return error

    assert isinstance(refusal(wrapped(ConnectionResetError("reset")), "x"), errors.ConnectionLost)
    assert isinstance(refusal(wrapped(TimeoutError("late")), "x"), errors.ConnectionLost)
    assert isinstance(refusal(wrapped(KeyError("x")), "x"), errors.OtherRefusal)


@pytest.mark.parametrize(("header", "seconds"), [("30", 30.0), (None, None), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_an_endpoint_that_limits_traffic_says_when_to_come_again(header: str | None, seconds: float | None) -> None:
    error = refusal(RpcPolicyError("too many requests", status_code=429, retry_after=header), "read")
    assert isinstance(error, errors.ConnectionLost)
    assert error.retry_after == seconds


def test_two_neurons_share_a_chain_in_one_process() -> None:
    world = World()

    async def run() -> None:
        validator, miner = world.sees(world.validator), world.sees(key("miner1"))
        await miner.announce("203.0.113.7", 8091)
        graph = await validator.metagraph()
        assert graph.by_hotkey[key("miner1").ss58_address].address == "203.0.113.7:8091"
        await validator.set_weights({1: 1.0})
        world.chain.advance(world.net.tempo)
        assert (await miner.metagraph(max_age=0)).neurons[1].incentive == 1.0

    asyncio.run(run())


def test_a_connection_to_the_chain_in_memory_leaves_no_file(no_files_at_home: Path) -> None:
    world = World()

    async def run() -> None:
        await world.sees().block()

    asyncio.run(run())
    assert not no_files_at_home.exists()
