"""What stands before the routes: who asks, how much they send and how slowly, and what is logged of it.

A body is read whole before a route sees it, within bounds of bytes and time, so that no route waits for a slow sender.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

from condense_core.serving.errors import (
    BodyTimeout,
    HeadersTooLarge,
    QueueFull,
    ServingError,
    TooLarge,
    UnsupportedMediaType,
    mistake,
)
from condense_core.serving.keys import Key, Keys
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.wire import error_body, error_headers

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_log = logging.getLogger("condense_core.serving")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class ClientGone(ServingError):
    """Whoever asked has gone away; nobody sees this but the log."""

    code, status = "client_gone", 499


@dataclass(frozen=True)
class HttpLimits:
    """How much a client may send.

    Attributes:
        max_body_bytes: of one request.
        max_buffered_bytes: of the bodies of all requests at once.
        body_seconds: for a body to arrive.
        header_seconds: for the headers to arrive on an open connection.
        max_header_bytes: of all headers of a request.
        max_connections: at once.
    """

    max_body_bytes: int = 8 * 2**20
    max_buffered_bytes: int = 256 * 2**20
    body_seconds: float = 20.0
    header_seconds: float = 10.0
    max_header_bytes: int = 32 * 2**10
    max_connections: int = 1024


class Guard:
    """An ASGI application around another."""

    def __init__(
        self, app: App, *, limits: HttpLimits, keys: Keys | None = None, observer: PrometheusObserver | None = None
    ) -> None:
        self.app, self.limits, self.keys, self.observer = app, limits, keys, observer
        self._buffered = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Exchange(self, scope, receive, send).run()

    def reserve(self, count: int) -> None:
        """Room for ``count`` more bytes of bodies; ``QueueFull`` where there is none."""
        if self._buffered + count > self.limits.max_buffered_bytes:
            raise QueueFull("body: too many are being received; try again in 1 s", retry_after=1.0)
        self._buffered += count

    def release(self, count: int) -> None:
        """So many bytes are gone again."""
        self._buffered -= count


class _Exchange:
    """One request and its response."""

    def __init__(self, guard: Guard, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.headers: dict[bytes, bytes] = {name.lower(): value for name, value in scope["headers"]}
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.key: Key | None = None
        self.body = bytearray()
        self.status, self.bytes_out, self.code = 0, 0, "ok"
        self.started = time.monotonic()

    async def run(self) -> None:
        entered = False
        try:
            if (
                sum(len(name) + len(value) for name, value in self.scope["headers"])
                > self.guard.limits.max_header_bytes
            ):
                raise HeadersTooLarge(f"headers: expected at most {self.guard.limits.max_header_bytes:,} bytes")
            if self.guard.keys is not None and self.scope["path"].startswith("/v1/"):
                self.key = self.guard.keys.find(self.headers.get(b"authorization", b"").decode("latin-1"))
                self.key.enter()
                entered = True
            await self._read()
            self.scope.setdefault("state", {}).update(
                request_id=self.request_id, key=self.key, failed=self.fail, chars=0, arrived=self.started
            )
            await self.guard.app(self.scope, self._replay(), self._forward)
        except ServingError as error:
            await self._refuse(error)
        except Exception as error:
            told, where = mistake(error)
            _log.error("mistake", extra={"request_id": self.request_id, "detail": where})
            await self._refuse(told)
        finally:
            if entered and self.key is not None:
                self.key.leave()
            self.guard.release(len(self.body))
            self._tell()

    def fail(self, code: str) -> None:
        """A route answers with an error of this code."""
        self.code = code

    async def _read(self) -> None:
        """The whole body."""
        if self.headers.get(b"content-encoding", b"identity").lower() not in (b"identity", b""):
            raise UnsupportedMediaType("content-encoding: expected a body that is not compressed")
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and len(length) < 20 and int(length) > self.guard.limits.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.guard.limits.body_seconds):
                while True:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        raise ClientGone("the client went away while it sent its request")
                    chunk = message.get("body", b"")
                    if len(self.body) + len(chunk) > self.guard.limits.max_body_bytes:
                        raise self._too_large()
                    self.guard.reserve(len(chunk))
                    self.body += chunk
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise BodyTimeout(
                f"body: incomplete after {self.guard.limits.body_seconds:g} s, expected it sooner"
            ) from None
        if self.body and self.scope["method"] in ("POST", "PUT", "PATCH"):
            kind = self.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise UnsupportedMediaType(f"content-type: got {kind[:60]!r}, expected application/json")

    def _too_large(self) -> TooLarge:
        return TooLarge(f"body: expected at most {self.guard.limits.max_body_bytes:,} bytes")

    def _replay(self) -> Receive:
        """Gives the body that was read, and then what comes from the connection: that it was closed."""
        given = False

        async def receive() -> Message:
            nonlocal given
            if given:
                return await self._receive()
            given = True
            return {"type": "http.request", "body": bytes(self.body), "more_body": False}

        return receive

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": [*headers, (b"x-content-type-options", b"nosniff")]}
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)

    async def _refuse(self, error: ServingError) -> None:
        self.code = error.code
        if self.status:  # an answer has begun; without its end the client knows that it was cut off
            return
        payload = json.dumps(error_body(error, self.request_id)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
        headers.append((b"connection", b"close"))  # what is left of the body is not read
        headers += [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
        try:
            await self._forward({"type": "http.response.start", "status": error.status, "headers": headers})
            await self._forward({"type": "http.response.body", "body": payload})
        except OSError:  # nobody is there to read it
            return

    def _tell(self) -> None:
        route = getattr(self.scope.get("route"), "path", "unknown")
        if self.guard.observer is not None:
            self.guard.observer.responded(route, self.status)
        told = {
            "request_id": self.request_id,
            "method": self.scope["method"][:10],
            "route": route,
            "status": self.status,
            "code": self.code,
            "key": None if self.key is None else self.key.name,
            "bytes_in": len(self.body),
            "bytes_out": self.bytes_out,
            "chars": self.scope.get("state", {}).get("chars", 0),
            "milliseconds": round((time.monotonic() - self.started) * 1e3, 2),
        }
        _log.info("request", extra=told)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """What ``work`` gives; it is cancelled where the client goes away before, as ``receive`` tells behind the body."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
