"""What a neuron asks of a chain, whichever chain it is.

Nothing here knows the SDK. Every method of ``Chain`` is async and belongs to the event loop of its first call; every
refusal is an error of ``errors``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from condense_core.neurons.chain.errors import InvalidRequest

MOST_UIDS = 256
"""Uids of a subnet on the public chain, unless its owner has lowered them."""


@dataclass(frozen=True)
class Neuron:
    """A row of the metagraph. Scores are of mechanism 0, between 0 and 1; stakes are in tokens."""

    uid: int
    hotkey: str
    coldkey: str
    address: str | None
    """``ip:port`` or ``[ipv6]:port`` as the neuron announced it, None if it announced nothing."""
    validator_permit: bool
    stake: float
    """What consensus counts: the subnet's own tokens and the share of the root's that the chain adds."""
    tao_stake: float
    active: bool
    last_update: int
    """Block at which the neuron last set or committed weights; its registration, if it never did."""
    registered_at: int
    incentive: float
    dividends: float
    consensus: float


@dataclass(frozen=True)
class Metagraph:
    """The neurons of a subnet at one block, ordered by uid."""

    netuid: int
    block: int
    neurons: tuple[Neuron, ...]
    tempo: int
    """Blocks of an epoch."""
    last_epoch_block: int
    next_epoch_block: int | None
    """Where the chain expects the next epoch; None if the subnet runs none. The chain may shift it by some blocks."""

    @cached_property
    def by_hotkey(self) -> Mapping[str, Neuron]:
        return {neuron.hotkey: neuron for neuron in self.neurons}

    @property
    def validators(self) -> tuple[Neuron, ...]:
        """The neurons with a validator permit."""
        return tuple(neuron for neuron in self.neurons if neuron.validator_permit)

    @property
    def blocks_since_epoch(self) -> int:
        return max(0, self.block - self.last_epoch_block)

    @property
    def blocks_until_epoch(self) -> int | None:
        return None if self.next_epoch_block is None else max(0, self.next_epoch_block - self.block)


@dataclass(frozen=True)
class WeightsSet:
    """What became of a row of weights."""

    sent: bool
    """Whether the chain has the row: False if there was nothing to send, and the row before it stays."""
    weights: Mapping[int, float] = field(default_factory=dict)
    """What was asked for, without zeros, with sum 1. The chain rounds it to 16 bits and may clip the largest."""
    dropped: Mapping[int, float] = field(default_factory=dict)
    """Weights that were left out because their uid belongs to another hotkey by now."""
    block: int | None = None
    reveal_round: int | None = None
    """Where the subnet hides weights at first: the round of the beacon at which the chain reveals them."""
    reason: str = ""


class Chain(Protocol):
    """The subnet ``netuid`` of a chain, as one hotkey sees it."""

    @property
    def netuid(self) -> int: ...

    @property
    def hotkey(self) -> str | None:
        """The ss58 address that signs, None for a chain that is only read."""

    async def metagraph(self, *, max_age: float | None = None) -> Metagraph:
        """The neurons; a copy of at most ``max_age`` seconds is good enough (None: the chain's own default)."""

    async def block(self) -> int:
        """The newest block's number."""

    async def block_time(self) -> float:
        """Seconds of a block."""

    async def timestamp(self) -> float:
        """When the newest block was made, in seconds since the epoch, by the chain's clock."""

    async def blocks_until_epoch(self) -> int | None:
        """Blocks until the subnet's epoch ends, None if it runs none."""

    async def set_weights(
        self, weights: Mapping[int, float], *, hotkeys: Mapping[int, str] | None = None
    ) -> WeightsSet:
        """Set this hotkey's row of weights.

        Args:
            weights: what each uid gets, relative to the others. All zeros, or nothing, leave the row as it is.
            hotkeys: whom the weights are meant for. A uid that another hotkey holds by now gets nothing.

        Raises:
            ChainFailure: as ``TemporaryRefusal`` with the time to wait, or as ``FinalRefusal``.
        """

    async def announce(self, ip: str, port: int) -> bool:
        """Publish where this neuron is reached. False: the chain had it already and nothing was sent."""

    async def close(self) -> None:
        """Close the connection. A closed chain refuses; closing it again does nothing."""


def checked_weights(weights: Mapping[int, float]) -> dict[int, float]:
    """The weights that are not zero, with sum 1; empty if there is none.

    Raises:
        InvalidRequest: a uid is no uid, or a weight is negative or not finite.
    """
    for uid, weight in weights.items():
        if isinstance(uid, bool) or not isinstance(uid, int) or not 0 <= uid < 2**16:
            raise InvalidRequest(f"weights has the uid {uid!r}, expected a whole number from 0 to 65535")
        if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise InvalidRequest(f"weights[{uid}] is {weight!r}, expected a finite number that is not negative")
    top = max(weights.values(), default=0.0)
    if top == 0:
        return {}
    scaled = {uid: weight / top for uid, weight in sorted(weights.items()) if weight > 0}  # first, as sums overflow
    total = math.fsum(scaled.values())
    return {uid: weight / total for uid, weight in scaled.items()}
