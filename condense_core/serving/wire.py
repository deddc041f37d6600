"""What travels between a server and its clients: frames, JSON items and errors. docs/serving.md describes it."""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from condense_core.serving.errors import ERRORS, ServingError, Unauthorized

OCTETS, FRAMES = "application/octet-stream", "application/x-condense-frames"
JSON, LINES = "application/json", "application/x-ndjson"
FRAME = struct.Struct("<IIQ")
"""Index, status, length of what follows."""
END = 2**32 - 1
MAX_FRAME_BYTES = 2**30
MAX_TEXTS = 256
"""In one request."""
MIN_TIMEOUT, MAX_TIMEOUT = 0.001, 3600.0
"""Seconds that a request may ask for."""
_CODE = re.compile(r"[a-z_]{1,40}")
_TIMING = re.compile(r"(?:^|,)\s*([\w-]+)\s*;\s*dur=(\d+(?:\.\d+)?)\s*(?=,|$)")


@dataclass(frozen=True)
class Compressed:
    """A text's soft tokens as they travel: the bytes of ``SoftTokens.to_bytes``, and what they say of themselves.

    timing: seconds by stage (``queue.Ticket.timing``, and ``write``). told: what else is said of how they came about.
    """

    payload: bytes
    num_context_tokens: int
    num_soft_tokens: int
    ratio: float
    method: str
    model: str
    text: str = ""
    timing: Mapping[str, float] = field(default_factory=dict)
    told: Mapping[str, str | int] = field(default_factory=dict)

    def headers(self) -> dict[str, str]:
        """What an answer that holds nothing else says of them: ``Server-Timing``, and ``told``."""
        told = {f"x-condense-{name.replace('_', '-')}": str(value) for name, value in self.told.items()}
        return told | ({"server-timing": server_timing(self.timing)} if self.timing else {})

    def item(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "num_context_tokens": self.num_context_tokens,
            "num_soft_tokens": self.num_soft_tokens,
            "ratio": self.ratio,
            "method": self.method,
            "model": self.model,
            "text": self.text,
            **self.told,
            "data": base64.b64encode(self.payload).decode(),
        }


def server_timing(seconds: Mapping[str, float]) -> str:
    """The header ``Server-Timing``: milliseconds by stage."""
    return ", ".join(f"{stage};dur={1e3 * value:.3f}" for stage, value in seconds.items())


def parse_server_timing(header: str) -> dict[str, float]:
    """Seconds by stage of a header ``Server-Timing``, of those stages that have nothing but a duration."""
    return {stage: 1e-3 * float(value) for stage, value in _TIMING.findall(header)}


def frame(index: int, status: int, payload: bytes) -> bytes:
    """A frame of an answer to several texts."""
    return FRAME.pack(index, status, len(payload)) + payload


def error_body(error: ServingError, request_id: str) -> dict[str, Any]:
    """An error as JSON."""
    body: dict[str, Any] = {"code": error.code, "message": str(error), "request_id": request_id}
    if error.retry_after is not None:
        body["retry_after"] = round(error.retry_after, 3)
    return {"error": body}


def error_headers(error: ServingError) -> dict[str, str]:
    """The headers that go with an error: when to come again, and how to say who one is."""
    headers = {} if error.retry_after is None else {"retry-after": str(max(1, round(error.retry_after)))}
    return headers | ({"www-authenticate": "Bearer"} if isinstance(error, Unauthorized) else {})


def error_from(body: object, status: int) -> ServingError:
    """The error that ``error_body`` described; of whatever else came, what its status says.

    An error that this release does not know keeps its code and status.
    """
    told = body.get("error") if isinstance(body, dict) else None
    told = told if isinstance(told, dict) else {}
    code = str(told.get("code"))
    kind = ERRORS.get(code)
    if kind is None or kind.status != status:
        kind = {each.status: each for each in ERRORS.values()}.get(status, ServingError)
    message = told.get("message")
    after = told.get("retry_after")
    number = isinstance(after, int | float) and not isinstance(after, bool) and 0 <= after < 1e6
    error = kind(
        _line(message) if isinstance(message, str) else f"the server answered with status {status}",
        retry_after=float(after) if number and after is not None else None,
    )
    if code not in ERRORS and _CODE.fullmatch(code) and "code" in told:
        error.code = code
    error.status = status
    return error


def _line(message: str) -> str:
    """A message as one line for a terminal, whatever a server put into it."""
    return "".join(c if c.isprintable() else " " for c in message[:500])


def decoded(data: object) -> bytes:
    """The bytes of an item's ``data``; ``ValueError`` for what is no base64."""
    if not isinstance(data, str):
        raise ValueError(f"data: got {type(data).__name__}, expected base64")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"data: no base64 ({error})") from None
