"""Whether this host's clock agrees with the chain's: signatures are good for seconds, and refused beyond.

The chain's time is that of its newest block. Between two blocks it stands still, and a block is seen here some seconds
after it was made, so that one look bounds the difference only by the time of a block, 12 s on the public chain. Unless
the first look has decided it already, a new block is waited for, which bounds it to a few seconds. A node that is
behind the chain looks like a clock that is ahead, which the message says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from math import ceil

from condense_core.neurons.chain.base import Chain
from condense_core.neurons.chain.errors import ChainFailure

_log = logging.getLogger(__name__)

MOST = 10.0
"""Seconds that a request may be old, as the SDK's ``http_auth`` has it."""
_SEEN_AFTER = 3.0  # seconds from a block's own time until a node here shows it, at most, where all is well


class WrongClock(ValueError):
    """The clock is off by so much that signatures are refused."""


class ClockWatch:
    """Compares the clock of this host with that of ``chain``.

    Args:
        clock: seconds since the epoch. sleep: waits.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.chain, self._clock, self._sleep = chain, clock, sleep

    async def check(self) -> None:
        """Raise ``WrongClock`` where ``compare`` finds something wrong; ``ChainFailure`` as of it."""
        if wrong := await self.compare():
            raise WrongClock(wrong)

    async def compare(self) -> str:
        """What is wrong with the clock, in one line, or nothing; it takes two blocks' time at most.

        Where no new block comes in that time nothing is known, and nothing is wrong.

        Raises:
            ChainFailure: the chain cannot be asked.
        """
        block_time = await self.chain.block_time()
        pause = min(1.0, block_time / 4)
        first, least, most = await self._look()
        if most < -MOST or (least - block_time - _SEEN_AFTER >= -MOST and most <= MOST):
            return _message(most) if most < -MOST else ""
        for _ in range(ceil((2 * block_time + _SEEN_AFTER) / pause)):
            await self._sleep(pause)
            made, least, most = await self._look()
            if made != first:  # since the look before this one
                if most < -MOST:
                    return _message(most)
                return _message(ahead) if (ahead := least - pause - _SEEN_AFTER) > MOST else ""
        return ""

    async def run(self, *, every: float = 600.0) -> None:
        """Compare every so many seconds until this is cancelled; what is wrong is logged."""
        while True:
            await self._sleep(every)
            try:
                wrong = await self.compare()
            except ChainFailure:  # whoever follows the chain says so
                continue
            if wrong:
                _log.warning("clock", extra={"detail": wrong})

    async def _look(self) -> tuple[float, float, float]:
        """The chain's time, and how far this host's was ahead of it just before and behind the question."""
        before = self._clock()
        made = await self.chain.timestamp()
        return made, before - made, self._clock() - made


def _message(ahead: float) -> str:
    where = "behind" if ahead < 0 else "ahead of"
    node = "" if ahead < 0 else ", or ask a node that is not behind the chain"
    return (
        f"clock: this host's is at least {abs(ahead):.0f} s {where} the chain's, expected at most {MOST:g} s, beyond "
        f"which signatures are refused: set it by NTP{node}"
    )
