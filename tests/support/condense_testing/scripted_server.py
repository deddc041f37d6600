"""A server on a real port that answers what a test says, byte for byte, however wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

Answer = bytes | Callable[[socket.socket], None]


@dataclass
class ScriptedServer:
    """Each connection gets the next of ``answers``, the last one again and again, and is closed behind it.

    Attributes:
        url: without a path. requests: head and body of each that came.
        ending: set when the server ends, so that an answer that waits can stop.
    """

    answers: tuple[Answer, ...]
    url: str = ""
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    ending: Event = field(default_factory=Event)

    def serve(self, listening: socket.socket) -> None:
        while not self.ending.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head, _, body = _received(connection, b"").partition(b"\r\n\r\n")
            text = head.decode("latin-1")
            length = next(
                (int(line[15:]) for line in text.lower().split("\r\n") if line.startswith("content-length:")), 0
            )
            while len(body) < length:
                body += connection.recv(65536)
            self.requests.append((text, body))
            answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)

    def drips(self, piece: bytes, seconds: float = 0.02, *, first: bytes = b"") -> Answer:
        """An answer that never ends: ``piece`` again and again."""

        def answer(connection: socket.socket) -> None:
            connection.sendall(first)
            while not self.ending.wait(seconds):
                connection.sendall(piece)

        return answer


def _received(connection: socket.socket, data: bytes) -> bytes:
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            raise OSError
        data += piece
    return data


@contextmanager
def scripted_server(*answers: Answer) -> Iterator[ScriptedServer]:
    """A server that is there inside of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = ScriptedServer(answers, f"http://127.0.0.1:{listening.getsockname()[1]}")
        Thread(target=server.serve, args=(listening,), daemon=True).start()
        try:
            yield server
        finally:
            server.ending.set()
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


def reply(body: bytes | dict[str, Any] = b"", status: int = 200, kind: str | None = None, **headers: str) -> bytes:
    """A response with its length; a dict is sent as JSON. A header is named with ``_`` for ``-``."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    kind = kind or ("application/json" if isinstance(body, dict) else "application/octet-stream")
    given = {"content-type": kind, "content-length": str(len(content)), "connection": "close"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def error_reply(status: int, code: str, message: str = "told", **headers: str) -> bytes:
    """An error as ``condense serve`` sends it."""
    return reply({"error": {"code": code, "message": message, "request_id": "1"}}, status, **headers)
