"""The rules of the chain in memory: blocks, epochs, permits, consensus, uids that change hands. It needs no SDK."""

from __future__ import annotations

import json

import pytest

from condense_core.neurons.chain import calls, reads
from condense_core.neurons.chain.memory import MemoryChain, Refused

NETUID = 2


def chain_of(stakes: list[float], miners: int = 2, **settings: object) -> MemoryChain:
    """Validators ``v0, v1, ...`` with these stakes at the first uids, then miners ``m0, m1, ...``; no rate limits."""
    chain = MemoryChain()
    chain.create_subnet(NETUID, **{"weights_rate_limit": 0, "tempo": 10, **settings})
    for n, stake in enumerate(stakes):
        chain.register(NETUID, f"v{n}", stake=stake, permit=True)
    for n in range(miners):
        chain.register(NETUID, f"m{n}")
    chain.advance()
    return chain


def weigh(chain: MemoryChain, hotkey: str, row: dict[int, int]) -> None:
    params = {"netuid": NETUID, "mecid": 0, "dests": list(row), "weights": list(row.values()), "version_key": 0}
    calls.dispatch(chain, hotkey, "SubtensorModule", "set_mechanism_weights", params)


def incentives(chain: MemoryChain) -> list[float]:
    chain.run_epoch(NETUID)
    return [neuron.incentive for neuron in chain.subnet(NETUID).neurons]


def test_blocks_pass_by_hand_or_with_the_clock() -> None:
    now = [50.0]
    chain = MemoryChain(block=5, block_time=2.0, clock=lambda: now[0])
    seen = []
    for now[0] in (50.0, 51.9, 52.0, 57.0, 58.0):
        seen.append(chain.block)
    assert seen == [5, 5, 6, 8, 9]
    assert chain.advance(3) == 12


@pytest.mark.parametrize("steps", [[25], [1] * 25, [10, 15]])
def test_epochs_run_at_their_blocks_however_blocks_pass(steps: list[int]) -> None:
    chain = MemoryChain()
    net = chain.create_subnet(NETUID, tempo=10)
    for step in steps:
        chain.advance(step)
    assert (chain.block, net.epoch_index, net.last_epoch, net.next_epoch) == (26, 2, 21, 31)


def test_more_than_half_of_the_stake_decides() -> None:
    chain = chain_of([30, 30, 40])
    weigh(chain, "v0", {3: 3, 4: 1})
    weigh(chain, "v1", {3: 3, 4: 1})
    weigh(chain, "v2", {4: 1})
    assert incentives(chain) == [0, 0, 0, 0.75, 0.25]


def test_a_validator_with_less_than_half_of_the_stake_moves_nothing() -> None:
    chain = chain_of([60, 40])
    weigh(chain, "v0", {2: 1})
    weigh(chain, "v1", {3: 1})
    assert incentives(chain) == [0, 0, 1, 0]


def test_half_of_the_stake_is_not_more_than_half() -> None:
    chain = chain_of([50, 50])
    weigh(chain, "v0", {2: 1})
    weigh(chain, "v1", {3: 1})
    assert incentives(chain) == [0, 0, 0, 0]


def test_weights_for_oneself_do_not_count() -> None:
    chain = chain_of([60, 40])
    weigh(chain, "v0", {0: 9, 2: 1})
    assert incentives(chain) == [0, 0, 1, 0]


def test_weights_do_not_pass_to_who_takes_over_the_uid() -> None:
    chain = chain_of([60])
    weigh(chain, "v0", {1: 1, 2: 1})
    chain.hand_over(NETUID, 1, "newcomer")
    assert incentives(chain) == [0, 0, 1]
    chain.advance()
    weigh(chain, "v0", {1: 1, 2: 1})
    assert incentives(chain) == [0, 0.5, 0.5]


def test_permits_go_to_the_most_stake_at_the_epochs_end() -> None:
    chain = chain_of([10, 20, 30], miners=1, max_validators=2)
    chain.set_stake(NETUID, "v0", 25)
    assert [neuron.permit for neuron in chain.subnet(NETUID).neurons] == [True, True, True, False]
    chain.run_epoch(NETUID)
    assert [neuron.permit for neuron in chain.subnet(NETUID).neurons] == [True, False, True, False]


