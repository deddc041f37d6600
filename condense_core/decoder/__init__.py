"""The unmodified LLM: loading it, prompts for it, generating with it, and the model that comes with the package.

The names below are loaded on first use: `decoder.embedded` must not cost the import of transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from condense_core.decoder.architecture import decoder_parts
    from condense_core.decoder.model import load_decoder, open_decoder, public_model_id

__all__ = ["load_decoder", "open_decoder", "public_model_id", "decoder_parts"]

_HOMES = {"decoder_parts": "condense_core.decoder.architecture"} | dict.fromkeys(
    ("load_decoder", "open_decoder", "public_model_id"), "condense_core.decoder.model"
)


def __getattr__(name: str) -> Any:
    """Load a name of ``__all__`` when it is first touched; AttributeError for any other."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
