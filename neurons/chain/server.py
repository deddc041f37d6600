"""One process keeps the chain in memory, and every neuron of the host speaks to it over a Unix socket.

What is served is the node and not ``base.Chain``: each neuron runs its own client of the SDK over ``RemoteNode``, signs
with its own key, and the server checks the signature. Serving ``Chain`` would have been about as long, but then the
server would set weights in the name of whoever asks, and neurons on a local network would run other code than neurons
on the public one.

A message is one line of JSON of at most ``MOST_BYTES`` bytes. The first line of a connection is the token of the file
``<socket>.token``, which only its owner can read. Whoever has it may also do what an operator does (``control``): let
blocks pass, register hotkeys, give stake, make calls fail. It is a chain for one user's tests and local networks.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from condense_core.neurons.chain.memory import MemoryChain, Refused
from condense_core.neurons.chain.substrate import NodeLost, answer, verify

MOST_BYTES = 4 * 2**20
"""Of a message: a metagraph of 256 neurons takes about 100 kB, a row of weights below 10 kB."""
MOST_CONNECTIONS = 1024
SECONDS_TO_GREET = 5.0

CONTROLS: dict[str, Callable[..., Any]] = {
    "advance": MemoryChain.advance,
    "create_subnet": lambda chain, **settings: asdict(chain.create_subnet(**settings))["netuid"],
    "register": MemoryChain.register,
    "hand_over": MemoryChain.hand_over,
    "set_stake": MemoryChain.set_stake,
    "set_time_offset": MemoryChain.set_time_offset,
    "refuse_next": MemoryChain.refuse_next,
}
"""What an operator may do to the chain, by name."""


def token_path(socket: Path) -> Path:
    """The file with the token of the chain that listens at ``socket``."""
    return socket.with_name(f"{socket.name}.token")


def write_token(path: Path) -> str:
    """A new token in a new file that only its owner can read; a file that was there is replaced."""
    token = secrets.token_hex(32)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    return token


def read_token(path: Path) -> str:
    """The token of ``path``.

    Raises:
        PermissionError: others than the owner can read the file.
    """
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise PermissionError(f"{path} has mode {mode:04o}, expected 0600: others can read the token")
    return path.read_text()


class ChainServer:
    """Serves ``chain`` at a Unix socket, from ``start`` to ``close``."""

    def __init__(self, chain: MemoryChain, socket: Path) -> None:
        self.chain, self.socket = chain, socket
        self._token = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. A socket file that a dead process left is replaced.

        Raises:
            FileExistsError: a living process listens there.
        """
        if self.socket.exists():
            try:
                _, writer = await asyncio.open_unix_connection(str(self.socket))
            except OSError:
                self.socket.unlink()
            else:
                writer.close()
                raise FileExistsError(f"{self.socket} is in use, expected a path where no chain listens")
        self._token = write_token(token_path(self.socket))
        old = os.umask(0o177)  # the socket, too, is its owner's alone, from its first moment
        try:
            self._server = await asyncio.start_unix_server(self._accept, str(self.socket), limit=MOST_BYTES)
        finally:
            os.umask(old)

    async def close(self) -> None:
        """Hang up on everybody and remove both files."""
        if self._server is None:
            return
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._server = None
        self.socket.unlink(missing_ok=True)
        token_path(self.socket).unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= MOST_CONNECTIONS:
                await self._serve(reader, writer)
        except (OSError, ValueError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError):
            pass  # hung up, too long a line, no JSON, no greeting in time, or closed
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(SECONDS_TO_GREET):
            greeting = await reader.readline()
        if not hmac.compare_digest(greeting.strip(), self._token.encode()):
            writer.write(_line({"refused": "the token is wrong"}))
            await writer.drain()
            return
        writer.write(_line({"result": "welcome"}))
        while line := await reader.readline():
            writer.write(_line(self._answered(json.loads(line))))
            await writer.drain()

    def _answered(self, request: Any) -> dict[str, Any]:
        try:
            method, params = str(request["method"]), dict(request["params"])
            if method == "control":
                return {"result": CONTROLS[params.pop("do")](self.chain, **params)}
            return {"result": answer(self.chain, method, params, verify)}
        except Refused as error:
            return {"refused": str(error)}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            return {"refused": f"not a request: {type(error).__name__}: {error}"}


class RemoteNode:
    """The node behind a socket, for ``substrate.MemorySubstrate``."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._lock = asyncio.Lock()

    async def connect(self) -> None:
        async with self._lock:
            if self._streams is None:
                try:
                    token = read_token(token_path(self.socket))
                    self._streams = await asyncio.open_unix_connection(str(self.socket), limit=MOST_BYTES)
                except OSError as error:
                    raise NodeLost(f"no chain at {self.socket}: {error}") from error
                try:
                    await self._exchange(token.encode() + b"\n")
                except Refused:
                    self._hang_up()
                    raise

    async def request(self, method: str, params: dict[str, Any]) -> Any:
        async with self._lock:
            return await self._exchange(_line({"method": method, "params": params}))

    async def control(self, do: str, **params: Any) -> Any:
        """Do what an operator does: a name of ``CONTROLS`` and its arguments."""
        await self.connect()
        return await self.request("control", {"do": do, **params})

    async def _exchange(self, line: bytes) -> Any:
        if self._streams is None:
            raise NodeLost("the connection is closed")
        reader, writer = self._streams
        whole = False
        try:
            writer.write(line)
            await writer.drain()
            given = json.loads(await reader.readuntil())
            whole = True
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise NodeLost(f"the connection to {self.socket} broke: {type(error).__name__}") from error
        finally:
            if not whole:  # also when cancelled: the answer to come would be taken for that of the next request
                self._hang_up()
        if "refused" in given:
            raise Refused(given["refused"])
        return given["result"]

    def _hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def close(self) -> None:
        self._hang_up()


def _line(message: dict[str, Any]) -> bytes:
    text = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(text) > MOST_BYTES:
        raise ValueError(f"a message of {len(text)} bytes, expected at most {MOST_BYTES}")
    return text
