"""Lively random decoders for the tests of sessions and caches, each built once; and the modules beside the tests.

Tests see the installed package and nothing else of the checkout (pytest's importlib mode), so that what they share is
loaded here by its path, and imported by them as ``pruning_NAME``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel


def _share(name: str) -> None:
    path = Path(__file__).with_name(f"{name}.py")
    specification = importlib.util.spec_from_file_location(f"pruning_{name}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)


for _name in ("layers", "models", "oracles"):
    _share(_name)


@pytest.fixture(scope="session")
def lively_model(build_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """``lively_model(family, attention, **config changes)``: the same object for the same arguments; tests leave its
    weights and its config as they are."""

    @cache
    def lively(family: str = "mistral", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
        return build_model(family, attn_implementation=attention, **({"max_position_embeddings": 512} | changes))

    return lively
