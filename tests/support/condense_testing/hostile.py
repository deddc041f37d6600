"""A server that answers whatever a test wants, byte by byte, on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Received:
    """A request as it came: header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Script = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Raw:
    """A server that runs: where it is, what it was asked, and how many connections are open."""

    address: str = ""
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    opened: int = 0
    sent: int = 0


@asynccontextmanager
async def raw_server(script: Script) -> AsyncIterator[Raw]:
    """Serve on a free port of this host; ``script`` writes what it likes, and the connection stays open behind it."""
    raw = Raw()
    running: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.connections += 1
        raw.opened += 1
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            while received := await read_request(reader):
                raw.requests.append(received)
                await script(received, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            raw.connections -= 1
            running.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    raw.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield raw
    finally:
        server.close()
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=5)


async def read_request(reader: asyncio.StreamReader) -> Received | None:
    """The next request of a connection; None where it has ended."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, path, headers, body)


def http_answer(
    body: bytes, headers: Mapping[str, str] | None = None, *, status: str = "200 OK", length: int | None = None
) -> bytes:
    """The bytes of an answer; length: that it claims, its body's own by default."""
    lines = {"content-length": str(len(body) if length is None else length), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body
