"""The SDK's own client over the chain in memory: what is read, what is written, and how the chain refuses."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")

from condense_core.neurons.chain import errors
from condense_core.neurons.chain.sdk import Backoff, SdkChain
from condense_testing.chains import NETUID, World, key


def test_the_base_does_not_load_the_sdk() -> None:
    modules = "condense_core.neurons.chain.base, condense_core.neurons.chain.sdk"
    code = f"import sys, {modules}; print('bittensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


# -- reads -------------------------------------------------------------------------------------------------------------


def test_rows_of_the_metagraph_are_what_the_chain_holds() -> None:
    world = World()
    world.chain.set_stake(NETUID, key("miner2").ss58_address, 2.5)

    async def run() -> Any:
        return await world.sees().metagraph()

    graph = asyncio.run(run())
    assert (graph.netuid, graph.block, graph.tempo) == (NETUID, 101, 360)
    assert [neuron.uid for neuron in graph.neurons] == [0, 1, 2, 3]
    assert graph.by_hotkey[key("miner2").ss58_address].stake == 2.5
    first = graph.neurons[0]
    assert (first.hotkey, first.stake, first.validator_permit) == (world.validator.ss58_address, 1000.0, True)
    assert (first.address, first.last_update, first.registered_at) == (None, 1, 1)
    assert graph.validators == (first,)


@pytest.mark.parametrize(("passed", "since", "until"), [(0, 100, 260), (259, 359, 1), (260, 0, 360), (261, 1, 359)])
def test_epochs_are_counted_in_blocks(passed: int, since: int, until: int) -> None:
    world = World()
    world.chain.advance(passed)

    async def run() -> Any:
        chain = world.sees()
        return await chain.metagraph(), await chain.blocks_until_epoch()

    graph, left = asyncio.run(run())
    assert (graph.blocks_since_epoch, graph.blocks_until_epoch, left) == (since, until, until)


def test_a_subnet_that_is_not_there_is_final() -> None:
    world = World()
    del world.chain.subnets[NETUID]

    async def run() -> None:
        await world.sees().metagraph()

    with pytest.raises(errors.NoSubnet, match=f"netuid is {NETUID}, expected a subnet"):
        asyncio.run(run())


def test_a_metagraph_is_kept_as_long_as_it_is_good_enough() -> None:
    world, now = World(), [0.0]

    async def run() -> None:
        chain = world.sees(clock=lambda: now[0], max_age=60.0)
        assert chain.age is None
        first = await chain.metagraph()
        world.chain.advance()
        now[0] = 60.0
        assert (await chain.metagraph()) is first
        assert chain.age == 60.0
        assert (await chain.metagraph(max_age=59)).block == first.block + 1
        world.chain.advance()
        now[0] = 121.0
        assert (await chain.metagraph()).block == first.block + 2

    asyncio.run(run())


def test_many_who_ask_at_once_share_the_fetches() -> None:
    """Who asked before a fetch began takes its result. All but the first ask while it fetches: two suffice."""
    world = World()

    async def run() -> None:
        chain = world.sees()
        await asyncio.gather(*(chain.metagraph(max_age=0) for _ in range(20)))

    asyncio.run(run())
    assert world.node.requests.count("runtime") == 2 * 2  # a fetch reads the metagraph and the next epoch


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_on_the_chain_in_the_proportions_asked_for() -> None:
    world = World()

    async def run() -> Any:
        return await world.sees(world.validator).set_weights({1: 3.0, 2: 1.0, 3: 0.0})

    done = asyncio.run(run())
    # The SDK scales the largest to 65535 and leaves zeros out; 65535 / 3 is whole.
    assert world.net.weights == {(0, 0): {1: 65535, 2: 21845}}
    assert (done.sent, done.weights, done.block) == (True, {1: 0.75, 2: 0.25}, 101)


def test_weights_whose_sum_is_no_number_any_more_keep_their_proportions() -> None:
    world = World()

    async def run() -> None:
        await world.sees(world.validator).set_weights({1: 1.5e308, 2: 1.5e308})

    asyncio.run(run())
    assert world.net.weights == {(0, 0): {1: 65535, 2: 65535}}


@pytest.mark.parametrize("weights", [{}, {1: 0.0, 2: 0.0}])
def test_weights_of_zero_leave_the_row_and_send_nothing(weights: dict[int, float]) -> None:
    world = World(settings={"weights_rate_limit": 0})

    async def run() -> Any:
        chain = world.sees(world.validator)
        await chain.set_weights({1: 1.0})
        world.node.requests.clear()
        return await chain.set_weights(weights)

    done = asyncio.run(run())
    assert not done.sent
    assert "all weights are zero" in done.reason
    assert world.node.requests == []
    assert world.net.weights == {(0, 0): {1: 65535}}


@pytest.mark.parametrize(
    ("weights", "says"),
    [({1: -1.0}, r"weights\[1\] is -1.0"), ({1: float("nan")}, r"weights\[1\] is nan"), ({-1: 1.0}, "the uid -1")],
)
def test_weights_that_are_none_are_refused_before_anything_is_sent(weights: dict[int, float], says: str) -> None:
    world = World()

    async def run() -> None:
        await world.sees(world.validator).set_weights(weights)

    with pytest.raises(errors.InvalidRequest, match=says):
        asyncio.run(run())
    assert world.node.requests == []


def test_a_second_row_within_the_rate_limit_is_told_when_to_come_again() -> None:
    world = World()

    async def run() -> None:
        chain = world.sees(world.validator)
        await chain.set_weights({1: 1.0})
        world.chain.advance(40)
        with pytest.raises(errors.RateLimited) as caught:
            await chain.set_weights({2: 1.0})
        assert (caught.value.retry_blocks, caught.value.retry_after) == (60, 720.0)
        assert "\n" not in str(caught.value)
        world.chain.advance(60)
        assert (await chain.set_weights({2: 1.0})).sent

    asyncio.run(run())
    assert world.net.weights == {(0, 0): {2: 65535}}


def test_weights_for_a_uid_that_changed_hands_are_left_out() -> None:
    world = World(settings={"max_uids": 4, "immunity_period": 0})

    async def run() -> Any:
        chain = world.sees(world.validator)
        meant = {neuron.uid: neuron.hotkey for neuron in (await chain.metagraph()).neurons}
        uid = world.chain.register(NETUID, key("newcomer").ss58_address)
        assert uid in (1, 2, 3)  # never the validator's
        weights = {1: 1.0, 2: 1.0, 3: 2.0}
        return uid, await chain.set_weights(weights, hotkeys=meant)

    uid, done = asyncio.run(run())
    assert list(done.dropped) == [uid]
    assert uid not in done.weights
    assert set(world.net.weights[0, 0]) == {1, 2, 3} - {uid}


def test_a_second_mechanism_has_rows_and_a_rate_limit_of_its_own() -> None:
    world = World(settings={"mechanisms": 2})

    async def run() -> None:
        assert (await world.sees(world.validator).set_weights({1: 1.0})).sent
        assert (await world.sees(world.validator, mechid=1).set_weights({2: 1.0})).sent
        with pytest.raises(errors.RateLimited):
            await world.sees(world.validator, mechid=1).set_weights({2: 1.0})
        with pytest.raises(errors.NoSubnet, match="mechid is 2"):
            await world.sees(world.validator, mechid=2).set_weights({2: 1.0})

    asyncio.run(run())
    assert world.net.weights == {(0, 0): {1: 65535}, (1, 0): {2: 65535}}


def test_hidden_weights_are_committed_and_the_eleventh_commit_waits() -> None:
    pytest.importorskip("bittensor_core")
    world = World(settings={"commit_reveal": True, "weights_rate_limit": 0})

    async def run() -> None:
        chain = world.sees(world.validator)
        for _ in range(10):
            done = await chain.set_weights({1: 1.0})
            assert done.sent
            assert done.reveal_round is not None
        with pytest.raises(errors.TooManyCommits) as caught:
            await chain.set_weights({1: 1.0})
        assert caught.value.retry_blocks == await chain.blocks_until_epoch()

    asyncio.run(run())
    assert world.net.weights == {}
    assert len(world.net.commits) == 10


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(world: World, wallet: Any = None, weights: Any = None, **more: Any) -> errors.ChainFailure:
    """The error with which the chain refuses to set weights."""

    async def run() -> None:
        await world.sees(wallet or world.validator, **more).set_weights(weights or {1: 1.0})

    with pytest.raises(errors.ChainFailure) as caught:
        asyncio.run(run())
    assert "\n" not in str(caught.value)
    assert world.net.weights == {}
    return caught.value


def test_a_hotkey_that_is_not_registered_is_final() -> None:
    error = refused(World(), key("stranger"))
    assert isinstance(error, errors.NotRegistered)
    assert key("stranger").ss58_address in str(error)


def test_a_hotkey_without_a_permit_is_not_authorized() -> None:
    error = refused(World(), key("miner1"), {2: 1.0})
    assert isinstance(error, errors.NotAuthorized)
    assert error.name == "NeuronNoValidatorPermit"


def test_where_one_validator_alone_sets_weights_the_others_are_not_authorized() -> None:
    world = World(settings={"consensus_mode": "Null", "tempo": 100})  # the epoch ended as the world began
    richer = key("richer").ss58_address
    world.chain.register(NETUID, richer, stake=2000)
    world.chain.advance(100)
    assert [neuron.permit for neuron in world.net.neurons] == [False, False, False, False, True]
    error = refused(world)
    assert isinstance(error, errors.NotAuthorized)
    assert error.name == ""  # of the SDK's preflight: no transaction was signed
    assert "submit" not in world.node.requests


@pytest.mark.parametrize(("ours", "theirs", "taken"), [(3, 3, True), (4, 3, True), (2, 3, False), (0, 0, True)])
def test_the_version_must_not_be_older_than_the_subnets(ours: int, theirs: int, taken: bool) -> None:
    world = World(settings={"version_key": theirs})
    if not taken:
        error = refused(world, version_key=ours)
        assert isinstance(error, errors.WrongVersion)
        assert f"version_key is {ours}, expected {theirs} or more" in str(error)
        assert "submit" not in world.node.requests
        return

    async def run() -> None:
        assert (await world.sees(world.validator, version_key=ours).set_weights({1: 1.0})).sent

    asyncio.run(run())


NAMES = [
    ("IncorrectWeightVersionKey", errors.WrongVersion),
    ("HotKeyNotRegisteredInSubNet", errors.NotRegistered),
    ("NeuronNoValidatorPermit", errors.NotAuthorized),
    ("NotEnoughStakeToSetWeights", errors.NotAuthorized),
    ("UidVecContainInvalidOne", errors.InvalidRequest),
    ("MaxWeightExceeded", errors.InvalidRequest),
    ("SubnetNotExists", errors.NoSubnet),
    ("CommitRevealEnabled", errors.OtherRefusal),
    ("NobodyKnowsThisOne", errors.OtherRefusal),
    ("SettingWeightsTooFast", errors.RateLimited),
    ("CommittingWeightsTooFast", errors.RateLimited),
    ("TooManyUnrevealedCommits", errors.TooManyCommits),
    ("CommitQueueFull", errors.TooManyCommits),
    ("Stale", errors.PoolRefused),
    ("AncientBirthBlock", errors.PoolRefused),
]


@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_the_chains_names_are_told_apart(name: str, kind: type[errors.ChainFailure]) -> None:
    world = World()
    world.chain.refuse_next(name)
    error = refused(world)
    assert type(error) is kind
    assert error.name == name
    if isinstance(error, errors.TemporaryRefusal):
        assert error.retry_blocks
        assert error.retry_after == error.retry_blocks * 12.0


@pytest.mark.parametrize("weights", [{9: 1.0}, {1: 1.0, 200: 1.0}])
def test_a_uid_that_nobody_has_is_an_invalid_request(weights: dict[int, float]) -> None:
    assert isinstance(refused(World(), weights=weights), errors.InvalidRequest)


def test_fewer_weights_than_the_subnet_asks_for_is_an_invalid_request() -> None:
    error = refused(World(settings={"min_allowed_weights": 2}))
    assert isinstance(error, errors.InvalidRequest)


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ip", "seen"), [("203.0.113.7", "203.0.113.7:8091"), ("2001:db8:0::1", "[2001:db8::1]:8091")])
def test_an_announced_address_is_in_the_metagraph(ip: str, seen: str) -> None:
    world = World()

    async def run() -> None:
        miner = world.sees(key("miner1"))
        assert await miner.announce(ip, 8091)
        graph = await world.sees().metagraph()
        assert [neuron.address for neuron in graph.neurons] == [None, seen, None, None]
        assert not await miner.announce(ip, 8091)  # already there: no second transaction
        assert world.node.requests.count("submit") == 1
        with pytest.raises(errors.RateLimited) as caught:
            await miner.announce(ip, 8092)
        assert caught.value.retry_blocks == 50
        world.chain.advance(50)
        assert await miner.announce(ip, 8092)

    asyncio.run(run())


@pytest.mark.parametrize(("ip", "port"), [("localhost", 1), ("0.0.0.0", 1), ("203.0.113.7", 0), ("203.0.113.7", 65536)])
def test_what_is_no_address_is_refused(ip: str, port: int) -> None:
    async def run() -> None:
        await World().sees(key("miner1")).announce(ip, port)

    with pytest.raises(errors.InvalidRequest, match=r"ip is 'localhost'|the address is"):
        asyncio.run(run())


def test_a_uid_that_changes_hands_loses_its_address() -> None:
    world = World()

    async def run() -> None:
        await world.sees(key("miner1")).announce("203.0.113.7", 8091)
        world.chain.hand_over(NETUID, 1, key("newcomer").ss58_address)
        graph = await world.sees().metagraph()
        assert (graph.neurons[1].hotkey, graph.neurons[1].address) == (key("newcomer").ss58_address, None)
        assert key("miner1").ss58_address not in graph.by_hotkey

    asyncio.run(run())


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_wallet_without_a_coldkey_sets_weights_and_announces(tmp_path: Path) -> None:
    from bittensor import Wallet

    world = World()
    wallet = Wallet("cold", "hot", path=str(tmp_path))
    wallet.create_new_hotkey(use_password=False, overwrite=True)
    world.chain.register(NETUID, wallet.hotkey.ss58_address, stake=5, permit=True)
    world.chain.advance(100)
    assert not (tmp_path / "cold" / "coldkey").exists()

    async def run() -> None:
        chain = world.sees(wallet)
        assert (await chain.set_weights({1: 1.0})).sent
        assert await chain.announce("203.0.113.7", 8091)

    asyncio.run(run())


def test_a_chain_without_a_wallet_is_only_read() -> None:
    async def run() -> None:
        await World().sees().set_weights({1: 1.0})

    with pytest.raises(errors.InvalidRequest, match="wallet is None"):
        asyncio.run(run())


def test_no_chain_at_the_address_is_final() -> None:
    async def run() -> None:
        # Port 1 of this machine: nobody listens there.
        chain = SdkChain("ws://127.0.0.1:1", NETUID, backoff=Backoff(attempts=2, first=0.01, most=0.01))
        try:
            await chain.block()
        finally:
            await chain.close()

    with pytest.raises(errors.NoChain, match=r"no chain at 'ws://127.0.0.1:1'.*tried 2 times"):
        asyncio.run(run())
