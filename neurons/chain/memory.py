"""A chain without a node: the state and rules of a subnet, as far as neurons meet them.

``reads`` answers from it what the SDK asks a node, ``calls`` carries out what hotkeys have signed, both in plain values
that JSON can hold, so that ``substrate`` can put it beneath the SDK's client in one process and ``server`` beneath
many. Errors have the chain's names. None of the three imports the SDK.

It differs from the chain where it says so:

- Reads see the newest state, also when they name an older block.
- A block is a number. It passes when ``advance`` is called, or with ``clock`` every ``block_time`` seconds.
- Fees, tokens and emission do not exist: stake is what ``register`` and ``set_stake`` say. A hotkey's ``stake`` is its
  total stake; its root stake is zero.
- Consensus is the weighted median alone: a uid's consensus is the largest weight that more than half of the stake of
  validators gives it at least, incentive is consensus with sum 1. There are no bonds, and dividends are the stake's
  share.
- Where commit-reveal is on, a commit is counted and expires with its epochs, but never revealed: only the beacon of the
  public network can open it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

U16 = 65535
MECHANISM_STRIDE = 4096
"""Storage of mechanism m of subnet n has the index m * 4096 + n."""
MOST_COMMITS = 10
RAO = 10**9


@dataclass
class MemoryNeuron:
    """A neuron's state."""

    hotkey: str
    coldkey: str
    registered_at: int
    stake: int  # in rao, 1e-9 of a token
    permit: bool = False
    axon: dict[str, int] = field(default_factory=dict)
    last_update: dict[int, int] = field(default_factory=dict)  # mechanism -> block
    incentive: float = 0.0
    consensus: float = 0.0
    dividends: float = 0.0


@dataclass
class Subnet:
    """A subnet's settings, with the public chain's defaults, and its neurons by uid."""

    netuid: int
    tempo: int = 360
    weights_rate_limit: int = 100
    serving_rate_limit: int = 50
    min_allowed_weights: int = 1
    max_weight_limit: int = U16
    version_key: int = 0
    max_uids: int = 256
    max_validators: int = 64
    immunity_period: int = 4096
    stake_threshold: int = 0  # rao that a hotkey needs to set weights
    mechanisms: int = 1
    commit_reveal: bool = False
    reveal_period: int = 1  # epochs
    consensus_mode: str = "Yuma"
    """"Yuma", or "Null", in which the validator with the most stake alone sets weights."""
    name: str = "memory"
    owner: str = "5C4hrfjw9DjXZTzV3MwzrrAr9P1MJhSrvWGWqi1eSuyUpnhM"  # the address of the public key 0
    registered_at: int = 1
    neurons: list[MemoryNeuron] = field(default_factory=list)
    weights: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)  # (mechanism, uid) -> row
    commits: list[tuple[int, int, str]] = field(default_factory=list)  # (mechanism, epoch, hotkey)
    last_epoch: int = 1
    epoch_index: int = 0

    def uid_of(self, hotkey: str) -> int | None:
        return next((uid for uid, neuron in enumerate(self.neurons) if neuron.hotkey == hotkey), None)

    @property
    def next_epoch(self) -> int | None:
        return self.last_epoch + self.tempo if self.tempo else None


class Refused(Exception):
    """The chain's name of an error, such as ``SettingWeightsTooFast``."""


