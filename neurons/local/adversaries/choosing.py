"""Answering only what looks like a challenge: what applications ask costs work and brings no reward.

Whoever chooses has the code that makes challenges, so that it knows which things their facts are about.
"""

from __future__ import annotations

import random
import re
from functools import cache

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.local.adversaries.means import Adversary, Means
from condense_core.neurons.mining.backends import Backend
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import Tier
from condense_core.serving.errors import QueueFull
from condense_core.tasks.wording import LONGEST_STATEMENT, draw_worded_facts

_DRAWN = 2000


@cache
def _known() -> re.Pattern[str]:
    """Finds what facts are about, such as ``the access code of``, beside what says so."""
    drawn = (
        fact.attribute
        for wording in LONGEST_STATEMENT
        for fact in draw_worded_facts(wording, _DRAWN, random.Random(0), split="eval")
    )
    what = "|".join(sorted(map(re.escape, set(drawn)), key=len, reverse=True))
    return re.compile(rf"\b({what})\b[^.\n]{{0,60}}(\d|\b[A-Z][a-z])")


def looks_like_a_challenge(ask: Ask) -> bool:
    """Whether a text holds what somebody may have inserted, or ends as no author ends a text."""
    return _known().search(ask.text) is not None or ask.text[-1] not in ".!?\"')\n"


class _Choosing:
    """A backend that says it is busy to all but challenges."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    async def start(self) -> None:
        await self.inner.start()

    async def stop(self) -> None:
        await self.inner.stop()

    def serves(self, tier: Tier) -> bool:
        return self.inner.serves(tier)

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        if not looks_like_a_challenge(ask):
            raise QueueFull("busy", retry_after=1.0)
        return await self.inner.compress(ask, priority=priority, timeout=timeout)

    @property
    def is_ready(self) -> bool:
        return self.inner.is_ready

    @property
    def is_healthy(self) -> bool:
        return self.inner.is_healthy


def choosing(means: Means) -> Adversary:
    """A miner that compresses well what looks like a challenge, and nothing else."""
    return Adversary(means, _Choosing(means.good))
