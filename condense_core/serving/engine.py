"""``CompressionEngine``: many asynchronous callers, one device.

A request is checked, accepted or refused at once, made tokens of by a thread, and waits in a queue. One more thread
owns the device: it takes what may run together, runs it, and hands each caller its own result or error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, Self

import torch

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.pruning.cache import PrunedCache
from condense_core.serving.cost import CostModel
from condense_core.serving.errors import (
    DeadlineExceeded,
    DeviceFailed,
    InternalError,
    InvalidRequest,
    OutOfMemory,
    ServingError,
    ShuttingDown,
    TooLarge,
    mistake,
)
from condense_core.serving.metrics import NO_METRICS, Observer
from condense_core.serving.queue import Prepared, RequestQueue, Ticket, Timed
from condense_core.serving.requests import AnswerRequest, CompressRequest, PruneRequest, Request
from condense_core.serving.result_cache import ResultCache
from condense_core.serving.served import Result, ServedModel

_log = logging.getLogger(__name__)
_CHARS_PER_TOKEN = 4  # until a request's text is tokens
_STUCK_AFTER = 30.0  # seconds beyond what was expected, after which the device counts as hung


class Backend(Protocol):
    """What an engine runs: ``ServedModel``, or another with these methods."""

    def kind(self, request: Request) -> Hashable:
        """What kind of work a request is: requests of one kind take about equally long for each token."""

    def prepare(self, request: Request) -> Prepared:
        """Check a request and make tokens of its text; ``InvalidRequest`` for one that cannot be served."""

    def run(self, batch: Sequence[Prepared]) -> Result:
        """Run requests together; called by one thread only."""

    def warm_up(self) -> Iterator[tuple[Hashable, int, Callable[[], Any]]]:
        """Work to begin with: its kind, its tokens, and what does it."""

    def release_memory(self) -> None:
        """Called after memory ran out."""

    def facts(self) -> dict[str, Any]:
        """What is offered, as JSON."""


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes on.

    Attributes:
        max_requests, max_queued_chars: what may wait or run at once.
        max_chars: of one request, its question among them.
        max_batch_tokens: tokens that run together.
        timeout: seconds for requests that name none.
        cache_bytes: of results that are kept for requests that come again.
    """

    max_requests: int = 512
    max_queued_chars: int = 32 * 2**20
    max_chars: int = 2 * 2**20
    max_batch_tokens: int = 32_768
    timeout: float = 60.0
    cache_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_queued_chars", "max_chars", "max_batch_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")
        if not self.timeout > 0 or self.cache_bytes < 0:
            raise ValueError("timeout, cache_bytes: expected seconds above 0, and bytes of at least 0")


