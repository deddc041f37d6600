"""Follows the chain for a miner: who may ask, and that others find it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from condense_core.neurons.chain.base import Chain
from condense_core.neurons.chain.errors import ChainFailure, FinalRefusal, NotRegistered, TemporaryRefusal
from condense_core.neurons.mining.gate import Gate

_log = logging.getLogger(__name__)
_LONGEST = 600.0


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
        """Look once.

        Raises:
            ChainFailure: there is no chain, or it does not know this hotkey; one line.
        """
        metagraph = await self.chain.metagraph()
        if self.chain.hotkey is not None and self.chain.hotkey not in metagraph.by_hotkey:
            raise NotRegistered(
                f"hotkey {self.chain.hotkey} has no uid on subnet {self.chain.netuid}, expected a registered one"
            )
        self.gate.update(metagraph)

    async def run(self) -> None:
        """Announce the miner, and look again and again until it is cancelled.

        What the chain refuses is logged and tried again later.
        """
        await self._announce()
        wait, failures = self.every, 0
        while True:
            await self._sleep(wait)
            try:
                self.gate.update(await self.chain.metagraph(max_age=self.every / 2))
                await self._announce()
                wait, failures = self.every, 0
            except TemporaryRefusal as error:
                failures += 1
                wait = max(error.retry_after or 0.0, min(self.every * 2**failures, _LONGEST))
                _log.warning("chain", extra={"detail": f"{error}; trying again in {wait:.0f} s"})
            except FinalRefusal as error:
                wait = _LONGEST
                _log.error("chain", extra={"detail": f"{error}; looking again in {wait:.0f} s"})

    async def _announce(self) -> None:
        if self.address is None:
            return
        ip, port = self.address()
        try:
            if await self.chain.announce(ip, port):
                _log.info("announced", extra={"host": ip, "port": port})
        except ChainFailure as error:  # it takes an address every few minutes only
            _log.warning("chain", extra={"detail": f"the address is not announced yet: {error}"})
