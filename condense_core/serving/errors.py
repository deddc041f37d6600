"""What a request can end in instead of a result: each has a code for programs and a line for people."""

from __future__ import annotations

import traceback
from pathlib import Path


class ServingError(Exception):
    """A request was not answered.

    Attributes:
        code: a word that clients branch on; it never changes.
        status: the HTTP status that stands for it.
        retry_after: seconds after which the same request may well succeed; None: it will not by itself.
    """

    code = "internal"
    status = 500

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InvalidRequest(ServingError, ValueError):
    """It asks for what is not offered, or makes no sense; the message names the field."""

    code, status = "invalid_request", 422


class TooLarge(InvalidRequest):
    """Its text is longer than this server reads."""

    code, status = "too_large", 413


class QueueFull(ServingError):
    """So much is waiting that it would not be answered by its deadline, or at all; nothing of it was done."""

    code, status = "queue_full", 503


class ShuttingDown(ServingError):
    """The server finishes what it has accepted and takes nothing new."""

    code, status = "shutting_down", 503


class DeadlineExceeded(ServingError):
    """It was accepted, and its time is over."""

    code, status = "deadline_exceeded", 504


class OutOfMemory(ServingError):
    """The device has too little memory for it, by itself."""

    code, status = "out_of_memory", 507


class DeviceFailed(ServingError):
    """The device computes nothing any more, such as a GPU after an illegal access: the process must be restarted."""

    code, status = "device_failed", 503


class WorkerLost(ServingError):
    """The process that worked on it ended, and so did the one that tried again."""

    code, status = "worker_lost", 503


class InternalError(ServingError):
    """A mistake of this library; the log has its trace, without contents."""


class Unauthorized(ServingError):
    """No key came, or an unknown one."""

    code, status = "unauthorized", 401


class RateLimited(ServingError):
    """More than the key allows."""

    code, status = "rate_limited", 429


class UnknownModel(ServingError):
    """This server has another model."""

    code, status = "unknown_model", 404


class NotFound(ServingError):
    """There is no such route."""

    code, status = "not_found", 404


class UnsupportedMediaType(ServingError):
    """A body that is not JSON, or compressed."""

    code, status = "unsupported_media_type", 415


class BodyTimeout(ServingError):
    """The body came too slowly."""

    code, status = "request_timeout", 408


class HeadersTooLarge(ServingError):
    """More headers than a request needs."""

    code, status = "headers_too_large", 431


class Unavailable(ServingError):
    """A client's own: the server could not be reached, or another program answered in its place that it is away."""

    code, status = "unavailable", 503


class BadAnswer(ServingError):
    """A client's own: what came is no answer of such a server, or damaged, or larger than was allowed."""

    code, status = "bad_answer", 502


ERRORS: dict[str, type[ServingError]] = {
    kind.code: kind
    for kind in (
        *(InvalidRequest, TooLarge, DeviceFailed, WorkerLost, ShuttingDown, QueueFull, DeadlineExceeded, OutOfMemory),
        *(InternalError, Unauthorized, RateLimited, UnknownModel, NotFound, UnsupportedMediaType, BodyTimeout),
        HeadersTooLarge,
    )
}
"""By code, for whoever reads one from the wire; the last one of a status stands for it where there is no code."""


def mistake(error: BaseException) -> tuple[InternalError, str]:
    """For an error that nobody expected: what the caller is told, and for the log its kind and where it was.

    Its message is in neither, since it may hold contents.
    """
    name = type(error).__name__
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return InternalError(f"a mistake of this server ({name}); its log says where"), f"{name} at {' > '.join(places)}"
