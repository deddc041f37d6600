"""A gateway with miners on real sockets of this process, some of them hostile, for tests and for fuzzing."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from condense_core.compressor.config import num_kept
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.description import ModelDescription, describe_model
from condense_core.neurons.asking.client import NeuronClient
from condense_core.neurons.asking.peers import Peers
from condense_core.neurons.chain.base import Metagraph, Neuron
from condense_core.neurons.judging.audits import AuditSpool
from condense_core.neurons.mining.app import Caller, Miner, create_miner_app, miner_limits
from condense_core.neurons.mining.gate import Gate, GateSettings
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.protocol.nonces import SqliteNonceStore
from condense_core.neurons.protocol.signing import sign_response
from condense_core.neurons.routing.asking import Asker
from condense_core.neurons.routing.gateway import Gateway, GatewaySettings
from condense_core.neurons.routing.observer import GatewayObserver
from condense_core.neurons.routing.ranking import Ranking
from condense_core.neurons.routing.usage import UsageLog
from condense_core.neurons.tiers import Tier, Tiers, read_tiers
from condense_core.serving.http.server import Server, bound_socket
from condense_testing.chains import NETUID, key

MODEL = "condense-tiny"
TEXT = "The keeper of the north archive counts the lamps at dusk. " * 30
Twist = Callable[[bytes, Ask], Awaitable[bytes]]
"""Makes of the right answer to a request another one."""


def small_tiers(timeout: float = 3.0, **changes: Any) -> Tiers:
    """The subnet's tiers, of the embedded model."""
    known = read_tiers()
    made = {n: t.model_copy(update={"model": MODEL, "timeout": timeout, **changes}) for n, t in known.tiers.items()}
    return known.model_copy(update={"tiers": made})


@dataclass
class Made:
    """A backend that makes right soft tokens of random rows, after ``seconds``; miners of one seed make the same."""

    described: ModelDescription
    seconds: float = 0.0
    seed: int = 0
    is_ready = is_healthy = True
    asked: list[Ask] = field(default_factory=list)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def serves(self, tier: Tier) -> bool:
        return tier.model == MODEL

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        self.asked.append(ask)
        await asyncio.sleep(self.seconds)
        return self.made(ask)

    def made(self, ask: Ask) -> SoftTokens:
        tokens = self.described.count(ask.text)
        ratio = int(ask.ratio) if ask.ratio == int(ask.ratio) else ask.ratio
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(num_kept(tokens, ratio), self.described.width, generator=generator)
        digest = hashlib.sha256(ask.text.encode()).hexdigest()
        return SoftTokens(rows, tokens, ratio, MODEL, context_sha256=digest, model_digest=self.described.digest)


class Twisted(Miner):
    """A miner that signs and seals what ``twist`` makes of the right answer; None: the right one."""

    twist: Twist | None = None

    async def answer(self, body: bytes, caller: Caller) -> tuple[bytes, dict[str, str]]:
        if self.twist is None:
            return await super().answer(body, caller)
        assert isinstance(self.backend, Made)
        ask, _, secret = self.opened(body, caller)
        payload = await self.twist(self.backend.made(ask).to_bytes(), ask)
        if secret is not None:
            payload = secret.seal_answer(payload)
        signed = sign_response(self.hotkey, nonce_ns=caller.nonce_ns, caller=caller.hotkey, status=200, body=payload)
        return payload, signed


