"""What an operator of a local subnet does to its chain, and what the chain says at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from condense_core.neurons.chain.base import Metagraph
from condense_core.neurons.chain.memory import U16
from condense_core.neurons.chain.opened import open_chain
from condense_core.neurons.chain.server import RemoteNode

NETUID = 1
BLOCK_SECONDS, TEMPO, RATE_LIMIT = 0.5, 20, 4  # an epoch takes ten seconds
_STAKE = 5000.0


class LocalChain:
    """The chain process at a socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    @property
    def network(self) -> str:
        """What neurons are told."""
        return f"memory:{self.socket}"

    @property
    def arguments(self) -> list[str]:
        """Of ``python -m condense_core.neurons.chain``."""
        settings = (f"tempo={TEMPO}", f"weights_rate_limit={RATE_LIMIT}", "serving_rate_limit=1")
        made = [str(self.socket), "--netuid", str(NETUID), "--block-time", str(BLOCK_SECONDS)]
        return made + [part for setting in settings for part in ("--setting", setting)]

    def register(self, hotkeys: Sequence[tuple[str, bool]]) -> list[int]:
        """Give hotkeys their uids; with True a hotkey gets the stake and the permit of a validator."""

        async def registered(node: RemoteNode) -> list[int]:
            return [
                await node.control("register", netuid=NETUID, hotkey=hotkey, stake=_STAKE if asks else 0.0, permit=asks)
                for hotkey, asks in hotkeys
            ]

        return list(self._do(registered))

    def end_epoch(self) -> None:
        """Let an epoch end, so that the incentive is that of the latest weights."""

        async def advanced(node: RemoteNode) -> None:
            await node.control("advance", blocks=TEMPO)

        self._do(advanced)

    def weights(self) -> dict[int, dict[int, float]]:
        """The row of each uid that has set one, with sum 1."""

        async def read(node: RemoteNode) -> Any:
            await node.connect()
            return await node.request("query_map", {"module": "SubtensorModule", "name": "Weights", "params": [NETUID]})

        rows = {uid: {to: weight / U16 for to, weight in row} for uid, row in self._do(read)}
        return {
            uid: {to: weight / total for to, weight in row.items()}
            for uid, row in rows.items()
            if (total := sum(row.values())) > 0
        }

    def metagraph(self) -> Metagraph:
        """As any neuron sees it."""

        async def read() -> Metagraph:
            chain = open_chain(self.network, NETUID)
            try:
                return await chain.metagraph(max_age=0)
            finally:
                await chain.close()

        return asyncio.run(read())

    def wait_announced(self, hotkeys: Sequence[str], tick: Callable[[], None], *, seconds: float = 60.0) -> None:
        """Until the chain has an address of all of them; ``ValueError`` where that does not come."""
        end = time.monotonic() + seconds
        while True:
            known = self.metagraph().by_hotkey
            left = [hotkey for hotkey in hotkeys if known[hotkey].address is None]
            if not left:
                return
            if time.monotonic() > end:
                raise ValueError(f"chain: {len(left)} miners did not announce themselves within {seconds:g} s")
            tick()
            time.sleep(0.2)

    def _do(self, work: Callable[[RemoteNode], Any]) -> Any:
        async def done() -> Any:
            node = RemoteNode(self.socket)
            try:
                return await work(node)
            finally:
                await node.close()

        return asyncio.run(done())
