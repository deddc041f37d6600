"""The queue in front of a device: what is accepted, in which order it runs, and what runs together."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

from condense_core.serving.errors import QueueFull, ShuttingDown
from condense_core.serving.requests import Request

_MARGIN, _SLACK = 0.5, 0.03
"""By what share, and by how many seconds, work and its way back may take longer than expected before an accepted
deadline is missed."""


@dataclass(frozen=True)
class Prepared:
    """A request once its text is tokens.

    Attributes:
        tokens: that the device will read.
        batch: what it may run together with: requests of an equal, hashable value; None: with nothing.
        payload: what the device needs.
    """

    tokens: int
    batch: Hashable
    payload: Any


@dataclass(eq=False)
class Ticket:
    """An accepted request. Times are those of ``time.monotonic``.

    Attributes:
        seconds: how long the device will work on it, as far as is known.
        deadline: when an answer is of no more use.
        kind: of work. digest: under which its result is kept; None: it is not.
        future: where the result goes.
        prepared: None until its text is tokens. abandoned: nobody waits for it any more.
        ready_at, started_at, finished_at: when it could start, when it did, and when its result was there.
        tokenizing: seconds that its text took to become tokens. stages: seconds by stage of the batch that it ran in.
    """

    request: Request
    seconds: float
    deadline: float
    kind: Hashable = None
    digest: bytes | None = None
    future: Future[Any] = field(default_factory=Future)
    prepared: Prepared | None = None
    abandoned: bool = False
    order: tuple[int, int] = (0, 0)
    accepted_at: float = 0.0
    ready_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0
    tokenizing: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)

    def timing(self) -> dict[str, float]:
        """Seconds between its acceptance and its result: ``tokenize``, ``run`` and, which is all else, ``queue``.

        Behind them are the stages of ``run``, of all that ran together. Only ``cached``: it did not run.
        """
        if not self.finished_at:
            return {"cached": 0.0}
        waited = self.started_at - self.accepted_at - self.tokenizing
        parts = {"queue": waited, "tokenize": self.tokenizing, "run": self.finished_at - self.started_at}
        return parts | dict(self.stages)


@dataclass(frozen=True)
class Timed:
    """A result, and where the seconds until it went (``Ticket.timing``)."""

    value: Any
    timing: Mapping[str, float]


class RequestQueue:
    """Accepted requests in the order of their priority, then of their arrival. Any thread may use it."""

    def __init__(
        self, max_requests: int, max_chars: int, max_batch_tokens: int, seconds: Callable[[Ticket], float]
    ) -> None:
        """An empty queue.

        Args:
            max_requests, max_chars: how much may wait or run at once; beyond, requests are refused.
            max_batch_tokens: how many tokens may run together; one request may have more.
            seconds: how long the device will work on a ticket, as far as is known.
        """
        self.max_requests, self.max_chars, self.max_batch_tokens = max_requests, max_chars, max_batch_tokens
        self._seconds = seconds
        self._changed = Condition()
        self._waiting: list[Ticket] = []  # sorted by `order`
        self._running: list[Ticket] = []
        self._running_until = 0.0
        self._chars = 0
        self._next = 0
        self._closed = False

    # -- the side of whoever asks --------------------------------------------------------------------------------------

    def admit(self, ticket: Ticket) -> None:
        """Accept a ticket.

        Raises:
            ShuttingDown: nothing new is accepted.
            QueueFull: too much waits, or this one, or one behind it, would miss its deadline.
        """
        with self._changed:
            if self._closed:
                raise ShuttingDown("the server is shutting down, expected another one", retry_after=5.0)
            now = time.monotonic()
            count, chars = len(self._waiting) + len(self._running), self._chars + ticket.request.num_chars
            if count and (count >= self.max_requests or chars > self.max_chars):
                wait = self._wait(now)
                raise QueueFull(
                    f"queue: {count:,} requests with {self._chars:,} characters are waiting, expected to be below "
                    f"{self.max_requests:,} and {self.max_chars:,}; try again in {wait:.1f} s",
                    retry_after=wait,
                )
            ticket.order = (-ticket.request.priority, self._next)
            self._check_deadlines(ticket, now)
            self._next += 1
            ticket.accepted_at = now
            self._chars = chars
            insort(self._waiting, ticket, key=lambda each: each.order)

    def ready(self, ticket: Ticket, prepared: Prepared) -> None:
        """Its text is tokens: it may run."""
        with self._changed:
            ticket.prepared, ticket.ready_at = prepared, time.monotonic()
            ticket.seconds = self._seconds(ticket)
            self._changed.notify()

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits for it: it does not run, or its result is dropped where it does already."""
        with self._changed:
            ticket.abandoned = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._chars -= ticket.request.num_chars
                self._changed.notify()  # a closed queue may be empty now

    def close(self) -> None:
        """Accept nothing more; ``take`` gives out what waits, and then None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def drop_all(self) -> list[Ticket]:
        """Take out everything that waits, and what runs still; whoever waits for it must be told."""
        with self._changed:
            dropped, self._waiting = [*self._waiting, *self._running], []
            self._chars = sum(ticket.request.num_chars for ticket in self._running)
            self._changed.notify_all()
            return dropped

    # -- the side of the device ----------------------------------------------------------------------------------------

    def take(self) -> list[Ticket] | None:
        """The tickets to run next, at least one, waiting for one; None once the queue is closed and empty."""
        with self._changed:
            while (first := next((t for t in self._waiting if t.prepared is not None), None)) is None:
                if self._closed and not self._waiting:
                    return None
                self._changed.wait()
            assert first.prepared is not None
            now = time.monotonic()
            self._running = batch = self._together(first, now)
            chosen = set(map(id, batch))
            self._waiting = [t for t in self._waiting if id(t) not in chosen]
            self._running_until = now + sum(t.seconds for t in batch)
            for ticket in batch:
                ticket.started_at = now
            return batch

    def _together(self, first: Ticket, now: float) -> list[Ticket]:
        """``first`` and what waits that may run with it: within the budget, and so that none misses its deadline.

        All of a batch end when its last one does.
        """
        assert first.prepared is not None
        batch, tokens, seconds, deadline = [first], first.prepared.tokens, first.seconds, first.deadline
        for other in self._waiting if first.prepared.batch is not None else ():
            if other is first or other.prepared is None or other.prepared.batch != first.prepared.batch:
                continue
            ends = now + (1 + _MARGIN) * (seconds + other.seconds) + _SLACK
            if tokens + other.prepared.tokens > self.max_batch_tokens or ends > min(deadline, other.deadline):
                continue
            batch.append(other)
            tokens += other.prepared.tokens
            seconds += other.seconds
            deadline = min(deadline, other.deadline)
        return batch

    def finish(self, batch: list[Ticket]) -> None:
        """What ``take`` gave out is done."""
        with self._changed:
            self._chars -= sum(ticket.request.num_chars for ticket in batch)
            self._running = []
            self._changed.notify_all()

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._running)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._changed:
            return not self._waiting and not self._running

    @property
    def stuck_for(self) -> float:
        """Seconds by which the running batch is overdue; 0 while it is not."""
        with self._changed:
            return max(time.monotonic() - self._running_until, 0.0) if self._running else 0.0

    def wait_seconds(self) -> float:
        """How long a request of the usual priority would wait that came now."""
        with self._changed:
            return self._wait(time.monotonic())

    def _wait(self, now: float) -> float:
        running = max(self._running_until - now, 0.0) if self._running else 0.0
        return running + sum(ticket.seconds for ticket in self._waiting)

    def _check_deadlines(self, new: Ticket, now: float) -> None:
        """``QueueFull`` where ``new``, or a ticket behind it, would end after its deadline."""
        ends = now + (max(self._running_until - now, 0.0) if self._running else 0.0)
        ahead = [t for t in self._waiting if t.order < new.order]
        behind = self._waiting[len(ahead) :]
        for ticket in ahead:
            ends += ticket.seconds
        for ticket in (new, *behind):
            ends += ticket.seconds
            # A request that alone takes longer than it has is tried: what is expected may be wrong.
            if (ahead or behind or self._running) and ends + _MARGIN * (ends - now) + _SLACK > ticket.deadline:
                wait = max(ends - now - ticket.seconds, 0.1)
                raise QueueFull(
                    f"queue: {len(self._waiting):,} requests are waiting, and an answer would take "
                    f"{ends - now:.1f} s; try again in {wait:.1f} s, or allow it more time",
                    retry_after=wait,
                )
