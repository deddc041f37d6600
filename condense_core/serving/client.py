"""Clients of ``condense serve``: ``CondenseClient``, and from ``async_client`` the one for programs with an event loop.

The client without an event loop runs the other one in a thread of its own. Blocking sockets have a time limit for each
read, which a server that sends a byte now and then never exceeds; a task can be cancelled at its deadline wherever it
waits, and so can it when Ctrl-C ends the wait for it.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from condense_core.serving.async_client import AsyncCondenseClient
from condense_core.serving.client_calls import (
    DEFAULT_MAX_BYTES,
    DEFAULT_MAX_CACHE_BYTES,
    AnswerFields,
    CompressFields,
    PruneFields,
    checked_texts,
    long_messages,
)
from condense_core.serving.errors import ServingError

if TYPE_CHECKING:
    from condense_core.compressor.soft_tokens import SoftTokens
    from condense_core.pruning.cache import PrunedCache

__all__ = ["AsyncCondenseClient", "CondenseClient"]

T = TypeVar("T")


class CondenseClient:
    """Asks a server, from any number of threads.

    >>> with CondenseClient("http://localhost:8000") as client:
    ...     soft = client.compress(text, ratio=4)

    Its methods, their arguments and errors are those of ``AsyncCondenseClient``. In a process that was forked it opens
    connections of its own.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        ca_file: str | Path | None = None,
    ) -> None:
        def make() -> AsyncCondenseClient:
            return AsyncCondenseClient(
                base_url, api_key=api_key, timeout=timeout, retries=retries, max_bytes=max_bytes, ca_file=ca_file
            )

        self._make, self._closed = make, False
        self._worker = _Worker(make())  # what makes no sense is refused now

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._worker.client.base_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls that other threads wait for end with a ``RuntimeError``."""
        if not self._closed:
            self._closed = True
            self._worker.close()

    # -- compression ---------------------------------------------------------------------------------------------------

    def compress(self, text: str, **fields: Unpack[CompressFields]) -> SoftTokens:
        """Soft tokens of a text."""
        return self._run(lambda client: client.compress(text, **fields))

    @overload
    def compress_many(
        self, texts: Iterable[str], *, return_errors: Literal[False] = False, **fields: Unpack[CompressFields]
    ) -> list[SoftTokens]: ...

    @overload
    def compress_many(
        self, texts: Iterable[str], *, return_errors: bool, **fields: Unpack[CompressFields]
    ) -> list[SoftTokens | ServingError]: ...

    def compress_many(
        self, texts: Iterable[str], *, return_errors: bool = False, **fields: Unpack[CompressFields]
    ) -> Any:
        """Soft tokens of each text, in order; return_errors: the error of a text stands in its place."""
        given = checked_texts(texts)
        return self._run(lambda client: client.compress_many(given, return_errors=return_errors, **fields))

    def compress_stream(
        self, texts: Iterable[str], **fields: Unpack[CompressFields]
    ) -> Iterator[tuple[int, SoftTokens | ServingError]]:
        """Index and soft tokens, or error, of each text, as they are done."""
        worker = self._running()
        stream, turn = worker.client.compress_stream(checked_texts(texts), **fields), asyncio.Lock()

        async def step() -> tuple[int, SoftTokens | ServingError] | None:
            async with turn:
                return await anext(stream, None)

        async def end() -> None:
            async with turn:  # a step that was interrupted may still be on its way out
                await stream.aclose()

        try:
            while (found := worker.run(step())) is not None:
                yield found
        finally:
            worker.post(end)

    def compress_messages(
        self, messages: Iterable[Mapping[str, Any]], min_chars: int = 1000, **fields: Unpack[CompressFields]
    ) -> list[dict[str, Any]]:
        """Messages of a chat, with soft tokens as the ``content`` of those of at least ``min_chars`` characters."""
        chat, _ = long_messages(messages, min_chars)
        return self._run(lambda client: client.compress_messages(chat, min_chars, **fields))

    # -- caches and answers --------------------------------------------------------------------------------------------

    def prune(
        self,
        text: str,
        *,
        max_bytes: int = DEFAULT_MAX_CACHE_BYTES,
        folder: str | Path | None = None,
        **fields: Unpack[PruneFields],
    ) -> PrunedCache:
        """A pruned cache of a text, mapped from a file that has no name any more."""
        return self._run(lambda client: client.prune(text, max_bytes=max_bytes, folder=folder, **fields))

    def answer(self, text: str, question: str, **fields: Unpack[AnswerFields]) -> dict[str, Any]:
        """What the server's model answers to a question about a text."""
        return self._run(lambda client: client.answer(text, question, **fields))

    # -- the server ----------------------------------------------------------------------------------------------------

    def models(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """What the server offers."""
        return self._run(lambda client: client.models(timeout=timeout))

    def load(self, *, timeout: float | None = None) -> dict[str, Any]:
        """How much the server has to do."""
        return self._run(lambda client: client.load(timeout=timeout))

    def is_ready(self, *, timeout: float | None = None) -> bool:
        """Whether the server accepts requests, asked once; False where it cannot be reached."""
        return self._run(lambda client: client.is_ready(timeout=timeout))

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _running(self) -> _Worker:
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._worker.pid != os.getpid():  # threads do not survive a fork, and connections must not be shared
            self._worker = _Worker(self._make())
        return self._worker

    def _run(self, ask: Callable[[AsyncCondenseClient], Coroutine[Any, Any, T]]) -> T:
        worker = self._running()
        return worker.run(ask(worker.client))


class _Worker:
    """An event loop in a thread of its own, and the client that lives in it."""

    def __init__(self, client: AsyncCondenseClient) -> None:
        self.client, self.pid = client, os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="condense-client", daemon=True)
        self._thread.start()
        self._tasks: set[asyncio.Task[None]] = set()
        self._forgotten = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        self._forgotten.atexit = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` gives; it is cancelled where the wait for it is interrupted."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the client was closed while a call waited for its answer") from None
        except BaseException:
            future.cancel()
            raise

    def post(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start work that nobody waits for; nothing where the loop is closed."""

        def start() -> None:
            task = self._loop.create_task(make())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(start)

    def close(self) -> None:
        """End all work and the thread."""
        self._forgotten.detach()
        if self.pid != os.getpid():  # the thread is the parent's
            return
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self.client.aclose()
