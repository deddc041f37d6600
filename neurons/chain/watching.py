"""Looking at a chain again and again, as every neuron does: what it refuses is logged, and tried again later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from condense_core.neurons.chain.base import Chain, Metagraph
from condense_core.neurons.chain.errors import FinalRefusal, NotRegistered, TemporaryRefusal
from condense_core.serving.errors import mistake

_log = logging.getLogger(__name__)
_LONGEST = 600.0


async def registered(chain: Chain) -> Metagraph:
    """The metagraph, of which the chain's own hotkey is a part.

    Raises:
        ChainFailure: there is no chain, or it does not know this hotkey; one line.
    """
    metagraph = await chain.metagraph()
    if chain.hotkey is not None and chain.hotkey not in metagraph.by_hotkey:
        raise NotRegistered(f"hotkey {chain.hotkey} has no uid on subnet {chain.netuid}, expected a registered one")
    return metagraph


async def keep_looking(
    look: Callable[[], Awaitable[None]], every: float, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """``look`` every so many seconds, until this is cancelled; after a refusal later, and later each time."""
    wait, failures = every, 0
    while True:
        await sleep(wait)
        try:
            await look()
            wait, failures = every, 0
        except TemporaryRefusal as error:
            failures += 1
            wait = max(error.retry_after or 0.0, min(every * 2**failures, _LONGEST))
            _log.warning("chain", extra={"detail": f"{error}; trying again in {wait:.0f} s"})
        except FinalRefusal as error:
            wait = _LONGEST
            _log.error("chain", extra={"detail": f"{error}; looking again in {wait:.0f} s"})
        except Exception as error:  # a mistake of this software must not end it, and nobody would notice
            wait = every
            _, where = mistake(error)
            _log.error("chain", extra={"detail": f"a mistake of this software ({where}); going on"})
