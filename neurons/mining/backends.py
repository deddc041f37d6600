"""What compresses for a miner: an engine in its process, a server elsewhere, or one's own class."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol, TypeVar

from condense_core.compressor.config import FRACTIONAL_METHODS
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.identity import same_name
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import Tier
from condense_core.serving.async_client import AsyncCondenseClient
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.requests import CompressRequest
from condense_core.serving.service import is_written_at_once

T = TypeVar("T")


class Backend(Protocol):
    """Compresses. All errors of ``compress`` that callers should see are ``ServingError``."""

    async def start(self) -> None:
        """Get ready."""

    async def stop(self) -> None:
        """Finish what was accepted, and end."""

    def serves(self, tier: Tier) -> bool:
        """Whether it makes soft tokens of this tier's model."""

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        """Soft tokens of a text: at the asked ratio or a higher one, within ``timeout`` seconds."""

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked."""

    @property
    def is_healthy(self) -> bool:
        """Whether the process can go on."""


class EngineBackend:
    """An engine of this process.

    method: of its compressors; None: its first. A question is used where that is ``select``.
    """

    def __init__(self, engine: CompressionEngine, method: str | None = None) -> None:
        self.engine, self.method = engine, method or str(engine.facts()["default_method"])

    async def start(self) -> None:
        await self.engine.start()

    async def stop(self) -> None:
        await self.engine.stop()

    def serves(self, tier: Tier) -> bool:
        return same_name(tier.model, str(self.engine.facts()["id"]))

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        question = ask.question if self.method == "select" else None
        ratio = served_ratio(ask.ratio, self.method, self.engine.facts()["methods"][self.method]["ratios"])
        request = CompressRequest(
            text=ask.text, method=self.method, ratio=ratio, question=question, priority=priority, timeout=timeout
        )
        return await self.engine.compress(request)

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready

    @property
    def is_healthy(self) -> bool:
        return self.engine.is_healthy


class RemoteBackend:
    """A ``condense serve`` elsewhere; its model is asked for once, at the start."""

    def __init__(self, url: str, *, api_key: str | None = None, method: str | None = None) -> None:
        self.client = AsyncCondenseClient(url, api_key=api_key)
        self.method = method
        self._models: list[str] = []
        self._default = ""
        self._ratios: dict[str, Sequence[float] | str] = {}  # by method

    async def start(self) -> None:
        offered = await self.client.models()
        self._models = [str(model["id"]) for model in offered]
        self._default = str(offered[0].get("default_method", "")) if offered else ""
        methods = offered[0].get("methods", {}) if offered else {}
        self._ratios = {name: facts["ratios"] for name, facts in methods.items()}

    async def stop(self) -> None:
        await self.client.aclose()

    def serves(self, tier: Tier) -> bool:
        return any(same_name(tier.model, model) for model in self._models)

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        method = self.method or self._default
        ratio = served_ratio(ask.ratio, method, self._ratios.get(method, "any"))
        fields: dict[str, Any] = {"ratio": ratio, "timeout": timeout}
        if self.method is not None:
            fields["method"] = self.method
        if ask.question is not None and method == "select":
            fields["question"] = ask.question
        return await self.client.compress(ask.text, **fields)

    @property
    def is_ready(self) -> bool:
        return bool(self._models)

    @property
    def is_healthy(self) -> bool:
        return True


def own_backend(name: str, **settings: Any) -> Backend:
    """A backend of one's own, named ``module:Class``; ``ValueError`` where that is none."""
    module, _, cls = name.partition(":")
    try:
        made = getattr(import_module(module), cls)(**settings)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"backend: {name!r} cannot be made ({' '.join(str(error).split())})") from None
    if missing := [part for part in ("start", "stop", "serves", "compress") if not callable(getattr(made, part, None))]:
        raise ValueError(f"backend: {name!r} has no {', '.join(missing)}, expected those of mining.backends.Backend")
    own: Backend = made
    return own


def served_ratio(asked: float, method: str, ratios: Sequence[float] | str) -> float:
    """The smallest ratio of a compressor that is at least ``asked``, which an answer must have; none: ``asked`` itself.

    ratios: that its checkpoint serves, or "any".
    """
    if method in FRACTIONAL_METHODS:
        return asked
    offered = [math.ceil(asked)] if isinstance(ratios, str) else ratios
    return min((ratio for ratio in offered if ratio >= asked), default=asked)


async def answer_of(backend: Backend, ask: Ask, finish: Callable[[bytes], T], *, priority: int, timeout: float) -> T:
    """What ``finish`` makes of the soft tokens for a request, as a file; a large one is made in a thread.

    Errors as of ``Backend.compress``; ``SoftTokensError`` where the backend made none that are finite.
    """
    soft = without_text(await backend.compress(ask, priority=priority, timeout=timeout))
    if is_written_at_once(soft):
        return finish(soft.to_bytes())
    return await asyncio.to_thread(lambda: finish(soft.to_bytes()))


def without_text(soft: SoftTokens) -> SoftTokens:
    """Soft tokens without the words that were kept, which whoever asked has already."""
    return replace(soft, text="") if soft.text else soft
