"""The real HTTP application on a real port, in a thread of the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from fastapi import FastAPI

from condense_core.serving.http.guard import HttpLimits
from condense_core.serving.http.server import Server, bound_socket


@contextmanager
def running_server(
    app: FastAPI,
    *,
    limits: HttpLimits | None = None,
    stop_seconds: float = 5.0,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Iterator[str]:
    """Serve what ``create_app`` made as ``condense serve`` does, but in a thread; yields its URL, without a path.

    limits: of connections and headers; those of bodies are the app's.
    """
    bound, started = bound_socket("127.0.0.1", 0), Event()
    server = Server(
        app,
        limits=limits or HttpLimits(),
        stop_seconds=stop_seconds,
        certificate=certificate,
        key=key,
        started=started.set,
    )
    thread = Thread(target=server.run, kwargs={"sockets": [bound]}, name="server", daemon=True)
    thread.start()
    try:
        while not started.wait(0.01):
            assert thread.is_alive(), "the server ended before it had started"
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(stop_seconds + 10)
        bound.close()
        assert not thread.is_alive(), "the server did not end"
