"""A gateway from its start to its end, in one event loop: chain, miners and server."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condense_core.decoder.description import ModelDescription, describe_model
from condense_core.neurons.asking.client import NeuronClient
from condense_core.neurons.chain.base import Chain, Metagraph
from condense_core.neurons.chain.clock import ClockWatch
from condense_core.neurons.chain.watching import keep_looking, registered
from condense_core.neurons.routing.app import create_gateway_app
from condense_core.neurons.routing.gateway import Gateway
from condense_core.neurons.routing.requests import RoutedRequest
from condense_core.neurons.tiers import Tiers
from condense_core.serving.errors import ServingError
from condense_core.serving.http.guard import HttpLimits
from condense_core.serving.http.server import Server
from condense_core.serving.keys import Keys
from condense_core.serving.service import SWITCH_SECONDS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listening:
    """Where applications reach a gateway.

    Attributes:
        bound: a socket that listens. certificate, key: files in PEM, for https.
    """

    bound: socket.socket
    certificate: Path | None = None
    key: Path | None = None


@dataclass
class Running:
    """What a gateway is made of, and how it ends.

    Attributes:
        every: seconds between two looks at the chain.
    """

    gateway: Gateway
    chain: Chain
    client: NeuronClient
    every: float = 60.0
    _may_ask: bool = field(default=True, init=False)
    _told: str = field(default="", init=False)

    async def look(self) -> None:
        """See who is there; ``ChainFailure`` where the chain does not say, and then all stays as it was known."""
        await self._see(await self.chain.metagraph(max_age=self.every / 2))

    async def first_look(self) -> Metagraph:
        """As ``look``, and the gateway's own hotkey must be there."""
        metagraph = await registered(self.chain)
        await self._see(metagraph)
        return metagraph

    async def _see(self, metagraph: Metagraph) -> None:
        own = metagraph.by_hotkey.get(self.gateway.own)
        may_ask = own is not None and own.validator_permit
        if may_ask != self._may_ask:
            told = "has a validator permit" if may_ask else "has no validator permit: most miners refuse it"
            _log.warning("permit", extra={"detail": f"{self.gateway.own} {told}"})
        self._may_ask = may_ask
        await self.gateway.see(metagraph)
        if (found := self._found()) != self._told:
            _log.info("miners", extra={"detail": found})
        self._told = found

    def _found(self) -> str:
        """Who is there, and what keeps the others away."""
        peers = self.gateway.asker.peers
        told = ", ".join(f"{name} by {len(peers.serving(name))}" for name in self.gateway.tiers.tiers)
        silent = peers.silent()
        return told + (f"; {len(silent)} silent, such as uid {silent[0][0].uid}: {silent[0][1]}" if silent else "")

    async def close(self) -> None:
        """Close what is open, behind the last request."""
        await self.client.aclose()
        await self.chain.close()
        self.gateway.asker.close()
        await asyncio.to_thread(self.gateway.usage.close)
        if self.gateway.asker.audits is not None:
            self.gateway.asker.audits.close()


def load_descriptions(tiers: Tiers, models: Sequence[str]) -> dict[str, ModelDescription]:
    """What answers of each tier's model are checked against; no weights are loaded.

    models: folders or names to read instead (``Tiers.sources``).

    Raises:
        ValueError: config or tokenizer cannot be had, or one of ``models`` is no tier's.
    """
    return {name: describe_model(source) for name, source in tiers.sources(models).items()}


async def serve(
    running: Running,
    listening: Listening,
    *,
    keys: Keys | None = None,
    stop_seconds: float = 30.0,
    started: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; what was accepted by then is finished.

    Raises:
        ChainFailure: there is no chain, or it does not know the hotkey. WrongClock: signatures would be refused.
    """
    clock = ClockWatch(running.chain)
    sys.setswitchinterval(SWITCH_SECONDS)
    limits = HttpLimits()
    app = create_gateway_app(running.gateway, keys=keys, limits=limits, stop_seconds=stop_seconds)
    server = Server(
        app,
        limits=limits,
        stop_seconds=stop_seconds,
        certificate=listening.certificate,
        key=listening.key,
        started=started,
    )
    try:
        await running.first_look()
        await clock.check()
        beside = asyncio.gather(keep_looking(running.look, running.every), clock.run())
        try:
            await server.serve(sockets=[listening.bound])
        finally:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
    finally:
        await running.close()


async def tried(running: Running) -> dict[str, Any]:
    """What this gateway would do: look at the chain and the miners, and ask them for one text of each tier.

    Nothing is served. Errors as of ``serve``.
    """
    gateway = running.gateway
    try:
        metagraph = await running.first_look()
        await ClockWatch(running.chain).check()
        await gateway.start()
        own = metagraph.by_hotkey.get(gateway.own)
        return {
            "hotkey": gateway.own,
            "netuid": metagraph.netuid,
            "uid": None if own is None else own.uid,
            "permit": own is not None and own.validator_permit,
            "block": metagraph.block,
            "silent": {peer.uid: why for peer, why in gateway.asker.peers.silent()},
            "tiers": {name: await _tried(gateway, name) for name in gateway.tiers.tiers},
        }
    finally:
        await running.close()


async def _tried(gateway: Gateway, name: str) -> dict[str, Any]:
    """How a text of a tier went."""
    tier, loop = gateway.tiers.tiers[name], asyncio.get_running_loop()
    told: dict[str, Any] = {"miners": len(gateway.asker.peers.serving(name))}
    begun = loop.time()
    try:
        made = await gateway.compress(RoutedRequest(text=tier.sample(), tier=name))
    except ServingError as error:
        return told | {"error": str(error)}
    return told | {**made.told, "soft_tokens": made.num_soft_tokens, "seconds": round(loop.time() - begun, 3)}
