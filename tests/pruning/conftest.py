"""Lively random decoders for the tests of sessions and caches, each built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def lively_model(build_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """``lively_model(family, attention, **config changes)``: the same object for the same arguments; tests leave its
    weights and its config as they are."""

    @cache
    def lively(family: str = "mistral", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
        return build_model(family, attn_implementation=attention, **({"max_position_embeddings": 512} | changes))

    return lively
