"""Compression under load: an engine with a queue in front of one device, HTTP around it, and clients.

`CompressionEngine` needs nothing beyond the library. The HTTP server (`condense serve`), the clients and Ray need the
extra `[serve]`, and are imported where they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from condense_core.serving.client import AsyncCondenseClient, CondenseClient
    from condense_core.serving.engine import CompressionEngine
    from condense_core.serving.errors import BadAnswer, ServingError, Unavailable
    from condense_core.serving.requests import AnswerRequest, CompressRequest, PruneRequest

__all__ = [
    "CompressionEngine",
    "CompressRequest",
    "PruneRequest",
    "AnswerRequest",
    "CondenseClient",
    "AsyncCondenseClient",
    "ServingError",
    "Unavailable",
    "BadAnswer",
]

_LAZY = {
    "AnswerRequest": "condense_core.serving.requests",
    "AsyncCondenseClient": "condense_core.serving.client",
    "BadAnswer": "condense_core.serving.errors",
    "CompressRequest": "condense_core.serving.requests",
    "CompressionEngine": "condense_core.serving.engine",
    "CondenseClient": "condense_core.serving.client",
    "PruneRequest": "condense_core.serving.requests",
    "ServingError": "condense_core.serving.errors",
    "Unavailable": "condense_core.serving.errors",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first touched; AttributeError for any other."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
