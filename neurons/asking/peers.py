"""Who can be asked: the miners of a subnet that say who they are, and which tiers they serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from condense_core.neurons.asking.client import Peer, Reply
from condense_core.neurons.chain.base import Metagraph
from condense_core.neurons.protocol.identity import Identity
from condense_core.neurons.protocol.messages import VERSION, Ask, MessageError

FRESH = 600.0
"""Seconds after which a miner is asked again who it is."""
RETRY = 30.0
"""Seconds after which one that did not say is asked again."""


_SHORTEST = 0.05  # seconds in which it is worth while to ask again
_UNREADABLE = 422


class Asks(Protocol):
    """Asks a miner who it is, and for its answer, as ``NeuronClient`` does."""

    async def identity(self, peer: Peer, *, timeout: float = 5.0) -> Identity: ...

    async def ask(
        self, peer: Peer, ask: Ask, *, timeout: float, max_bytes: int, sealing_key: bytes | None = None
    ) -> Reply: ...


@dataclass(frozen=True)
class _Known:
    """What a miner said, or that it said nothing, and when."""

    peer: Peer
    identity: Identity | None
    at: float
    why: str = ""


class Peers:
    """The miners of a subnet. A miner is whoever has announced an address and says so there, signed by its hotkey.

    What they say is kept for a while: a round costs no requests but its own.
    """

    def __init__(self, client: Asks, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.client, self._clock = client, clock
        self._known: dict[str, _Known] = {}

    async def refresh(self, metagraph: Metagraph, *, but: str | None = None) -> None:
        """Ask all who have not said who they are lately; but: a hotkey that is not asked, one's own."""
        announced = {
            neuron.hotkey: Peer(neuron.hotkey, neuron.address, neuron.uid)
            for neuron in metagraph.neurons
            if neuron.address is not None and neuron.hotkey != but
        }
        self._known = {hotkey: known for hotkey, known in self._known.items() if hotkey in announced}
        stale = [peer for peer in announced.values() if self._is_stale(peer)]
        found = await asyncio.gather(*(self._asked(peer) for peer in stale))
        self._known |= {known.peer.hotkey: known for known in found}

    def serving(self, tier: str) -> list[Peer]:
        """The miners of a tier, by uid."""
        known = (k for k in self._known.values() if k.identity is not None and tier in k.identity.tiers)
        return sorted((k.peer for k in known), key=lambda peer: peer.uid)

    async def ask(self, peer: Peer, ask: Ask, *, timeout: float, max_bytes: int) -> Reply:
        """A miner's answer to a sealed request, or why there is none.

        A miner that was started again has another key, and cannot read what was sealed for its old one: it is asked
        who it is, and then once more. All of it together has ``timeout`` seconds, and all of it is its latency.
        """
        started, key = self._clock(), self._key(peer)
        reply = await self.client.ask(peer, ask, timeout=timeout, max_bytes=max_bytes, sealing_key=key)
        if reply.status != _UNREADABLE or key is None or timeout - (self._clock() - started) < _SHORTEST:
            return reply
        self._known[peer.hotkey] = await self._asked(peer, timeout - (self._clock() - started))
        left, renewed = timeout - (self._clock() - started), self._key(peer)
        if renewed in (None, key) or left < _SHORTEST:
            return reply
        before = self._clock() - started
        reply = await self.client.ask(peer, ask, timeout=left, max_bytes=max_bytes, sealing_key=renewed)
        return replace(reply, seconds=reply.seconds + before)

    def silent(self) -> Sequence[tuple[Peer, str]]:
        """Who has an address and does not say who it is, and why."""
        return [(k.peer, k.why) for k in self._known.values() if k.identity is None]

    def _key(self, peer: Peer) -> bytes | None:
        """What a miner can be sealed for."""
        known = self._known.get(peer.hotkey)
        return None if known is None or known.identity is None else bytes.fromhex(known.identity.sealing_key)

    def _is_stale(self, peer: Peer) -> bool:
        known = self._known.get(peer.hotkey)
        if known is None or known.peer != peer:
            return True
        return self._clock() - known.at > (RETRY if known.identity is None else FRESH)

    async def _asked(self, peer: Peer, timeout: float = 5.0) -> _Known:
        try:
            identity = await self.client.identity(peer, timeout=timeout)
            if identity.version != VERSION:
                raise MessageError(f"identity: version {identity.version} of the protocol, expected {VERSION}")
        except MessageError as error:
            return _Known(peer, None, self._clock(), str(error))
        return _Known(peer, identity, self._clock())
