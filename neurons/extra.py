"""What only neurons need, imported where it is used: the extra `neurons`."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def bittensor_module(name: str = "bittensor") -> Any:
    """A module of the Bittensor SDK; ``ImportError`` of one line where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("bittensor"):
            raise
        raise ImportError("bittensor is missing: pip install 'condense-core[neurons]'") from None
