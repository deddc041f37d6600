"""Follows the chain for a miner: who may ask, and that others find it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from condense_core.neurons.chain.base import Chain
from condense_core.neurons.chain.errors import ChainFailure
from condense_core.neurons.chain.watching import keep_looking, registered
from condense_core.neurons.mining.gate import Gate

_log = logging.getLogger(__name__)


class Follower:
    """Looks at the chain every so often, tells the gate, and announces the miner's address where it has changed."""

    def __init__(
        self,
        chain: Chain,
        gate: Gate,
        address: Callable[[], tuple[str, int]] | None,
        *,
        every: float = 60.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """A follower that has not started.

        Args:
            address: where others reach the miner, asked for each time; None: it is not announced.
            every: seconds between two looks.
        """
        self.chain, self.gate, self.address, self.every, self._sleep = chain, gate, address, every, sleep

    async def start(self) -> None:
        """Look once; ``ChainFailure`` of one line where there is no chain, or it does not know this hotkey."""
        self.gate.update(await registered(self.chain))

    async def run(self) -> None:
        """Announce the miner, and look again and again until it is cancelled.

        What the chain refuses is logged and tried again later.
        """
        await self._announce()
        await keep_looking(self._look, self.every, sleep=self._sleep)

    async def _look(self) -> None:
        self.gate.update(await self.chain.metagraph(max_age=self.every / 2))
        await self._announce()

    async def _announce(self) -> None:
        if self.address is None:
            return
        ip, port = self.address()
        try:
            if await self.chain.announce(ip, port):
                _log.info("announced", extra={"host": ip, "port": port})
        except ChainFailure as error:  # it takes an address every few minutes only
            _log.warning("chain", extra={"detail": f"the address is not announced yet: {error}"})
