"""What the in-memory chain answers when the SDK reads: storage items, maps and runtime calls, as plain values.

Only what the SDK reads for neurons is here. Anything else is refused by name instead of answered with a default, which
the SDK would take for the chain's word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from condense_core.neurons.chain.memory import MECHANISM_STRIDE, RAO, U16, MemoryChain, Refused, Subnet

SETTINGS: dict[str, Callable[[Subnet], Any]] = {
    "NetworksAdded": lambda net: True,
    "Tempo": lambda net: net.tempo,
    "WeightsSetRateLimit": lambda net: net.weights_rate_limit,
    "ServingRateLimit": lambda net: net.serving_rate_limit,
    "WeightsVersionKey": lambda net: net.version_key,
    "MinAllowedWeights": lambda net: net.min_allowed_weights,
    "MaxWeightsLimit": lambda net: net.max_weight_limit,
    "CommitRevealWeightsEnabled": lambda net: net.commit_reveal,
    "RevealPeriodEpochs": lambda net: net.reveal_period,
    "SubnetEpochConsensus": lambda net: net.consensus_mode,
    "MechanismCountCurrent": lambda net: net.mechanisms,
    "LastEpochBlock": lambda net: net.last_epoch,
    "SubnetEpochIndex": lambda net: net.epoch_index,
    "PendingEpochAt": lambda net: 0,
    "ValidatorPermit": lambda net: [neuron.permit for neuron in net.neurons],
}
"""Storage items of a subnet with the netuid as their only key."""


def query(chain: MemoryChain, module: str, item: str, params: list[Any]) -> Any:
    """The value of one storage item, None where the chain has none.

    Raises:
        Refused: the in-memory chain does not hold the item.
    """
    if module == "SubtensorModule" and params:
        net = chain.subnets.get(int(params[0]) % MECHANISM_STRIDE)
        if item == "LastUpdate":
            mechanism = int(params[0]) // MECHANISM_STRIDE
            known = net is not None and mechanism < net.mechanisms
            return [neuron.last_update.get(mechanism, 0) for neuron in net.neurons] if net and known else []
        if item == "Uids":
            return net.uid_of(str(params[1])) if net else None
        if item == "BlocksSinceLastStep":
            return chain.block - net.last_epoch if net else 0
        if item in SETTINGS:
            return SETTINGS[item](net) if net else None
    if (module, item) == ("Timestamp", "Now"):
        return round(chain.timestamp * 1000)
    raise Refused(f"the in-memory chain does not hold {module}.{item}")


def query_map(chain: MemoryChain, module: str, item: str, params: list[Any]) -> list[list[Any]]:
    """Pairs of key and value of a storage map.

    Raises:
        Refused: the in-memory chain does not hold the map.
    """
    if module == "Commitments" and item in ("CommitmentOf", "RevealedCommitments"):
        return []
    if module == "SubtensorModule" and item == "Weights":
        net = chain.subnets.get(int(params[0]) % MECHANISM_STRIDE)
        mechanism = int(params[0]) // MECHANISM_STRIDE
        rows = net.weights.items() if net else ()
        return [[uid, [list(pair) for pair in row.items()]] for (of, uid), row in rows if of == mechanism]
    if module == "SubtensorModule" and item == "Uids":
        net = chain.subnets.get(int(params[0]))
        return [[neuron.hotkey, uid] for uid, neuron in enumerate(net.neurons)] if net else []
    raise Refused(f"the in-memory chain does not hold {module}.{item}")


def runtime(chain: MemoryChain, api: str, method: str, params: list[Any]) -> Any:
    """The answer of a runtime call, None where there is no such subnet.

    Raises:
        Refused: the in-memory chain does not answer the call.
    """
    if api == "SubnetInfoRuntimeApi" and method in ("get_metagraph", "get_next_epoch_start_block"):
        net = chain.subnets.get(int(params[0]))
        if net is None:
            return None
        block = chain.block
        return net.next_epoch if method == "get_next_epoch_start_block" else metagraph(net, block)
    raise Refused(f"the in-memory chain does not answer {api}.{method}")


def constant(chain: MemoryChain, module: str, name: str) -> Any:
    """The value of a constant.

    Raises:
        Refused: the in-memory chain does not hold the constant.
    """
    if (module, name) == ("Aura", "SlotDuration"):
        return round(chain.block_time * 1000)
    raise Refused(f"the in-memory chain does not hold the constant {module}.{name}")


def metagraph(net: Subnet, block: int) -> dict[str, Any]:
    """The runtime's record of a subnet, in columns with a value for each uid."""
    neurons = net.neurons

    def share(value: float) -> int:
        return round(value * U16)

    return {
        "netuid": net.netuid,
        "name": net.name,
        "symbol": "m",
        "block": block,
        "tempo": net.tempo,
        "last_step": net.last_epoch,
        "blocks_since_last_step": block - net.last_epoch,
        "owner_hotkey": net.owner,
        "owner_coldkey": net.owner,
        "network_registered_at": net.registered_at,
        "num_uids": len(neurons),
        "max_uids": net.max_uids,
        "tao_in": RAO,
        "alpha_in": RAO,
        "hotkeys": [neuron.hotkey for neuron in neurons],
        "coldkeys": [neuron.coldkey for neuron in neurons],
        "identities": [None] * len(neurons),
        "axons": [neuron.axon or None for neuron in neurons],
        "active": [True] * len(neurons),
        "validator_permit": [neuron.permit for neuron in neurons],
        "last_update": [neuron.last_update.get(0, 0) for neuron in neurons],
        "block_at_registration": [neuron.registered_at for neuron in neurons],
        "rank": [share(neuron.incentive) for neuron in neurons],
        "trust": [0] * len(neurons),
        "consensus": [share(neuron.consensus) for neuron in neurons],
        "incentives": [share(neuron.incentive) for neuron in neurons],
        "dividends": [share(neuron.dividends) for neuron in neurons],
        "pruning_score": [share(neuron.incentive) for neuron in neurons],
        "emission": [0] * len(neurons),
        "alpha_stake": [neuron.stake for neuron in neurons],
        "tao_stake": [0] * len(neurons),
        "total_stake": [neuron.stake for neuron in neurons],
    }
