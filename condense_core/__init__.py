"""condense_core: long contexts become a few soft tokens, or a pruned KV cache, that an unmodified LLM can use.

The names below are loaded on first use (PEP 562), so `import condense_core` costs next to nothing; torch
arrives with the ops and the containers, transformers with the first `Condenser`, and nothing optional unless
asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from condense_core._version import __version__

if TYPE_CHECKING:
    from condense_core import ops
    from condense_core.compressor.condenser import Condenser
    from condense_core.compressor.soft_tokens import SoftTokens
    from condense_core.pruning.cache import PrunedCache
    from condense_core.pruning.session import prune

__all__ = ["Condenser", "SoftTokens", "PrunedCache", "prune", "ops", "__version__"]

# Public name -> (module, attribute); an attribute of None means the module itself.
_LAZY: dict[str, tuple[str, str | None]] = {
    "Condenser": ("condense_core.compressor.condenser", "Condenser"),
    "SoftTokens": ("condense_core.compressor.soft_tokens", "SoftTokens"),
    "PrunedCache": ("condense_core.pruning.cache", "PrunedCache"),
    "prune": ("condense_core.pruning.session", "prune"),
    "ops": ("condense_core.ops", None),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first touched; AttributeError for any other."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value  # later look-ups no longer come through here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
