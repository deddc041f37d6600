"""HTTP/1.1 connections that are kept open and know when the last byte of an answer came.

A general client (httpx) takes about 2 ms of the processor for each request, which would be counted as the server's.
Here a request is one ``write`` of bytes made before, and an answer is read as it arrives: 0.3 ms, its text included.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_MAX_HEADER, _MAX_BODY = 2**16, 2**28
_CONNECT_SECONDS = 10.0
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: [^\r\n]*)?")


@dataclass(frozen=True)
class Origin:
    """Where a server is."""

    host: str
    port: int
    prefix: str = ""
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Of a URL such as ``http://127.0.0.1:8000``; ``ValueError`` for what is none."""
        try:
            parts = urlsplit(url)
            tls = {"http": False, "https": True}[parts.scheme]
            port = parts.port or (443 if tls else 80)
        except (ValueError, KeyError):
            parts = None
        if parts is None or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"server: got {url!r:.100}, expected a URL such as http://127.0.0.1:8000")
        if not re.fullmatch(r"[!-~]*", parts.netloc + parts.path):
            raise ValueError(f"server: got {url!r:.100}, expected a URL of printable ASCII")
        return cls(parts.hostname, port, parts.path.rstrip("/"), tls)

    def request(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
        """The bytes of a request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"host: {host}:{self.port}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "\r\n"]).encode("ascii") + body


@dataclass
class Exchange:
    """A request's way: when its first byte was sent and the last of its answer came, and the answer.

    Times are those of ``time.perf_counter``; 0 until then.
    """

    sent_at: float = 0.0
    done_at: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Connection(asyncio.Protocol):
    """One connection: one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._body_at = self._length = -1
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the server closed the connection ({exc or 'no reason given'})")

    async def exchange(self, request: bytes, told: Exchange) -> None:
        """Send a request and fill ``told``; a connection whose exchange did not end well is closed.

        Raises:
            ConnectionError: the connection ended before the answer did, or what came is no HTTP.
        """
        if self._transport is None or not self.is_open:
            raise ConnectionError("the connection is closed, expected an open one")
        self._exchange, self._done = told, asyncio.get_running_loop().create_future()
        told.sent_at = time.perf_counter()
        self._transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._exchange = self._done = None
        if told.headers.get("connection", "").lower() == "close":
            self.close()

    def close(self) -> None:
        """End it, whatever is on the way."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._exchange is None or self._done is None or self._done.done():
            self.close()  # an answer that nobody waits for
            return
        try:
            body = self._received(self._exchange)
        except ValueError as error:
            self._fail(str(error))
            return
        if body is not None:
            self._exchange.body, self._exchange.done_at = body, time.perf_counter()
            self._buffer.clear()
            self._body_at = self._length = -1
            self._done.set_result(None)

    def _received(self, told: Exchange) -> bytes | None:
        """The body once all of it is there; the headers are put into ``told``."""
        if self._body_at < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if max(end, len(self._buffer) if end < 0 else 0) > _MAX_HEADER:
                raise ValueError(f"headers of more than {_MAX_HEADER:,} bytes")
            if end < 0:
                return None
            first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
            status = _STATUS.fullmatch(first)
            if status is None:
                raise ValueError(f"expected HTTP/1.1, got {first[:40]!r}")
            pairs = (line.decode("latin-1").partition(":") for line in lines)
            told.status, told.headers = int(status[1]), {name.lower(): value.strip() for name, _, value in pairs}
            self._body_at, length = end + 4, told.headers.get("content-length", "")
            if length.isdigit() and int(length) <= _MAX_BODY:
                self._length = int(length)
            elif told.headers.get("transfer-encoding", "").lower() != "chunked":
                raise ValueError(f"expected an answer of at most {_MAX_BODY:,} bytes that says its length")
        if self._length >= 0:
            end = self._body_at + self._length
            return bytes(self._buffer[self._body_at : end]) if len(self._buffer) >= end else None
        return _joined(memoryview(bytes(self._buffer))[self._body_at :])

    def _fail(self, message: str) -> None:
        self.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(message))


def _joined(chunked: memoryview) -> bytes | None:
    """The body of an answer in chunks; None while the last has not come."""
    parts: list[bytes] = []
    at, data = 0, bytes(chunked)
    while (end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:end].split(b";")[0], 16)  # ValueError for what is no chunk
        if not 0 <= size <= _MAX_BODY:
            raise ValueError(f"a chunk of {size:,} bytes")
        if len(data) < end + size + 4:
            return None
        if size == 0:
            return b"".join(parts)
        parts.append(data[end + 2 : end + 2 + size])
        at = end + size + 4
    return None


class Pool:
    """Connections to one server: those that are idle are used again, the latest first."""

    def __init__(self, origin: Origin, most: int) -> None:
        """No connection yet, and never more than ``most`` at once: who comes then waits."""
        self.origin = origin
        self._room = asyncio.Semaphore(most)
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if origin.tls else None

    async def exchange(self, request: bytes, told: Exchange) -> None:
        """As of ``Connection``; ``OSError`` where there is none to be had."""
        async with self._room:
            connection = self._take() or await self._opened()
            await connection.exchange(request, told)
            if connection.is_open:
                self._idle.append(connection)

    async def fill(self, count: int) -> None:
        """Open as many connections before they are needed."""
        self._idle += await asyncio.gather(*(self._opened() for _ in range(count - len(self._idle))))

    def close(self) -> None:
        """End those that are idle."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> Connection | None:
        while self._idle:
            if (found := self._idle.pop()).is_open:
                return found
        return None

    async def _opened(self) -> Connection:
        loop, origin = asyncio.get_running_loop(), self.origin
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, connection = await loop.create_connection(Connection, origin.host, origin.port, ssl=self._tls)
        except TimeoutError:
            raise ConnectionError(f"no connection within {_CONNECT_SECONDS:g} s") from None
        return connection
