"""What the HTTP application asks of whatever computes: an engine in this process, or others elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.requests import AnswerRequest, CompressRequest, PruneRequest
from condense_core.serving.wire import Compressed

_WRITTEN_AT_ONCE = 2**20
"""Bytes of soft tokens that the event loop writes itself: less than a millisecond, which handing them to a thread and
back takes as well."""


def is_written_at_once(soft: SoftTokens) -> bool:
    """Whether an event loop writes ``soft`` itself, as bytes; what is larger, or on a device, is for a thread."""
    return soft.embeds.device.type == "cpu" and soft.nbytes <= _WRITTEN_AT_ONCE


SWITCH_SECONDS = 0.0005
"""How long the thread of the device may hold the interpreter while an event loop waits for it; Python's own 5 ms would
be most of a request's overhead. For ``sys.setswitchinterval``."""


@dataclass(frozen=True)
class CacheStream:
    """A pruned cache on its way: its size as a file, and its bytes."""

    nbytes: int
    chunks: AsyncIterator[bytes | memoryview]


class Hosted(Protocol):
    """What an application starts, stops and tells of."""

    async def start(self) -> None:
        """Get ready."""

    async def stop(self, timeout: float | None) -> None:
        """Finish what was accepted, for at most so many seconds, and end."""

    def models(self) -> list[dict[str, Any]]:
        """What is offered, for each model: JSON."""

    def load(self) -> dict[str, Any]:
        """How much there is to do."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""

    @property
    def is_healthy(self) -> bool:
        """Whether the process can go on."""


class Service(Hosted, Protocol):
    """Compression, as bytes. All methods raise ``ServingError``."""

    async def compress(self, request: CompressRequest) -> Compressed:
        """Soft tokens of a text."""

    async def prune(self, request: PruneRequest) -> CacheStream:
        """A pruned cache of a text."""

    async def answer(self, request: AnswerRequest) -> dict[str, Any]:
        """The model's own answer."""


class LocalService:
    """An engine of this process."""

    def __init__(self, engine: CompressionEngine) -> None:
        self.engine = engine
        self._writing = ThreadPoolExecutor(2, "condense-write")

    async def start(self) -> None:
        await self.engine.start()

    async def stop(self, timeout: float | None) -> None:
        await self.engine.stop(timeout)
        self._writing.shutdown(wait=False)

    async def compress(self, request: CompressRequest) -> Compressed:
        made = await self.engine.submit_timed(request)
        if is_written_at_once(made.value):
            return self._written(made.value, made.timing)
        return await asyncio.get_running_loop().run_in_executor(self._writing, self._written, made.value, made.timing)

    def _written(self, soft: SoftTokens, timing: Mapping[str, float]) -> Compressed:
        started = time.monotonic()
        payload = soft.to_bytes()
        seconds = time.monotonic() - started
        self.engine.observer.written(len(payload), seconds)
        return Compressed(
            payload,
            soft.num_context_tokens,
            len(soft),
            soft.ratio,
            soft.method,
            soft.model_id,
            soft.text,
            timing={**timing, "write": seconds},
        )

    async def prune(self, request: PruneRequest) -> CacheStream:
        cache = await self.engine.prune(request)
        loop = asyncio.get_running_loop()
        nbytes, parts = await loop.run_in_executor(self._writing, cache.serialized)

        async def chunks() -> AsyncIterator[bytes | memoryview]:
            while (part := await loop.run_in_executor(self._writing, next, parts, None)) is not None:
                for start in range(0, len(part), 2**20):
                    yield part[start : start + 2**20]

        self.engine.observer.written(nbytes, 0.0)
        return CacheStream(nbytes, chunks())

    async def answer(self, request: AnswerRequest) -> dict[str, Any]:
        return await self.engine.answer(request)

    def models(self) -> list[dict[str, Any]]:
        return [self.engine.facts()]

    def load(self) -> dict[str, Any]:
        return self.engine.load()

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready

    @property
    def is_healthy(self) -> bool:
        return self.engine.is_healthy
