"""What miners have earned over time: an average for each hotkey and tier that forgets.

It belongs to a hotkey, not to a uid: whoever gets a uid from another begins anew, and a hotkey that comes back under
another uid keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from condense_core.neurons.tiers import Tiers

DECAY = 0.1
"""Of the average with each round; half of what is known is of the last 6.6 rounds."""
RIPE = 4
"""Rounds before a standing counts whole, so that one lucky answer is not worth what many are."""


@dataclass(frozen=True)
class Standing:
    """The average of a miner's scores in one tier.

    Attributes:
        total: of scores, each less by ``1 - DECAY`` for every round since. rounds: how many there were.
    """

    total: float = 0.0
    rounds: int = 0

    def after(self, score: float) -> Standing:
        """With another round's score, in [0, 1]."""
        if not 0 <= score <= 1:
            raise ValueError(f"score: got {score}, expected a number in [0, 1]")
        return Standing((1 - DECAY) * self.total + DECAY * score, self.rounds + 1)

    @property
    def value(self) -> float:
        """In [0, 1]. Divided by the weight that its rounds have, so that a validator who begins late agrees soon."""
        if not self.rounds:
            return 0.0
        known = 1 - (1 - DECAY) ** self.rounds
        return min(self.total / known, 1.0) * min(1.0, self.rounds / RIPE)


@dataclass
class Standings:
    """All miners' standings, by tier and hotkey."""

    by_tier: dict[str, dict[str, Standing]] = field(default_factory=dict)

    def add(self, tier: str, scores: Mapping[str, float]) -> None:
        """A round of a tier: the score of every hotkey that was asked, 0 for one that failed.

        A round in which nobody scored changes nothing: it says more about the validator than about the miners.
        """
        if not any(scores.values()):
            return
        own = self.by_tier.setdefault(tier, {})
        for hotkey, score in scores.items():
            own[hotkey] = own.get(hotkey, Standing()).after(score)

    def keep(self, hotkeys: Iterable[str]) -> None:
        """Forget all but the hotkeys that are registered."""
        registered = set(hotkeys)
        self.by_tier = {
            tier: {hotkey: standing for hotkey, standing in own.items() if hotkey in registered}
            for tier, own in self.by_tier.items()
        }

    def value(self, tier: str, hotkey: str) -> float:
        """A miner's standing in a tier, 0 for one that was never asked."""
        return self.by_tier.get(tier, {}).get(hotkey, Standing()).value


def weights(
    standings: Standings, uids: Mapping[str, int], tiers: Tiers, shares: Mapping[str, float]
) -> dict[int, float] | None:
    """Each uid's weight: of each tier's share, its part by the tier's power of its standing. They sum to 1.

    Args:
        uids: of the registered miners, by hotkey. shares: of the tiers (``Tiers.shares``).

    Returns:
        None where nobody has earned anything: the weights stay as they are. A tier in which nobody has leaves its share
        to the others.
    """
    parts: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        if share <= 0:
            continue
        sharpness = tiers.tiers[name].sharpness
        earned = {hotkey: standings.value(name, hotkey) ** sharpness for hotkey in uids}
        if (total := math.fsum(earned.values())) > 0:
            parts[name] = {hotkey: value / total for hotkey, value in earned.items()}
    paid = math.fsum(shares[name] for name in parts)
    if not parts:
        return None
    return {
        uid: math.fsum(shares[name] / paid * part[hotkey] for name, part in parts.items())
        for hotkey, uid in uids.items()
    }