class MemoryChain:
    """Subnets, their neurons and the blocks.

    Args:
        block: the first block's number.
        block_time: seconds of a block.
        clock: seconds since any moment; with it blocks pass by themselves. None: only ``advance`` makes them pass.
    """

    def __init__(self, *, block: int = 1, block_time: float = 12.0, clock: Callable[[], float] | None = None) -> None:
        if block < 1 or block_time <= 0:
            raise ValueError(f"block is {block}, block_time {block_time}; expected both above 0")
        self.block_time = block_time
        self.time_offset = 0.0
        """Seconds by which the chain's time is ahead of this host's."""
        self.subnets: dict[int, Subnet] = {}
        self.nonces: dict[str, int] = {}
        self._block = block
        self._clock = clock
        self._since = clock() if clock else 0.0
        self._refusals: list[str] = []

    @classmethod
    def running(cls, block_time: float) -> MemoryChain:
        """A chain whose blocks pass by themselves."""
        return cls(block_time=block_time, clock=time.monotonic)

    # -- blocks and epochs ---------------------------------------------------------------------------------------------

    @property
    def block(self) -> int:
        """The newest block's number."""
        if self._clock is not None:
            passed = int((self._clock() - self._since) / self.block_time)
            if passed > 0:
                self._since += passed * self.block_time
                self.advance(passed)
        return self._block

    @property
    def timestamp(self) -> float:
        """When the newest block was made, in seconds since the epoch. Without ``clock`` that is always just now."""
        now = time.time() + self.time_offset
        if self._clock is None:
            return now
        passed = (self._clock() - self._since) % self.block_time
        return now - passed

    def advance(self, blocks: int = 1) -> int:
        """Let ``blocks`` blocks pass, run the epochs that end in them, and return the newest block's number."""
        if blocks < 0:
            raise ValueError(f"blocks is {blocks}, expected 0 or more")
        target = self._block + blocks
        while True:
            due = [(net.next_epoch, net.netuid) for net in self.subnets.values() if net.next_epoch is not None]
            at, netuid = min(due, default=(target + 1, 0))
            if at > target:
                break
            self._block = max(self._block, at)
            self.run_epoch(netuid)
        self._block = target
        return target

    def run_epoch(self, netuid: int) -> None:
        """End the subnet's epoch now: permits, consensus and incentive are computed again, old commits expire."""
        net = self.subnet(netuid)
        net.last_epoch = self._block
        net.epoch_index += 1
        net.commits = [commit for commit in net.commits if commit[1] + net.reveal_period >= net.epoch_index]
        ranking = sorted(net.neurons, key=lambda neuron: -neuron.stake)
        most = 1 if net.consensus_mode == "Null" else net.max_validators
        for place, neuron in enumerate(ranking):
            neuron.permit = place < most and neuron.stake > 0
        self._judge(net)

    @staticmethod
    def _judge(net: Subnet) -> None:
        rows: list[tuple[int, dict[int, float]]] = []
        for uid, neuron in enumerate(net.neurons):
            row = net.weights.get((0, uid), {}) if neuron.permit else {}
            updated = neuron.last_update.get(0, 0)
            # As on the chain, a weight counts only for the neuron that held the uid when it was set.
            row = {to: w for to, w in row.items() if to != uid and updated > net.neurons[to].registered_at}
            if total := sum(row.values()):
                rows.append((neuron.stake, {to: w / total for to, w in row.items()}))
        staked = sum(stake for stake, _ in rows)
        for uid, neuron in enumerate(net.neurons):
            given = sorted(((row.get(uid, 0.0), stake) for stake, row in rows), reverse=True)
            behind = 0
            neuron.consensus = 0.0
            for weight, stake in given:
                behind += stake
                if 2 * behind > staked:
                    neuron.consensus = weight
                    break
        agreed = math.fsum(neuron.consensus for neuron in net.neurons)
        permitted = sum(neuron.stake for neuron in net.neurons if neuron.permit)
        for neuron in net.neurons:
            neuron.incentive = neuron.consensus / agreed if agreed else 0.0
            neuron.dividends = neuron.stake / permitted if neuron.permit and permitted else 0.0

    # -- what an operator does -----------------------------------------------------------------------------------------

    def subnet(self, netuid: int) -> Subnet:
        if netuid not in self.subnets:
            raise Refused("SubnetNotExists")
        return self.subnets[netuid]

    def create_subnet(self, netuid: int, **settings: object) -> Subnet:
        """A new subnet; ``settings`` are fields of ``Subnet``."""
        if netuid in self.subnets or not 0 < netuid < MECHANISM_STRIDE:
            raise ValueError(f"netuid is {netuid}, expected a free number from 1 to {MECHANISM_STRIDE - 1}")
        block = self.block
        self.subnets[netuid] = Subnet(netuid, registered_at=block, last_epoch=block, **settings)  # type: ignore[arg-type]
        return self.subnets[netuid]

    def register(self, netuid: int, hotkey: str, *, coldkey: str = "", stake: float = 0.0, permit: bool = False) -> int:
        """Give ``hotkey`` a uid: the next one, or, where all are taken, that of the neuron with the least incentive.

        As on the chain, neurons in their immunity period and validators go last, and a uid that changes hands loses its
        address and permit. ``permit`` gives a permit before the first epoch does.
        """
        net, block = self.subnet(netuid), self.block
        if net.uid_of(hotkey) is not None:
            raise Refused("HotKeyAlreadyRegisteredInSubNet")
        neuron = MemoryNeuron(hotkey, coldkey or net.owner, block, round(stake * RAO), permit)
        # The chain dates the last weights of a newcomer to its registration, so it waits out the rate limit once.
        neuron.last_update = dict.fromkeys(range(net.mechanisms), block)
        if len(net.neurons) < net.max_uids:
            net.neurons.append(neuron)
            return len(net.neurons) - 1
        uid = min(range(len(net.neurons)), key=lambda uid: self._staying(net, net.neurons[uid], block))
        self._give_uid(net, uid, neuron)
        return uid

    @staticmethod
    def _staying(net: Subnet, neuron: MemoryNeuron, block: int) -> tuple[bool, bool, float, int]:
        immune = block - neuron.registered_at < net.immunity_period
        return neuron.permit, immune, neuron.incentive, neuron.registered_at

    @staticmethod
    def _give_uid(net: Subnet, uid: int, neuron: MemoryNeuron) -> None:
        net.neurons[uid] = neuron
        for mechanism in range(net.mechanisms):
            net.weights.pop((mechanism, uid), None)

    def hand_over(self, netuid: int, uid: int, hotkey: str, *, stake: float = 0.0) -> None:
        """Deregister the neuron at ``uid`` and give the uid to ``hotkey``."""
        net = self.subnet(netuid)
        block = self.block
        neuron = MemoryNeuron(hotkey, net.owner, block, round(stake * RAO))
        neuron.last_update = dict.fromkeys(range(net.mechanisms), block)
        self._give_uid(net, uid, neuron)

    def set_stake(self, netuid: int, hotkey: str, stake: float) -> None:
        """Give ``hotkey`` a total stake in tokens; permits follow at the epoch's end."""
        net = self.subnet(netuid)
        uid = net.uid_of(hotkey)
        if uid is None:
            raise Refused("HotKeyNotRegisteredInSubNet")
        net.neurons[uid].stake = round(stake * RAO)

    def set_time_offset(self, seconds: float) -> None:
        """Put the chain's time so far ahead of this host's."""
        self.time_offset = float(seconds)

    def refuse_next(self, name: str, calls: int = 1) -> None:
        """Refuse the next ``calls`` signed calls with the error ``name``."""
        self._refusals += [name] * calls

    def take_refusal(self) -> str | None:
        """The error that the next signed call was told to get, or None."""
        return self._refusals.pop(0) if self._refusals else None
