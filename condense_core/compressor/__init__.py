"""Compressors: `Condenser`, the pipeline from text to soft tokens, and `SoftTokens`, what it returns.

Names are loaded on first use: a file of soft tokens needs torch, only a `Condenser` needs transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from condense_core.compressor.condenser import Condenser
    from condense_core.compressor.soft_tokens import SoftTokens, SoftTokensError

__all__ = ["Condenser", "SoftTokens", "SoftTokensError"]

_LAZY = {
    "Condenser": "condense_core.compressor.condenser",
    "SoftTokens": "condense_core.compressor.soft_tokens",
    "SoftTokensError": "condense_core.compressor.soft_tokens",
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
