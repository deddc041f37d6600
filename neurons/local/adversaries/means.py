"""What an adversary has to work with, and the miner that it is in all but its answers."""

from __future__ import annotations

from dataclasses import dataclass

from condense_core.compressor.condenser import Condenser
from condense_core.neurons.asking.client import Peer
from condense_core.neurons.mining.app import Caller, Miner
from condense_core.neurons.mining.backends import Backend, without_text
from condense_core.neurons.mining.gate import Gate
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.protocol.nonces import SqliteNonceStore
from condense_core.neurons.protocol.signing import Hotkey, sign_response
from condense_core.neurons.tiers import Tiers


@dataclass(frozen=True)
class Means:
    """What an adversary has to work with.

    Attributes:
        good: a backend that compresses, which some use now and then.
        condenser: of the tiers' model, whose table of embeddings others take their answers from.
        victim: a miner, and a friend of its own, whose answers others take.
        seconds: that some may take to get ready.
    """

    hotkey: Hotkey
    tiers: Tiers
    good: Backend
    condenser: Condenser
    gate: Gate
    nonces: SqliteNonceStore
    victim: Peer | None = None
    seconds: float = 10.0


class Adversary(Miner):
    """A miner that answers with ``backend``, by default what its means have; others change what they send."""

    def __init__(self, means: Means, backend: Backend | None = None) -> None:
        super().__init__(means.hotkey, means.tiers, backend or means.good, means.gate, means.nonces)
        self.means = means

    async def answer(self, body: bytes, caller: Caller) -> tuple[bytes, dict[str, str]]:
        self.gate.check(caller.hotkey)
        ask, tier, secret = self.opened(body, caller)
        payload = await self.payload(ask, tier.timeout)
        if secret is not None:
            payload = secret.seal_answer(payload)
        return payload, self.signed(payload, caller)

    async def payload(self, ask: Ask, timeout: float) -> bytes:
        """What is sent, before it is sealed."""
        return without_text(await self.backend.compress(ask, priority=0, timeout=timeout)).to_bytes()

    def signed(self, payload: bytes, caller: Caller) -> dict[str, str]:
        """The headers that sign it."""
        return sign_response(self.hotkey, nonce_ns=caller.nonce_ns, caller=caller.hotkey, status=200, body=payload)

    async def stop(self) -> None:
        """End what belongs to it alone."""
