"""Sets weights once an epoch, beside the rounds: what the chain refuses for a while is tried again, else it is said."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from condense_core.neurons.chain.base import Chain, WeightsSet
from condense_core.neurons.chain.errors import FinalRefusal, TemporaryRefusal
from condense_core.neurons.incentive.standing import weights
from condense_core.neurons.tiers import Tiers
from condense_core.neurons.validating.ledger import Ledger, LedgerError

_log = logging.getLogger("condense_core.neurons")
_LEAD = 20  # blocks before an epoch's end, which leave time for a refusal or two; a quarter of a short epoch
_NO_EPOCH = 360  # blocks between two settings on a subnet without epochs
_FIRST_WAIT, _LONGEST_WAIT = 12.0, 900.0


class WeightSetter:
    """Sets the weights that the ledger's standings give, shortly before each epoch ends.

    Args:
        now: seconds since the epoch. sleep: waits.
    """

    def __init__(
        self,
        chain: Chain,
        ledger: Ledger,
        tiers: Tiers,
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.chain, self.ledger, self.tiers, self._now, self._sleep = chain, ledger, tiers, now, sleep
        self.waiting = ""
        """Why no weights are set at the moment, in one line; empty where all is well."""
        self.set_at: float | None = None
        """When the chain last took weights, in seconds since the epoch."""

    async def set_once(self) -> WeightsSet | None:
        """Set the weights now; None where nobody has earned anything, and the row on the chain stays.

        Raises:
            ChainFailure: the chain refuses.
        """
        metagraph = await self.chain.metagraph(max_age=0)
        uids = {neuron.hotkey: neuron.uid for neuron in metagraph.neurons if neuron.hotkey != self.chain.hotkey}
        shares = self.tiers.shares(datetime.fromtimestamp(self._now(), UTC))
        row = weights(self.ledger.standings, uids, self.tiers, shares)
        if row is None:
            return None
        hotkeys = {uid: hotkey for hotkey, uid in uids.items()}
        done = await self.chain.set_weights(row, hotkeys=hotkeys)
        if done.sent:
            self.set_at = self._now()
            named = {hotkeys[uid]: round(weight, 6) for uid, weight in done.weights.items()}
            try:
                self.ledger.set_weights(self._now(), done.block, named)
            except LedgerError as error:
                _log.error("ledger", extra={"detail": str(error)})
        return done

    async def run(self) -> None:
        """Set weights in each epoch until it is cancelled."""
        failures = 0
        while True:
            try:
                wait = await self._step()
                failures = 0
            except TemporaryRefusal as error:
                failures += 1
                wait = error.retry_after or min(_FIRST_WAIT * 2 ** min(failures - 1, 10), _LONGEST_WAIT)
                self._waits(f"{error}; trying again in {wait:.0f} s", logging.WARNING)
            except FinalRefusal as error:
                wait = _LONGEST_WAIT
                self._waits(f"{error}; trying again in {wait:.0f} s", logging.ERROR)
            await self._sleep(wait)

    async def _step(self) -> float:
        """Set the weights where it is time for it; seconds until there is something to do again."""
        seconds = await self.chain.block_time()
        left = await self.chain.blocks_until_epoch()
        lead = _LEAD
        if left is not None:
            lead = min(_LEAD, max(1, (await self.chain.metagraph()).tempo // 4))
            if left > lead:
                return (left - lead) * seconds
        done = await self.set_once()
        if done is None:
            self._waits("no miner has earned anything yet", logging.INFO)
            return max(1, lead // 4) * seconds
        if done.sent:
            self.waiting = ""
            _log.info("weights", extra={"detail": f"{len(done.weights)} uids, block {done.block}"})
        else:
            self._waits(done.reason, logging.WARNING)
        return (_NO_EPOCH if left is None else left + 1) * seconds

    def _waits(self, why: str, level: int) -> None:
        if why != self.waiting or level > logging.INFO:
            _log.log(level, "weights", extra={"detail": why})
        self.waiting = why
