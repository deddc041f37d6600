"""In which order miners are asked: by what the chain pays them, and by what this gateway has seen of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from condense_core.neurons.asking.client import Peer
from condense_core.neurons.chain.base import Metagraph

_NEWEST = 0.3  # share of the latest latency in what is expected
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 600.0
_FRESH = 600.0  # seconds after which a latency says nothing any more


@dataclass
class _Seen:
    """What a miner has done in a tier: its latency and when that was, failures, and until when others go first."""

    latency: float | None = None
    measured_at: float = 0.0
    failures: float = 0.0
    behind_until: float = 0.0


class Ranking:
    """Orders the miners of a tier. It belongs to one event loop.

    A miner that failed stands behind all others for 5 s, twice as long with each further failure, 10 minutes at most.
    A valid answer halves its failures, so that one who fails every other time does not begin anew each time.
    """

    def __init__(
        self,
        *,
        explore: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """A ranking that knows nothing yet.

        explore: share of requests for the fastest that are led by a miner whose latency is not known.
        """
        self.explore, self._clock, self._rng = explore, clock, rng or random.Random()
        self._incentive: dict[str, float] = {}
        self._seen: dict[tuple[str, str], _Seen] = {}

    def update(self, metagraph: Metagraph) -> None:
        """What the chain says now; who has left the subnet is forgotten."""
        self._incentive = {neuron.hotkey: neuron.incentive for neuron in metagraph.neurons}
        self._seen = {key: seen for key, seen in self._seen.items() if key[1] in self._incentive}

    # -- orders --------------------------------------------------------------------------------------------------------

    def best(self, tier: str, peers: Iterable[Peer]) -> list[Peer]:
        """By incentive, the highest first; equal ones at random, so that they share the work."""
        return self._ordered(tier, peers, lambda peer: -self._incentive.get(peer.hotkey, 0.0))

    def fastest(self, tier: str, peers: Iterable[Peer]) -> list[Peer]:
        """By latency as measured here. Those that are not measured come last, but lead now and then."""
        ranked = self._ordered(tier, peers, lambda peer: self.expected(tier, peer.hotkey) or float("inf"))
        new = [p for p in ranked if self.expected(tier, p.hotkey) is None and not self._is_behind(tier, p.hotkey)]
        if new and self._rng.random() < self.explore:
            ranked.remove(new[0])
            ranked.insert(0, new[0])
        return ranked

    def expected(self, tier: str, hotkey: str) -> float | None:
        """Seconds that an answer takes; None where that is not known, or was long ago."""
        seen = self._seen.get((tier, hotkey))
        return None if seen is None or self._clock() - seen.measured_at > _FRESH else seen.latency

    # -- what was seen -------------------------------------------------------------------------------------------------

    def answered(self, tier: str, hotkey: str, seconds: float) -> None:
        """A valid answer took so long."""
        seen = self._of(tier, hotkey)
        self._measured(seen, seconds)
        seen.failures /= 2
        seen.behind_until = 0.0

    def unfinished(self, tier: str, hotkey: str, seconds: float) -> None:
        """An answer had not come after so long, and was waited for no more: it would have taken longer."""
        known = self.expected(tier, hotkey)
        if known is None or seconds > known:
            self._measured(self._of(tier, hotkey), seconds)

    def failed(self, tier: str, hotkey: str) -> None:
        """No answer came, or none that is valid."""
        seen = self._of(tier, hotkey)
        seen.failures = min(seen.failures + 1, 16.0)
        seen.behind_until = self._clock() + min(_FIRST_PAUSE * 2 ** (seen.failures - 1), _LONGEST_PAUSE)

    def _of(self, tier: str, hotkey: str) -> _Seen:
        return self._seen.setdefault((tier, hotkey), _Seen())

    def _measured(self, seen: _Seen, seconds: float) -> None:
        now = self._clock()
        old = seen.latency if now - seen.measured_at <= _FRESH else None
        seen.latency = seconds if old is None else (1 - _NEWEST) * old + _NEWEST * seconds
        seen.measured_at = now

    def _is_behind(self, tier: str, hotkey: str) -> bool:
        seen = self._seen.get((tier, hotkey))
        return seen is not None and self._clock() < seen.behind_until

    def _ordered(self, tier: str, peers: Iterable[Peer], key: Callable[[Peer], float]) -> list[Peer]:
        shuffled = list(peers)
        self._rng.shuffle(shuffled)
        return sorted(shuffled, key=lambda peer: (self._is_behind(tier, peer.hotkey), key(peer)))
