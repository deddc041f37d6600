"""What the SDK raises, told apart: what passes if one waits, and what does not.

The SDK has two ways to say no. What its preflight sees raises, what the chain refuses comes back as a result without
success; both carry a ``ChainError`` with a code. This module is the only place that knows those codes and names.
"""

from __future__ import annotations

from typing import Any

from condense_core.neurons.chain.errors import (
    ChainFailure,
    ConnectionLost,
    FinalRefusal,
    InvalidRequest,
    NoSubnet,
    NotAuthorized,
    NotRegistered,
    OtherRefusal,
    PoolRefused,
    RateLimited,
    TooManyCommits,
    WrongVersion,
)

COMMITS = {"TooManyUnrevealedCommits", "CommitQueueFull"}
VERSION = {"IncorrectWeightVersionKey"}
POOL = {
    *("Stale", "Future", "AncientBirthBlock", "ExhaustsResources", "PriorityTooLow", "AlreadyImported"),
    *("Dropped", "Usurped", "Invalid", "Retracted", "FinalityTimeout", "BadRequest"),
}
"""The node's pool turned the transaction away, or watching it ended without an answer; signed again, it can pass."""

FINAL: dict[str, type[FinalRefusal]] = {
    "not_registered": NotRegistered,
    "not_authorized": NotAuthorized,
    "insufficient_balance": NotAuthorized,  # of weights: the stake is below what the chain asks for
    "invalid_argument": InvalidRequest,
    "limit_exceeded": InvalidRequest,
    "subnet_not_exists": NoSubnet,
}


def is_lost(error: BaseException) -> bool:
    """Whether the connection broke, so that nobody knows what the chain has done.

    The SDK's backend turns whatever breaks while a transaction is under way into a ``ChainError`` without a name, and
    keeps the reason as its cause.
    """
    from bittensor.result import ChainError, ConnectionNotReady, ErrorCode, RpcConnectionError

    if isinstance(error, RpcConnectionError | ConnectionNotReady | OSError | TimeoutError):
        return True
    if not isinstance(error, ChainError) or error.name or error.code is not ErrorCode.UNKNOWN:
        return False
    cause = error.__cause__
    return isinstance(cause, OSError | TimeoutError) or type(cause).__module__.partition(".")[0] == "websockets"


def refusal(error: Exception, doing: str) -> ChainFailure:
    """The error of ``errors`` for what the SDK raised or returned while ``doing`` something."""
    from bittensor.result import BittensorError, ChainError, ErrorCode

    text = f"{doing}: {str(error) or type(error).__name__}"
    if is_lost(error):
        return ConnectionLost(text, retry_after=_seconds(getattr(error, "retry_after", None)))
    if not isinstance(error, ChainError):
        return (InvalidRequest if isinstance(error, BittensorError | ValueError | TypeError) else OtherRefusal)(text)
    name = error.name or ""
    if name and name not in str(error):
        text = f"{text} ({name})"
    if name in COMMITS:
        return TooManyCommits(text, name=name)
    if name in POOL:
        return PoolRefused(text, name=name, retry_blocks=1)
    if error.code in (ErrorCode.RATE_LIMITED, ErrorCode.TOO_EARLY):
        return RateLimited(text, name=name)
    if name in VERSION:
        return WrongVersion(text, name=name)
    return FINAL.get(error.code.value, OtherRefusal)(text, name=name)


def failed(result: Any) -> Exception | None:
    """The error of a result without success, None if it succeeded."""
    from bittensor.result import ChainError

    return None if result.success else result.error or ChainError(result.message or "the chain gave no reason")


def _seconds(value: object) -> float | None:
    """A header's ``retry-after`` in seconds; None if it is a date or nothing."""
    try:
        return max(0.0, float(str(value)))
    except ValueError:
        return None
