"""Sends requests when they are due, whether or not earlier ones were answered, and notes what became of each.

A request's latency begins when it was due, not when the driver came to send it: a server that stalls makes those wait
that arrive meanwhile, and leaving their wait out would hide the stall (coordinated omission). What the driver itself
adds is noted too, as the lag between the two.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import os
import re
import secrets
import selectors
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from condense_core.files.headers import header_length, parse_header
from condense_core.serving.load.connection import Exchange, Origin, Pool
from condense_core.serving.load.mix import Requests, poisson_times
from condense_core.serving.load.settings import LoadSettings
from condense_core.serving.wire import JSON, OCTETS, parse_server_timing

OK = "ok"
NO_ANSWER, NO_CONNECTION, WRONG_ANSWER = "no_answer", "connection_error", "wrong_answer"
UNFINISHED = "unfinished"
LOST = (NO_ANSWER, NO_CONNECTION, WRONG_ANSWER)
"""Ends of requests that the server neither answered nor refused."""

GRACE = 10.0  # seconds beyond its timeout for which the driver waits for any answer
_LOOK_SECONDS, _LOOK_TIMEOUT = 1.0, 5.0
_CONNECTIONS = 8  # that an open loop begins with
_MAX_PAUSE = 1.0  # seconds that a client of a closed loop waits after an error
_CODE = re.compile(r"[a-z0-9_]{1,40}")
_RSS = re.compile(rb"^process_resident_memory_bytes (\S+)$", re.MULTILINE)
_MAX_HEADER = 2**14

Progress = Callable[[float, int, int], None]
"""Is told each second: seconds since the start, requests sent, requests answered."""


@dataclass(slots=True, eq=False)
class Sample:
    """A request and what became of it. Times are seconds since the start of the run; None: it never came to that.

    outcome: ``ok``, the code of the server's error, ``http_NNN``, one of ``LOST``, or ``unfinished``.
    alone: whether no other request was on its way at any time of its own. tokens: that the server read.
    timing: seconds by stage, as the answer says.
    """

    number: int
    due_at: float
    sent_at: float | None = None
    done_at: float | None = None
    outcome: str = UNFINISHED
    alone: bool = True
    tokens: int = 0
    timing: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """The server's own view at one moment; None where it did not say. rss: bytes of its process in memory."""

    at: float
    waiting: int | None = None
    running: int | None = None
    rss: float | None = None


@dataclass
class Run:
    """What a run measured. seconds: in which requests began, less where it was interrupted."""

    settings: LoadSettings
    salt: str
    offered: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def drive(settings: LoadSettings, *, key: str | None = None, progress: Progress | None = None) -> Run:
    """Put a server under load and note what it did; Ctrl-C ends it early, and what was measured by then is returned.

    Args:
        key: for a server that asks for one.
        progress: called each second.

    Raises:
        ValueError: the server cannot be reached, or is none of this library's.
    """
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ValueError("key: got characters that no key has, expected printable ASCII without spaces")
    gc.collect()
    gc.freeze()  # what is here already is not looked through again while requests are timed
    try:
        with asyncio.Runner(loop_factory=_precise_loop) as runner:
            return runner.run(_drive(settings, key, progress))
    finally:
        gc.unfreeze()


