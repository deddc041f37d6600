"""Challenges, made ahead of their rounds, so that no round waits for a text."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import Iterator, Sequence

from condense_core.neurons.judging.challenges import Challenge, challenge, challenge_of
from condense_core.neurons.tiers import Tiers
from condense_core.tasks.generators import Task
from condense_core.tasks.sources import TextSource
from condense_core.tasks.squad import Paragraph, SquadConfig, squad_tasks

AHEAD = 4
"""Challenges of each tier that wait."""
SQUAD_SHARE = 0.5
"""Of challenges are over questions that people asked, where there are any that fit the tier."""


class Supply:
    """Makes the challenges of each tier from running text and from questions that people asked.

    Its secret is its own and new: what it makes cannot be computed by anybody who has the same text.
    """

    def __init__(
        self, tiers: Tiers, source: TextSource, squad: Sequence[Paragraph] = (), *, secret: str | None = None
    ) -> None:
        self.tiers, self.source, self.secret = tiers, source, secret or secrets.token_hex(16)
        self._tasks = {name: task for name in tiers.tiers if (task := self._asked(name, squad)) is not None}
        self._made = dict.fromkeys(tiers.tiers, 0)
        self._waiting: dict[str, asyncio.Queue[Challenge | Exception]] = {}
        self._workers: list[asyncio.Task[None]] = []

    def make(self, tier: str) -> Challenge:
        """The next challenge of a tier."""
        index = self._made[tier]
        self._made[tier] += 1
        if tier in self._tasks and random.Random(f"kind-{self.secret}-{tier}-{index}").random() < SQUAD_SHARE:
            found = challenge_of(self.tiers, tier, next(self._tasks[tier]), secret=self.secret)
            if found is not None:
                return found
        return challenge(self.tiers, tier, self.source, secret=self.secret, index=index)

    async def next(self, tier: str) -> Challenge:
        """As ``make``, of those that wait; the first call of a tier begins to make them ahead."""
        if tier not in self._waiting:
            queue = self._waiting[tier] = asyncio.Queue(AHEAD)
            self._workers.append(asyncio.ensure_future(self._keep_full(tier, queue)))
        made = await self._waiting[tier].get()
        if isinstance(made, Exception):
            raise made
        return made

    async def aclose(self) -> None:
        """Make no more."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _keep_full(self, tier: str, queue: asyncio.Queue[Challenge | Exception]) -> None:
        while True:
            made: Challenge | Exception
            try:
                made = await asyncio.to_thread(self.make, tier)
            except (ValueError, OSError) as error:  # of the text, such as a file that is gone
                made = error
            await queue.put(made)

    def _asked(self, tier: str, paragraphs: Sequence[Paragraph]) -> Iterator[Task] | None:
        """Tasks of the tier's length without end; None where no context of that length can be made."""
        limits = self.tiers.tiers[tier]
        config = SquadConfig(limits.min_chars, limits.max_chars, num_questions=3 * limits.questions)
        seed = random.Random(f"squad-{self.secret}-{tier}").getrandbits(63)
        try:
            tasks = squad_tasks(paragraphs, 2**62, seed=seed, config=config)
            first = next(tasks)
        except ValueError:
            return None
        return itertools.chain([first], tasks)
