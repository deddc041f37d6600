"""One line of JSON for each request and event, on standard error. Contents of requests and keys are in none."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

_FIELDS = {
    *(
        "event",
        "level",
        "timestamp",
        "logger",
        "request_id",
        "method",
        "route",
        "status",
        "code",
        "key",
        "host",
        "port",
    ),
    *("bytes_in", "bytes_out", "chars", "milliseconds", "detail", "model", "device", "version"),
}


def configure(stream: TextIO | None = None, *, plain: bool = False) -> None:
    """Send the logs of this library, and warnings of others, to ``stream``; plain: for people instead of programs."""
    shared: list[Any] = [
        structlog.stdlib.ExtraAdder(),
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last = structlog.dev.ConsoleRenderer(colors=False) if plain else structlog.processors.JSONRenderer()
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _only_known_fields, last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("condense_core").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are what clients do
    logging.getLogger("uvicorn.access").disabled = True  # it would log query strings


def _only_known_fields(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Drop what nobody has named here, tracebacks among it, whose messages may hold contents."""
    return {name: value for name, value in event.items() if name in _FIELDS}