def _precise_loop() -> asyncio.AbstractEventLoop:
    """An event loop that wakes on time: ``epoll`` counts in milliseconds, ``select`` in microseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def _drive(settings: LoadSettings, key: str | None, progress: Progress | None) -> Run:
    pool = Pool(Origin.parse(settings.server), settings.max_connections)
    watch = Pool(pool.origin, 1)
    headers = {"accept": JSON} | ({} if key is None else {"authorization": f"Bearer {key}"})
    offered = await _greet(watch, headers)
    run = Run(settings, secrets.token_hex(4), offered)
    driver = _Driver(run, pool, watch, headers, progress)
    try:
        try:
            await pool.fill(min(settings.concurrency or _CONNECTIONS, settings.max_connections))
        except OSError as error:
            raise _unreachable(settings.server, error) from None
        await driver.run()
    finally:
        pool.close()
        watch.close()
    return run


async def _greet(watch: Pool, headers: dict[str, str]) -> dict[str, Any]:
    """What the server offers."""
    server, told = f"{watch.origin.host}:{watch.origin.port}", Exchange()
    try:
        async with asyncio.timeout(_LOOK_TIMEOUT):
            await watch.exchange(watch.origin.request("GET", "/v1/models", headers), told)
    except TimeoutError:
        raise ValueError(f"server: {server} took more than {_LOOK_TIMEOUT:g} s to say what it offers") from None
    except OSError as error:
        raise _unreachable(server, error) from None
    if told.status == 401:
        raise ValueError(f"server: {server} does not know the key, expected one of its own in CONDENSE_API_KEY")
    offered = _json(told.body)
    models = offered.get("data") if isinstance(offered, dict) else None
    if told.status != 200 or not isinstance(models, list) or not models or not isinstance(models[0], dict):
        raise ValueError(f"server: {server} is no server of compression (status {told.status}), expected one")
    return models[0]


def _unreachable(server: str, error: OSError) -> ValueError:
    number = error.errno or 0  # below zero of a name that is unknown
    reason = os.strerror(number) if number > 0 else error.strerror or str(error) or type(error).__name__
    return ValueError(f"server: {server} cannot be reached ({reason}), expected a running 'condense serve'")


class _Driver:
    """One run."""

    def __init__(self, run: Run, pool: Pool, watch: Pool, headers: dict[str, str], progress: Progress | None) -> None:
        settings = run.settings
        self._run, self._settings, self._pool, self._watch = run, settings, pool, watch
        self._headers, self._progress = headers, progress
        self._requests = Requests(
            settings.mix,
            seed=settings.seed,
            salt=run.salt,
            timeout=settings.timeout,
            method=settings.method,
            ratio=settings.ratio,
            repeat=settings.repeat,
        )
        self._flying: set[Sample] = set()
        self._started = 0.0

    async def run(self) -> None:
        """Send all requests and wait for their answers, while the server is looked at each second."""
        self._started = time.perf_counter()
        await self._look()
        self._started = time.perf_counter()
        watching = asyncio.ensure_future(self._look_each_second())
        try:
            async with asyncio.TaskGroup() as group:
                if (rate := self._settings.arrivals_per_second) is not None:
                    await self._open_loop(rate, group)
                else:
                    numbers = itertools.count()
                    for _ in range(self._settings.concurrency or 1):
                        group.create_task(self._client(numbers))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            self._run.interrupted = True
        finally:
            watching.cancel()
        by_number = self._settings.requests is not None
        self._run.seconds = min(self._settings.seconds, self._now() if by_number or self._run.interrupted else math.inf)
        with suppress(asyncio.CancelledError):
            await watching
        await self._look()

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _message(self, number: int) -> bytes:
        headers = {
            **self._headers,
            "accept": OCTETS,
            "content-type": JSON,
            "x-request-id": f"{self._run.salt}-{number}",
        }
        return self._pool.origin.request("POST", "/v1/compress", headers, self._requests.body(number))

    # -- when ----------------------------------------------------------------------------------------------------------

    async def _open_loop(self, rate: float, group: asyncio.TaskGroup) -> None:
        most = self._settings.requests
        for number, due_at in enumerate(poisson_times(rate, self._settings.seed)):
            if due_at > self._settings.seconds or number == most:
                return
            message = self._message(number)  # made before it is due
            await asyncio.sleep(max(due_at - self._now(), 0.0))
            group.create_task(self._one(number, due_at, message))

    async def _client(self, numbers: itertools.count[int]) -> None:
        most = self._settings.requests
        while self._now() < self._settings.seconds:
            number = next(numbers)
            if most is not None and number >= most:
                return
            message = self._message(number)
            pause = await self._one(number, self._now(), message)
            if pause:
                await asyncio.sleep(pause)

    # -- what became of it ---------------------------------------------------------------------------------------------

    async def _one(self, number: int, due_at: float, message: bytes) -> float:
        """Send one request; returns seconds after which a client may come again."""
        sample, told = Sample(number, due_at, alone=not self._flying), Exchange()
        for other in self._flying if len(self._flying) == 1 else ():
            other.alone = False
        self._run.samples.append(sample)
        self._flying.add(sample)
        try:
            async with asyncio.timeout(self._settings.timeout + GRACE):
                await self._pool.exchange(message, told)
        except TimeoutError:
            sample.outcome = NO_ANSWER
        except OSError:
            sample.outcome = NO_CONNECTION
        finally:
            self._flying.remove(sample)
            sample.sent_at = told.sent_at - self._started if told.sent_at else None
        if not told.done_at:
            if sample.outcome != UNFINISHED:
                sample.done_at = self._now()
            return _MAX_PAUSE
        sample.done_at = told.done_at - self._started
        sample.outcome = self._judge(sample, told)
        if sample.outcome == OK:
            return 0.0
        try:
            return min(float(told.headers["retry-after"]), _MAX_PAUSE)
        except (KeyError, ValueError):
            return _MAX_PAUSE

    def _judge(self, sample: Sample, told: Exchange) -> str:
        sample.timing = parse_server_timing(told.headers.get("server-timing", ""))
        if told.headers.get("x-request-id") != f"{self._run.salt}-{sample.number}":
            return WRONG_ANSWER
        if told.status != 200:
            body = _json(told.body)
            error = body.get("error") if isinstance(body, dict) else None
            code = error.get("code") if isinstance(error, dict) else None
            return code if isinstance(code, str) and _CODE.fullmatch(code) else f"http_{told.status}"
        try:
            sample.tokens = _tokens_read(told.body)
        except (ValueError, KeyError, TypeError):
            return WRONG_ANSWER
        return OK

    # -- the server's own view -----------------------------------------------------------------------------------------

    async def _look_each_second(self) -> None:
        for second in itertools.count(1):
            await asyncio.sleep(max(second * _LOOK_SECONDS - self._now(), 0.0))
            await self._look()
            if self._progress is not None:
                sent = len(self._run.samples)
                self._progress(self._now(), sent, sent - len(self._flying))

    async def _look(self) -> None:
        at = self._now()
        load = _json(await self._asked("/v1/load"))
        counts = load if isinstance(load, dict) else {}
        rss = _RSS.search(await self._asked("/metrics"))
        waiting, running = (counts.get(name) for name in ("waiting", "running"))
        self._run.looks.append(
            Look(
                at,
                waiting if isinstance(waiting, int) else None,
                running if isinstance(running, int) else None,
                float(rss[1]) if rss else None,
            )
        )

    async def _asked(self, path: str) -> bytes:
        """The answer to a GET; nothing where there is none."""
        told = Exchange()
        with suppress(OSError):
            async with asyncio.timeout(_LOOK_TIMEOUT):
                await self._watch.exchange(self._watch.origin.request("GET", path, self._headers), told)
        return told.body if told.status == 200 else b""


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _tokens_read(body: bytes) -> int:
    """Context tokens that soft tokens say they stand for; ``ValueError``, or another, for what are none."""
    length = header_length(body[:9], len(body), limit=_MAX_HEADER, expected="soft tokens")
    return int(parse_header(body[8 : 8 + length])["__metadata__"]["num_context_tokens"])