class CompressionEngine:
    """Compresses, prunes and answers for many callers at once.

    >>> async with CompressionEngine.from_pretrained("models/condense-tiny") as engine:
    ...     soft = await engine.compress(text, ratio=4)

    A request is refused at once where too much waits for it to be answered in time (``QueueFull``); what was accepted
    ends in its result, in an error of its own, or at its deadline. A cancelled caller takes its request with it.
    """

    def __init__(
        self, backend: Backend, *, limits: EngineLimits | None = None, observer: Observer = NO_METRICS
    ) -> None:
        """An engine over ``backend``; it starts with ``async with``, or ``start``."""
        self.backend, self.limits, self.observer = backend, limits or EngineLimits(), observer
        self.costs = CostModel()
        self.results = ResultCache(self.limits.cache_bytes)
        self._queue = RequestQueue(
            self.limits.max_requests, self.limits.max_queued_chars, self.limits.max_batch_tokens, self._expected
        )
        self._tokenizing = ThreadPoolExecutor(1, "condense-tokenize")
        self._thread = Thread(target=self._work, name="condense-device", daemon=True)
        self._warm: Future[None] = Future()
        self._failed: str | None = None
        self._state = "new"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        methods: Sequence[str] | None = None,
        *,
        limits: EngineLimits | None = None,
        observer: Observer = NO_METRICS,
        **options: Any,
    ) -> Self:
        """Load a model and its compressors; methods, options: as of ``ServedModel.load``."""
        return cls(ServedModel.load(name_or_path, methods, **options), limits=limits, observer=observer)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Run each kind of work once, so that the first requests take no longer than others, and accept requests."""
        if self._state != "new":
            raise RuntimeError(f"engine: it is {self._state}, expected a new one")
        self._state = "starting"
        self._thread.start()
        await asyncio.shield(asyncio.wrap_future(self._warm))
        self._state = "running"

    async def stop(self, timeout: float | None = 30.0) -> None:
        """Finish what was accepted, for at most ``timeout`` seconds (None: however long it takes), and end."""
        if self._state == "stopped":
            return
        running, self._state = self._state == "running", "stopping"
        self._queue.close()
        ends = None if timeout is None else time.monotonic() + timeout
        while running and not self._queue.is_empty and self.is_healthy and (ends is None or time.monotonic() < ends):
            await asyncio.sleep(0.01)
        for ticket in self._queue.drop_all():
            _resolve(ticket, error=ShuttingDown("the server has shut down before it came to this", retry_after=5.0))
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._state = "stopped"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def compress(self, text: str | CompressRequest, **fields: Any) -> SoftTokens:
        """Soft tokens of a text, on the model's device; fields: those of ``CompressRequest``.

        Raises:
            ServingError: of the kind that says why not (``condense_core.serving.errors``).
        """
        request = text if isinstance(text, CompressRequest) else CompressRequest(text=text, **fields)
        soft: SoftTokens = await self.submit(request)
        return soft

    async def prune(self, text: str | PruneRequest, **fields: Any) -> PrunedCache:
        """A pruned cache of a text; fields: those of ``PruneRequest``; errors as of ``compress``."""
        cache: PrunedCache = await self.submit(
            text if isinstance(text, PruneRequest) else PruneRequest(text=text, **fields)
        )
        return cache

    async def answer(self, text: str | AnswerRequest, **fields: Any) -> dict[str, Any]:
        """The model's own answer to a question about a text; fields: those of ``AnswerRequest``."""
        answer: dict[str, Any] = await self.submit(
            text if isinstance(text, AnswerRequest) else AnswerRequest(text=text, **fields)
        )
        return answer

    async def submit(self, request: Request) -> Any:
        """The result of any request; errors as of ``compress``."""
        return (await self.submit_timed(request)).value

    async def submit_timed(self, request: Request) -> Timed:
        """The result of any request and where its time went; errors as of ``compress``."""
        started = time.monotonic()
        kind = self.backend.kind(request)
        try:
            value = await self._submit(request, kind, started)
        except asyncio.CancelledError:
            self.observer.ended(kind, "cancelled", time.monotonic() - started)
            raise
        except ServingError as error:
            self.observer.ended(kind, error.code, time.monotonic() - started)
            raise
        self.observer.ended(kind, "ok", time.monotonic() - started)
        return value

    async def _submit(self, request: Request, kind: Hashable, started: float) -> Timed:
        self._check(request)
        digest = request.digest() if isinstance(request, CompressRequest) else None
        if digest is not None and (known := self.results.get(digest)) is not None:
            self.observer.cache_hit()
            return Timed(replace(known, embeds=known.embeds.clone()), {"cached": 0.0})
        seconds = self.costs.seconds(kind, request.num_chars // _CHARS_PER_TOKEN)
        timeout = self.limits.timeout if request.timeout is None else request.timeout
        ticket = Ticket(request, seconds, started + timeout, kind=kind, digest=digest)
        self._queue.admit(ticket)
        self.observer.depth(self._queue.depth)
        try:
            self._tokenizing.submit(self._prepare, ticket)
            left = max(ticket.deadline - time.monotonic(), 0.0)
            value = await asyncio.wait_for(asyncio.wrap_future(ticket.future), left)
            return Timed(value, ticket.timing())
        except TimeoutError:
            raise DeadlineExceeded(
                f"timeout: {timeout:g} s are over, expected the answer to take less, or more of them"
            ) from None
        finally:
            self._queue.withdraw(ticket)  # of one that has run nothing is left to withdraw

    def _check(self, request: Request) -> None:
        if self._failed is not None:
            raise DeviceFailed(f"the device has failed ({self._failed}); expected the server to be restarted")
        if self._state != "running":
            raise ShuttingDown(f"the server is {self._state}, expected one that runs", retry_after=5.0)
        if request.num_chars > self.limits.max_chars:
            raise TooLarge(f"text: {request.num_chars:,} characters, expected at most {self.limits.max_chars:,}")

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._state == "running" and self.is_healthy

    @property
    def is_healthy(self) -> bool:
        """Whether the device works, or has nothing to do; False once it failed, or hangs."""
        return self._failed is None and self._queue.stuck_for < _STUCK_AFTER

    def facts(self) -> dict[str, Any]:
        """What the engine offers and how it stands: JSON."""
        return {
            **self.backend.facts(),
            "limits": {"max_chars": self.limits.max_chars, "timeout": self.limits.timeout},
            "queue": self.load(),
        }

    def load(self) -> dict[str, Any]:
        """How much there is to do."""
        return {
            "waiting": self._queue.depth,
            "running": self._queue.running,
            "wait_seconds": round(self._queue.wait_seconds(), 4),
        }

    # -- the thread that tokenizes -------------------------------------------------------------------------------------

    def _prepare(self, ticket: Ticket) -> None:
        if ticket.abandoned:
            return
        started = time.monotonic()
        try:
            prepared = self.backend.prepare(ticket.request)
        except ServingError as error:
            self._queue.withdraw(ticket)
            _resolve(ticket, error=error)
        except Exception as error:
            self._queue.withdraw(ticket)
            _resolve(ticket, error=_internal(error))
        else:
            ticket.tokenizing = time.monotonic() - started
            self.observer.stage("tokenize", ticket.tokenizing)
            self._queue.ready(ticket, prepared)

    def _expected(self, ticket: Ticket) -> float:
        tokens = ticket.prepared.tokens if ticket.prepared else ticket.request.num_chars // _CHARS_PER_TOKEN
        return self.costs.seconds(ticket.kind, tokens)

    # -- the thread of the device --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:
            self._warm.set_exception(error)
            return
        self._warm.set_result(None)
        while (batch := self._queue.take()) is not None:
            try:
                for ticket in batch:
                    self.observer.stage("queue", ticket.started_at - ticket.ready_at)
                self._run([ticket for ticket in batch if not self._known(ticket)])
            except BaseException as error:  # whatever it is, this thread must go on: nobody else can answer
                for ticket in batch:
                    _resolve(ticket, error=_internal(error))
            finally:
                self._queue.finish(batch)
                self.observer.depth(self._queue.depth)

    def _warm_up(self) -> None:
        """Run each kind of work; here, since CUDA graphs belong to the thread that recorded them."""
        for kind, tokens, work in self.backend.warm_up():
            work()
            work()  # a graph is recorded in the second run
            started = time.monotonic()
            work()
            self.costs.observe(kind, tokens, time.monotonic() - started)

    def _known(self, ticket: Ticket) -> bool:
        """Whether its result came about since it was accepted."""
        if ticket.digest is None or (known := self.results.get(ticket.digest)) is None:
            return False
        self.observer.cache_hit()
        _resolve(ticket, replace(known, embeds=known.embeds.clone()))
        return True

    def _run(self, batch: Sequence[Ticket], *, again: bool = True) -> None:
        """Run a batch. Where memory runs out or a request of it fails, its halves are tried, or each by itself."""
        if not batch:
            return
        started = time.monotonic()
        prepared = [ticket.prepared for ticket in batch if ticket.prepared is not None]
        try:
            if self._failed is not None:
                raise DeviceFailed(f"the device has failed ({self._failed}); expected the server to be restarted")
            result = self.backend.run(prepared)
        except Exception as error:
            known = self._as_serving_error(error)
            if isinstance(known, OutOfMemory):
                self.observer.out_of_memory()
                self.backend.release_memory()
            if len(batch) == 1 or not again or isinstance(known, DeviceFailed):
                for ticket in batch:
                    _resolve(ticket, error=known)
            elif isinstance(known, OutOfMemory):
                half = len(batch) // 2
                for part in (batch[:half], batch[half:]):
                    self._run(part, again=False)
            else:
                for ticket in batch:  # whose mistake it was shows when each runs by itself
                    self._run([ticket], again=False)
            return
        ended, tokens = time.monotonic(), sum(each.tokens for each in prepared)
        seconds = ended - started
        self.costs.observe(batch[0].kind, tokens, seconds)
        self.observer.batch(batch[0].kind, len(batch), tokens, seconds, result.stages)
        for ticket, value in zip(batch, result.values, strict=True):
            ticket.finished_at, ticket.stages = ended, result.stages
            if ticket.digest is not None:
                self.results.put(ticket.digest, value)
                value = replace(value, embeds=value.embeds.clone())
            _resolve(ticket, value)

    def _as_serving_error(self, error: Exception) -> ServingError:
        if isinstance(error, ServingError):
            return error
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
            return OutOfMemory("the device has too little memory for this text; expected a shorter one")
        if isinstance(error, RuntimeError) and "CUDA error" in text:
            self._failed = text.splitlines()[0][:200]
            _log.critical("the device has failed: %s", self._failed)
            return DeviceFailed(f"the device has failed ({self._failed}); expected the server to be restarted")
        if isinstance(error, ValueError | TypeError):
            return InvalidRequest(" ".join(text.split()))
        return _internal(error)


def _internal(error: BaseException) -> InternalError:
    told, where = mistake(error)
    _log.error("mistake: %s", where)
    return told


def _resolve(ticket: Ticket, value: Any = None, *, error: ServingError | None = None) -> None:
    """Hand a ticket what became of it, once; whoever was cancelled is not there any more."""
    with suppress(InvalidStateError):
        if error is not None:
            ticket.future.set_exception(error)
        else:
            ticket.future.set_result(value)
