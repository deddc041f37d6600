"""What a request can end in instead of a result: each has a code for programs and a line for people."""

from __future__ import annotations


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


ERRORS: dict[str, type[ServingError]] = {
    kind.code: kind
    for kind in (
        *(InvalidRequest, TooLarge, QueueFull, ShuttingDown, DeadlineExceeded, OutOfMemory, DeviceFailed, WorkerLost),
        InternalError,
    )
}
"""By code, for whoever reads one from the wire."""
