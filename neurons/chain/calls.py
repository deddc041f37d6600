"""The signed calls that the in-memory chain carries out, with the checks of the chain and its names of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from condense_core.neurons.chain.memory import MOST_COMMITS, U16, MemoryChain, MemoryNeuron, Refused, Subnet

Params = dict[str, Any]


def dispatch(chain: MemoryChain, signer: str, module: str, function: str, params: Params) -> int:
    """Carry out a call that the hotkey ``signer`` has signed, and return its block.

    Raises:
        Refused: with the chain's name of the error.
    """
    block = chain.block
    if name := chain.take_refusal():
        raise Refused(name)
    if module != "SubtensorModule" or function not in CALLS:
        raise Refused("CallFiltered")
    CALLS[function](chain, signer, params, block)
    return block


def _signing(chain: MemoryChain, signer: str, params: Params) -> tuple[Subnet, int, MemoryNeuron]:
    net = chain.subnet(int(params["netuid"]))
    uid = net.uid_of(signer)
    if uid is None:
        raise Refused("HotKeyNotRegisteredInSubNet")
    return net, uid, net.neurons[uid]


def _weighing(chain: MemoryChain, signer: str, params: Params, block: int, too_fast: str) -> tuple[Subnet, int, int]:
    """What setting and committing weights check alike: mechanism, uid, stake and the rate limit."""
    net, uid, neuron = _signing(chain, signer, params)
    mechanism = int(params["mecid"])
    if not 0 <= mechanism < net.mechanisms:
        raise Refused("MechanismDoesNotExist")
    if neuron.stake < net.stake_threshold:
        raise Refused("NotEnoughStakeToSetWeights")
    last = neuron.last_update.get(mechanism, 0)
    if last and block - last < net.weights_rate_limit:
        raise Refused(too_fast)
    return net, uid, mechanism


def set_weights(chain: MemoryChain, signer: str, params: Params, block: int) -> None:
    """Replace the signer's row of weights."""
    uids, values = [int(uid) for uid in params["dests"]], [int(value) for value in params["weights"]]
    net, own, mechanism = _weighing(chain, signer, params, block, "SettingWeightsTooFast")
    if net.commit_reveal:
        raise Refused("CommitRevealEnabled")
    if net.version_key and int(params["version_key"]) < net.version_key:
        raise Refused("IncorrectWeightVersionKey")
    if not net.neurons[own].permit and (uids != [own] or net.consensus_mode == "Null"):
        raise Refused("NeuronNoValidatorPermit")
    if len(uids) != len(values):
        raise Refused("WeightVecNotEqualSize")
    if len(set(uids)) != len(uids):
        raise Refused("DuplicateUids")
    if any(not 0 <= uid < len(net.neurons) for uid in uids):
        raise Refused("UidVecContainInvalidOne")
    if uids != [own] and len(uids) < net.min_allowed_weights:
        raise Refused("WeightVecLengthIsLow")
    if uids != [own] and max(values, default=0) * U16 > net.max_weight_limit * sum(values):
        raise Refused("MaxWeightExceeded")
    net.weights[mechanism, own] = dict(zip(uids, values, strict=True))
    net.neurons[own].last_update[mechanism] = block


def commit_weights(chain: MemoryChain, signer: str, params: Params, block: int) -> None:
    """Count a commit of hidden weights. The row stays as it was: nothing here can open the commit."""
    net, own, mechanism = _weighing(chain, signer, params, block, "CommittingWeightsTooFast")
    if not net.commit_reveal:
        raise Refused("CommitRevealDisabled")
    if sum(commit[0] == mechanism and commit[2] == signer for commit in net.commits) >= MOST_COMMITS:
        raise Refused("TooManyUnrevealedCommits")
    net.commits.append((mechanism, net.epoch_index, signer))
    net.neurons[own].last_update[mechanism] = block


def serve_axon(chain: MemoryChain, signer: str, params: Params, block: int) -> None:
    """Publish the signer's address."""
    net, _, neuron = _signing(chain, signer, params)
    ip, port = int(params["ip"]), int(params["port"])
    if params["ip_type"] not in (4, 6):
        raise Refused("InvalidIpType")
    if not 0 < ip < (2**32 if params["ip_type"] == 4 else 2**128):
        raise Refused("InvalidIpAddress")
    if not 0 < port < 2**16:
        raise Refused("InvalidPort")
    if neuron.axon and block - neuron.axon["block"] < net.serving_rate_limit:
        raise Refused("ServingRateLimitExceeded")
    names = ("version", "ip", "port", "ip_type", "protocol", "placeholder1", "placeholder2")
    neuron.axon = {"block": block, **{name: int(params[name]) for name in names}}


CALLS: dict[str, Callable[[MemoryChain, str, Params, int], None]] = {
    "set_mechanism_weights": set_weights,
    "commit_timelocked_mechanism_weights": commit_weights,
    "serve_axon": serve_axon,
}
"""What a hotkey can sign, by the chain's name of the call."""
