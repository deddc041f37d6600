"""Runs the application: the socket, TLS, connections that send nothing, and the signals that end it."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from condense_core.serving.http.guard import Guard, HttpLimits
from condense_core.serving.service import SWITCH_SECONDS


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket, before any model is loaded; ``ValueError`` where there is none to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        # Named TCP: asyncio sends at once, instead of waiting 40 ms for an acknowledgement, on such sockets only.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except socket.gaierror as error:
        raise ValueError(
            f"host: got {host!r}, expected a name or an address of this machine ({error.strerror})"
        ) from None
    except OverflowError:
        raise ValueError(f"port: got {port}, expected 0 to 65535") from None
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "something else listens there" if taken else error.strerror
        raise ValueError(f"port: cannot listen on {host}:{port} ({reason}), expected a free one") from None
    return bound


def check_certificate(certificate: Path, key: Path | None) -> None:
    """``ValueError`` unless the files hold a certificate and its private key."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except FileNotFoundError:
        missing = certificate if not certificate.exists() else key
        raise ValueError(f"tls: no file {missing}, expected a certificate and its key in PEM") from None
    except (ssl.SSLError, OSError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else "unreadable"
        raise ValueError(
            f"tls: {certificate} is no certificate with its key ({reason}), expected both in PEM"
        ) from None


def _impatient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, with an end to connections that are open and send no whole request."""

    class Impatient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:  # its headers are complete; the body has a time limit of its own
                self._stop()
            elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._wait()  # the first bytes of another request on a connection that was kept open

        def _wait(self) -> None:
            self._timer = self.loop.call_later(seconds, self._end)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _end(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Impatient


class Server(uvicorn.Server):
    """uvicorn with the limits of this project, which serves until SIGINT or SIGTERM, or until ``should_exit`` is set.

    Then nothing new is accepted, and what was is finished.
    """

    def __init__(
        self,
        app: FastAPI | Guard,
        *,
        limits: HttpLimits,
        stop_seconds: float = 30.0,
        certificate: Path | None = None,
        key: Path | None = None,
        started: Callable[[], None] | None = None,
        signals: bool = True,
    ) -> None:
        """A server of ``app``; ``run(sockets=[bound_socket(...)])`` starts it.

        Args:
            stop_seconds: for what was accepted, after the signal.
            certificate, key: files in PEM, for https.
            started: called once requests are accepted. signals: whether they end it; else ``should_exit`` alone does.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=_impatient(limits.header_seconds),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=limits.max_header_bytes,
                limit_concurrency=limits.max_connections,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(stop_seconds) + 5,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )
        self._told, self._signals = started, signals

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals() if self._signals else nullcontext():
            yield

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        sys.setswitchinterval(SWITCH_SECONDS)
        super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._told is not None:
            self._told()
