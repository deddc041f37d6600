"""Living off another miner: its answers as they are, or changed so that nobody sees whose they were.

Whoever copies asks its victim under its own hotkey. A miner answers only validators, so that this works only where the
victim is a friend that lets it in (``--allow``): several hotkeys behind one backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from condense_core.compressor.config import num_kept
from condense_core.compressor.soft_tokens import SoftTokens, SoftTokensError
from condense_core.neurons.asking.client import NeuronClient
from condense_core.neurons.local.adversaries.means import Adversary, Means
from condense_core.neurons.protocol.messages import Ask
from condense_core.serving.errors import QueueFull, ServingError

_MOST_BYTES = 64 * 2**20

Change = Callable[[Tensor, torch.Generator], Tensor]


def _with_noise(share: float) -> Change:
    """Noise of this share of the rows' own spread."""

    def change(rows: Tensor, generator: torch.Generator) -> Tensor:
        return rows + share * rows.std() * torch.randn(rows.shape, generator=generator)

    return change


def _scaled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return 1.2 * rows


def _shifted(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows + 0.3 * rows.std() * torch.randn(rows.shape[1], generator=generator)


def _permuted(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Neighbours change places: what an order is worth stays, more or less."""
    order = torch.arange(len(rows))
    even = order[: len(rows) // 2 * 2].reshape(-1, 2).flip(1).flatten()
    return rows[torch.cat([even, order[len(even) :]])]


CHANGES: dict[str, Change] = {
    "copy-noise": _with_noise(0.1),
    "copy-more-noise": _with_noise(0.5),
    "copy-most-noise": _with_noise(1.0),
    "copy-scaled": _scaled,
    "copy-shifted": _shifted,
    "copy-permuted": _permuted,
}


class Copier(Adversary):
    """Answers with what its victim answers, changed."""

    def __init__(self, means: Means, change: Change | None = None) -> None:
        super().__init__(means)
        self._change = change
        self._client = NeuronClient(means.hotkey, private=True)
        self._generator = torch.Generator().manual_seed(sum(means.hotkey.ss58_address.encode()))

    async def payload(self, ask: Ask, timeout: float) -> bytes:
        body = await self.stolen(ask, timeout)
        if self._change is None:
            return body
        soft = _read(body)
        return replace(soft, embeds=self._change(soft.embeds.float(), self._generator).contiguous()).to_bytes()

    async def stolen(self, ask: Ask, timeout: float) -> bytes:
        """The victim's answer; ``ServingError`` where it gives none."""
        assert self.means.victim is not None
        reply = await self._client.ask(self.means.victim, ask, timeout=timeout, max_bytes=_MOST_BYTES)
        if not reply.is_answer:
            raise QueueFull("busy", retry_after=1.0)
        return reply.body

    async def stop(self) -> None:
        """Close its connections."""
        await self._client.aclose()


class Mixer(Copier):
    """Answers with half of its victim's rows and half of another's: every second row, or the mean of both."""

    def __init__(self, means: Means, *, blend: bool) -> None:
        super().__init__(means)
        self._blend = blend

    async def payload(self, ask: Ask, timeout: float) -> bytes:
        soft = _read(await self.stolen(ask, timeout))
        own = await self.backend.compress(ask, priority=0, timeout=timeout)
        if len(own) != len(soft):  # of another ratio
            return soft.to_bytes()
        both = torch.stack([soft.embeds.float(), own.embeds.float()])
        rows = both.mean(0) if self._blend else both[torch.arange(len(soft)) % 2, torch.arange(len(soft))]
        return replace(soft, embeds=rows.contiguous()).to_bytes()


class Coarsener(Copier):
    """Answers with the mean of each two rows of its victim, at twice the ratio."""

    async def payload(self, ask: Ask, timeout: float) -> bytes:
        soft = _read(await self.stolen(ask, timeout))
        count = num_kept(soft.num_context_tokens, 2 * soft.ratio)
        rows = soft.embeds.float()
        pairs = [rows[2 * i : 2 * i + 2].mean(0) for i in range(count)]
        return replace(soft, embeds=torch.stack(pairs), ratio=2 * soft.ratio).to_bytes()


def _read(body: bytes) -> SoftTokens:
    try:
        return SoftTokens.from_bytes(body)
    except SoftTokensError as error:
        raise ServingError(str(error)) from None
