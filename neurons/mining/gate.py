"""Who may ask a miner, and how often: validators with a permit and stake, by their share of it.

The gate is asked before a body is parsed, so that whoever may not ask costs a signature check and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from condense_core.neurons.chain.base import Metagraph, Neuron
from condense_core.serving.errors import RateLimited, ServingError

_MOST_PRIORITY = 9


class NotReady(ServingError):
    """The miner is up and does not know yet who may ask."""

    code, status = "not_ready", 503


class Forbidden(ServingError):
    """Whoever asks is known, and may not."""

    code, status = "forbidden", 403


@dataclass(frozen=True)
class GateSettings:
    """Who may ask, and how often.

    Attributes:
        min_stake: of a validator. require_permit: whether the chain must have given it one.
        allow: hotkeys that may ask whatever the chain says. deny: that may not.
        requests_per_minute: of all callers together, in each tier.
        even_share: of these, spread evenly over the callers; the rest goes by stake.
        burst_seconds: for how long a caller may save up what it did not ask.
        max_age: seconds after which a metagraph says nothing any more.
    """

    min_stake: float = 0.0
    require_permit: bool = True
    allow: frozenset[str] = frozenset()
    deny: frozenset[str] = frozenset()
    requests_per_minute: float = 600.0
    even_share: float = 0.2
    burst_seconds: float = 20.0
    max_age: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("min_stake", "requests_per_minute", "burst_seconds", "max_age"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a finite number of at least 0")
        if not 0 <= self.even_share <= 1:
            raise ValueError(f"even_share: got {self.even_share!r}, expected a number in [0, 1]")


@dataclass
class _Bucket:
    """What a caller may still ask: so many requests, filled up as time goes."""

    left: float
    at: float


class Gate:
    """Lets callers through by what the chain says of them. It belongs to one event loop."""

    def __init__(self, settings: GateSettings | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self._clock = settings or GateSettings(), clock
        self._rates: dict[str, float] = {}  # requests a second, of each caller in each tier
        self._priorities: dict[str, int] = {}
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._updated: float | None = None

    def update(self, metagraph: Metagraph) -> None:
        """What the chain says now."""
        own = self.settings
        stakes = {neuron.hotkey: neuron.stake for neuron in metagraph.neurons if self._may_ask(neuron)}
        stakes |= {hotkey: stakes.get(hotkey, 0.0) for hotkey in own.allow}
        for hotkey in own.deny:
            stakes.pop(hotkey, None)
        total, most = sum(stakes.values()), max(stakes.values(), default=0.0)
        even = own.even_share if total else 1.0
        per_second = own.requests_per_minute / 60
        self._rates = {
            hotkey: per_second * (even / len(stakes) + (1 - even) * (stake / total if total else 0.0))
            for hotkey, stake in stakes.items()
        }
        self._priorities = {
            hotkey: round(_MOST_PRIORITY * stake / most) if most else 0 for hotkey, stake in stakes.items()
        }
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if key[0] in stakes}
        self._updated = self._clock()

    @property
    def is_ready(self) -> bool:
        """Whether the chain has been heard, not too long ago."""
        return self._updated is not None and self._clock() - self._updated <= self.settings.max_age

    def check(self, hotkey: str) -> int:
        """The priority of a caller, 0 to 9 by its stake.

        Raises:
            NotReady: the chain has not been heard. Forbidden: it says that this caller may not ask.
        """
        if not self.is_ready:
            raise NotReady("the chain has not been heard yet, expected another try", retry_after=10.0)
        if hotkey not in self._rates:
            raise Forbidden("hotkey: it may not ask this miner, expected a validator with a permit and enough stake")
        return self._priorities[hotkey]

    def spend(self, hotkey: str, tier: str) -> None:
        """Count a request of a caller that ``check`` let through.

        Raises:
            RateLimited: it has asked more than its share in this tier.
        """
        rate, now = self._rates.get(hotkey, 0.0), self._clock()
        most = max(rate * self.settings.burst_seconds, 1.0)
        bucket = self._buckets.setdefault((hotkey, tier), _Bucket(most, now))
        bucket.left = min(most, bucket.left + rate * (now - bucket.at))
        bucket.at = now
        if bucket.left < 1:
            wait = (1 - bucket.left) / rate if rate else 60.0
            raise RateLimited(
                f"quota: {60 * rate:.3g} requests a minute in tier {tier!r} are over, expected fewer; try again in "
                f"{wait:.1f} s",
                retry_after=wait,
            )
        bucket.left -= 1

    def _may_ask(self, neuron: Neuron) -> bool:
        own = self.settings
        return (neuron.validator_permit or not own.require_permit) and neuron.stake >= own.min_stake