def test_a_full_subnet_gives_the_newcomer_the_uid_with_the_least_incentive() -> None:
    chain = chain_of([60], miners=3, max_uids=4, immunity_period=0)
    weigh(chain, "v0", {1: 2, 3: 1})
    chain.run_epoch(NETUID)
    assert chain.register(NETUID, "newcomer") == 2
    assert [neuron.hotkey for neuron in chain.subnet(NETUID).neurons] == ["v0", "m0", "newcomer", "m2"]


def test_a_neuron_in_its_immunity_period_goes_last() -> None:
    chain = chain_of([60], miners=2, max_uids=3, immunity_period=100)
    weigh(chain, "v0", {1: 1})
    chain.advance(100)
    assert chain.register(NETUID, "newcomer") == 2
    assert chain.register(NETUID, "second") == 1  # with all of the incentive, but no longer immune


def test_a_newcomer_waits_out_the_rate_limit_once() -> None:
    chain = chain_of([60], weights_rate_limit=5)
    with pytest.raises(Refused, match="SettingWeightsTooFast"):
        weigh(chain, "v0", {1: 1})
    chain.advance(4)
    weigh(chain, "v0", {1: 1})


REFUSALS = [
    ({"dests": [1, 1], "weights": [1, 1]}, "DuplicateUids"),
    ({"dests": [1], "weights": [1, 1]}, "WeightVecNotEqualSize"),
    ({"dests": [99], "weights": [1]}, "UidVecContainInvalidOne"),
    ({"mecid": 1}, "MechanismDoesNotExist"),
    ({"netuid": 99}, "SubnetNotExists"),
]


@pytest.mark.parametrize(("change", "name"), REFUSALS)
def test_what_a_client_could_send_without_the_sdk_is_refused_too(change: dict[str, object], name: str) -> None:
    chain = chain_of([60])
    params = {"netuid": NETUID, "mecid": 0, "dests": [1], "weights": [1], "version_key": 0, **change}
    with pytest.raises(Refused, match=name):
        calls.dispatch(chain, "v0", "SubtensorModule", "set_mechanism_weights", params)
    assert chain.subnet(NETUID).weights == {}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_weight_limit": 32767}, "MaxWeightExceeded"),
        ({"min_allowed_weights": 2}, "WeightVecLengthIsLow"),
        ({"stake_threshold": 10**12}, "NotEnoughStakeToSetWeights"),
        ({"version_key": 1}, "IncorrectWeightVersionKey"),
        ({"commit_reveal": True}, "CommitRevealEnabled"),
    ],
)
def test_the_subnets_settings_are_enforced(settings: dict[str, object], name: str) -> None:
    with pytest.raises(Refused, match=name):
        weigh(chain_of([60], **settings), "v0", {1: 1})


def test_commits_make_room_when_their_epochs_have_passed() -> None:
    chain = chain_of([60], commit_reveal=True, reveal_period=1)
    params = {"netuid": NETUID, "mecid": 0, "commit": "0x00", "reveal_round": 1, "commit_reveal_version": 4}
    call = ("v0", "SubtensorModule", "commit_timelocked_mechanism_weights", params)
    for _ in range(10):
        calls.dispatch(chain, *call)
    with pytest.raises(Refused, match="TooManyUnrevealedCommits"):
        calls.dispatch(chain, *call)
    chain.run_epoch(NETUID)
    with pytest.raises(Refused, match="TooManyUnrevealedCommits"):
        calls.dispatch(chain, *call)
    chain.run_epoch(NETUID)
    calls.dispatch(chain, *call)


def test_answers_are_plain_values() -> None:
    chain = chain_of([60])
    graph = reads.runtime(chain, "SubnetInfoRuntimeApi", "get_metagraph", [NETUID])
    assert json.loads(json.dumps(graph)) == graph
    for name in reads.SETTINGS:
        json.dumps(reads.query(chain, "SubtensorModule", name, [NETUID]))


@pytest.mark.parametrize("read", [reads.query, reads.query_map, reads.runtime])
def test_what_the_chain_does_not_hold_is_refused_by_name(read: object) -> None:
    with pytest.raises(Refused, match=r"the in-memory chain does not .* System\.Account"):
        read(chain_of([60]), "System", "Account", ["v0"])  # type: ignore[operator]