@dataclass
class Subnet:
    """A gateway and its miners."""

    gateway: Gateway
    miners: list[Twisted]
    addresses: list[str | None]

    async def see(self, incentives: Sequence[float] = ()) -> None:
        """Let the gateway look at the chain, which pays miners by ``incentives``."""
        await self.gateway.see(self.metagraph(incentives))

    def metagraph(self, incentives: Sequence[float] = ()) -> Metagraph:
        own = Neuron(0, self.gateway.own, "cold", None, True, 1000.0, 0.0, True, 0, 0, 0.0, 0.0, 0.0)
        rows = [own]
        for n, (miner, address) in enumerate(zip(self.miners, self.addresses, strict=True)):
            paid = incentives[n] if n < len(incentives) else 0.0
            name = miner.hotkey.ss58_address
            rows.append(Neuron(n + 1, name, "cold", address, False, 0.0, 0.0, True, 0, 0, paid, 0.0, 0.0))
        return Metagraph(NETUID, 1, tuple(rows), 360, 0, None)

    def name(self, n: int) -> str:
        return self.miners[n].hotkey.ss58_address

    def backend(self, n: int) -> Made:
        backend = self.miners[n].backend
        assert isinstance(backend, Made)
        return backend


@asynccontextmanager
async def subnet(
    folder: Path,
    *,
    miners: int = 3,
    tiers: Tiers | None = None,
    settings: GatewaySettings | None = None,
    seconds: Sequence[float] = (),
    seeds: Sequence[int] = (),
    explore: float = 0.0,
    audits: AuditSpool | None = None,
    seed: int = 0,
) -> AsyncIterator[Subnet]:
    """A gateway that has seen so many miners, each of which takes its ``seconds``; ``folder`` holds what they keep."""
    tiers, described, own = tiers or small_tiers(), describe_model(MODEL), key("validator")
    row = Neuron(0, own.ss58_address, "cold", None, True, 1000.0, 0.0, True, 0, 0, 0.0, 0.0, 0.0)
    async with AsyncExitStack() as stack:
        made, addresses = [], []
        for n in range(miners):
            gate = Gate(GateSettings(requests_per_minute=1e6))
            gate.update(Metagraph(NETUID, 0, (row,), 360, 0, None))
            backend = Made(described, seconds[n] if n < len(seconds) else 0.0, seeds[n] if n < len(seeds) else n)
            nonces = SqliteNonceStore(folder / f"nonces{n}.db")
            miner = Twisted(key(f"miner{n}"), tiers, backend, gate, nonces)
            addresses.append(await stack.enter_async_context(on_socket(miner)))
            made.append(miner)
        client = await stack.enter_async_context(NeuronClient(own, private=True, connections=512))
        rng = Random(seed)
        asker = Asker(
            Peers(client), Ranking(explore=explore, rng=rng), {MODEL: described}, GatewayObserver(), audits=audits
        )
        stack.callback(asker.close)
        usage = UsageLog(folder)
        stack.callback(usage.close)
        gateway = Gateway(tiers, asker, usage, own.ss58_address, settings=settings, rng=rng)
        await gateway.start()
        found = Subnet(gateway, made, addresses)
        await found.see()
        yield found


@asynccontextmanager
async def on_socket(miner: Miner) -> AsyncIterator[str]:
    """A miner on a port of this process; yields its address."""
    bound = bound_socket("127.0.0.1", 0)
    await miner.start()
    server = Server(create_miner_app(miner), limits=miner_limits(miner.tiers), stop_seconds=0.0, signals=False)
    task = asyncio.ensure_future(server.serve(sockets=[bound]))
    try:
        yield f"127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        bound.close()
        miner.nonces.close()


def is_right(payload: bytes, text: str, least_ratio: float, described: ModelDescription) -> bool:
    """Whether bytes are soft tokens of a text, as far as can be seen; written down apart from the gateway's check."""
    soft = SoftTokens.from_bytes(payload)
    return (
        bool(torch.isfinite(soft.embeds).all())
        and soft.text == ""
        and soft.model_id.endswith(MODEL)
        and soft.model_digest in ("", described.digest)
        and soft.context_sha256 == hashlib.sha256(text.encode()).hexdigest()
        and soft.num_context_tokens == described.count(text)
        and soft.embeds.shape[1] == described.width
        and len(soft) <= math.ceil(described.count(text) / least_ratio)
    )
