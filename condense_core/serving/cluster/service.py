"""``RayService``: what the HTTP application asks, answered by replicas on a cluster."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from condense_core.serving.cluster.figures import FrontObserver
from condense_core.serving.cluster.replica import Failure, Report
from condense_core.serving.errors import (
    DeadlineExceeded,
    InternalError,
    QueueFull,
    ServingError,
    ShuttingDown,
    WorkerLost,
)
from condense_core.serving.requests import MAX_TIMEOUT, AnswerRequest, CompressRequest, PruneRequest, Request
from condense_core.serving.service import CacheStream
from condense_core.serving.wire import Compressed

T = TypeVar("T")
R = TypeVar("R", bound=Request)

_log = logging.getLogger(__name__)
_REFRESH = 1.0  # seconds between two looks at the replicas
_REPORT_TIMEOUT = 5.0
_FRESH = 10.0  # seconds for which a report counts
_DEAD_AFTER = 120.0  # seconds without any report: a replica that starts takes less
_OF_REPLICA = ("device_failed", "shutting_down")
"""Codes of errors that say something of a replica, and nothing of a request: another replica may answer it."""


class _Lost(Exception):
    """The replica that worked on a request is gone."""


class RayService:
    """A ``Service`` whose engines are replicas of a Ray Serve deployment.

    All requests may be repeated without harm, so that one whose replica ends is tried once more, by another one and
    with the time that is left to it. A client gets one answer: that of the last try.
    """

    def __init__(
        self,
        handle: Any,
        first: Report,
        *,
        observer: FrontObserver | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        """Ask the deployment behind ``handle``.

        Args:
            handle: a ``DeploymentHandle`` to ``EngineReplica``s.
            first: what one of them reported.
            observer: is told what clients got, and what replicas report.
            close: called when the service has stopped.
        """
        self._handle, self._observer, self._close = handle, observer, close
        self._compress, self._answer = handle.compress, handle.answer
        self._prune = handle.options(stream=True).prune
        self._reports, self._seen = [first], time.monotonic()
        self._facts = first.facts
        self._state = "new"
        self._refreshing: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._state = "running"
        await self._refresh()
        self._refreshing = asyncio.ensure_future(self._keep_fresh())

    async def stop(self, timeout: float | None) -> None:
        """End. What was accepted has been answered before: whoever accepts requests waits for its answers."""
        if self._state == "stopped":
            return
        self._state = "stopped"
        if self._refreshing is not None:
            self._refreshing.cancel()
        if self._close is not None:
            await asyncio.to_thread(self._close)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH)
            await self._refresh()

    async def _refresh(self) -> None:
        """Ask all replicas for a report; where that fails, since one of them hangs, ask any."""
        try:
            asked = self._handle.broadcast("report")
            told = await asked.results_async(timeout_s=_REPORT_TIMEOUT, return_exceptions=True)
        except Exception:
            try:
                told = [await asyncio.wait_for(self._asked(self._handle.report)(), _REPORT_TIMEOUT)]
            except (_Lost, ServingError, TimeoutError):  # none is there, and what is known grows old
                return
        reports = sorted((each for each in told if isinstance(each, Report)), key=lambda report: report.replica)
        if reports:
            self._reports, self._seen, self._facts = reports, time.monotonic(), reports[0].facts
        if self._observer is not None:
            self._observer.reports = reports

    # -- requests ------------------------------------------------------------------------------------------------------

    async def compress(self, request: CompressRequest) -> Compressed:
        started = time.monotonic()
        made: Compressed = await self._observed("compress", request, self._asked(self._compress))
        known = sum(made.timing.get(stage, 0.0) for stage in ("queue", "tokenize", "run", "write"))
        way = max(time.monotonic() - started - known, 0.0)  # to the replica and back, and what was lost with another
        return replace(made, timing={**made.timing, "cluster": way})

    async def answer(self, request: AnswerRequest) -> dict[str, Any]:
        answer: dict[str, Any] = await self._observed("answer", request, self._asked(self._answer))
        return answer

    async def prune(self, request: PruneRequest) -> CacheStream:
        return await self._observed("prune", request, self._opened)

    async def _observed(self, kind: str, request: R, ask: Callable[[R], Awaitable[T]]) -> T:
        """What ``_answered`` gives, counted as what the client got."""
        started, code = time.monotonic(), "internal"
        try:
            value, code = await self._answered(request, ask, started), "ok"
            return value
        except ServingError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = "cancelled"
            raise
        finally:
            if self._observer is not None:
                self._observer.ended(kind, code, time.monotonic() - started)

    async def _answered(self, request: R, ask: Callable[[R], Awaitable[T]], started: float) -> T:
        """What ``ask`` gives, given the request with the seconds that are left to it; a lost one is asked once more."""
        if self._state != "running":
            raise ShuttingDown(f"the server is {self._state}, expected one that runs", retry_after=5.0)
        timeout = request.timeout or float(self._facts["limits"]["timeout"])
        for _ in range(2):
            left = started + timeout - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                async with asyncio.timeout(left):
                    return await ask(replace(request, timeout=min(left, MAX_TIMEOUT)))
            except TimeoutError:
                raise DeadlineExceeded(
                    f"timeout: {timeout:g} s are over, expected the answer to take less, or more of them"
                ) from None
            except _Lost as lost:
                _log.warning("a replica was lost while it worked on a request: %s", lost)
        raise WorkerLost(
            "two replicas ended while they worked on this, one after the other; try again in 1 s", retry_after=1.0
        )

    def _asked(self, method: Any) -> Callable[..., Awaitable[Any]]:
        """``method`` of a replica, as a function."""

        async def ask(*arguments: Any) -> Any:
            response = method.remote(*arguments)
            return await self._settled(response, _awaited(response))

        return ask

    async def _opened(self, request: PruneRequest) -> CacheStream:
        """A stream whose size has come; the rest comes from the same replica, or not at all."""
        stream = self._prune.remote(request)
        nbytes = await self._settled(stream, stream.__anext__())

        async def chunks() -> AsyncIterator[bytes | memoryview]:
            left = nbytes
            try:
                while left > 0:
                    chunk = await self._settled(stream, stream.__anext__())
                    left -= len(chunk)
                    yield chunk
            except _Lost:
                raise WorkerLost("the replica ended while its answer was under way; expected a new request") from None
            finally:
                if left > 0:
                    _cancel(stream)

        return CacheStream(nbytes, chunks())

    async def _settled(self, response: Any, work: Any) -> Any:
        """What ``work``, which waits for ``response``, gives; the call is cancelled with whoever waits here.

        Raises:
            _Lost: the replica is gone. ServingError: that it answered with, or that says why it was not asked.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task})
        finally:
            if not task.done():
                task.cancel()
                _cancel(response)
        if task.cancelled():  # not by anybody here: the replica gave it up
            raise _Lost("it gave the request up")
        error = task.exception()
        if isinstance(error, BackPressureError):
            after = max(float(self._queue()["wait_seconds"]), 1.0)
            raise QueueFull(
                f"queue: too many requests wait for a replica, expected fewer; try again in {after:.1f} s",
                retry_after=after,
            )
        if isinstance(error, RayTaskError):  # raised by its code; the message may hold contents
            _log.error("%s in a replica, whose log says where", type(error.cause).__name__)
            raise InternalError("a mistake of this server; the log of a replica says where")
        if isinstance(error, RayError | RayServeException | StopAsyncIteration | OSError):
            raise _Lost(type(error).__name__) from error
        if error is not None:
            raise error
        value = task.result()
        if isinstance(value, Failure):
            if value.code in _OF_REPLICA:
                raise _Lost(value.code)
            raise value.error()
        return value

    # -- facts ---------------------------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        return [{**self._facts, "queue": self._queue(), "replicas": len(self._reports)}]

    def load(self) -> dict[str, Any]:
        each = [
            {"replica": report.replica, "host": report.host, "pid": report.pid, "ready": report.ready, **report.load}
            for report in self._reports
        ]
        return {**self._queue(), "replicas": each}

    def _queue(self) -> dict[str, Any]:
        """How much there is to do in all; a request that comes now waits as long as the freest replica lets it."""
        loads = [report.load for report in self._reports]
        return {
            "waiting": sum(load["waiting"] for load in loads),
            "running": sum(load["running"] for load in loads),
            "wait_seconds": min(load["wait_seconds"] for load in loads),
        }

    @property
    def is_ready(self) -> bool:
        age = time.monotonic() - self._seen
        return self._state == "running" and age < _FRESH and any(report.ready for report in self._reports)

    @property
    def is_healthy(self) -> bool:
        return time.monotonic() - self._seen < _DEAD_AFTER


async def _awaited(response: Any) -> Any:
    return await response


def _cancel(response: Any) -> None:
    with suppress(Exception):  # that it was cancelled, or had failed already
        response.cancel()
