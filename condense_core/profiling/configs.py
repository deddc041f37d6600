"""Model configurations to measure: by a name, from a file, or of any model that can be loaded; never their weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, MistralConfig

from condense_core.decoder.catalog import model_path
from condense_core.decoder.model import load_errors


def _mistral_7b() -> MistralConfig:
    """Mistral-7B-Instruct-v0.2: 32 layers, 7.2 billion parameters, full attention."""
    return MistralConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )


CONFIGS: dict[str, Callable[[], Any]] = {"mistral-7b": _mistral_7b}
"""Configurations that need no file, by name."""


def model_config(name_or_path: str | Path) -> Any:
    """The config of one of ``CONFIGS``, or of what ``catalog.model_path`` takes; ``ValueError`` where there is none."""
    if isinstance(name_or_path, str) and name_or_path in CONFIGS:
        return CONFIGS[name_or_path]()
    name = model_path(name_or_path)
    with load_errors(name):
        return AutoConfig.from_pretrained(name)


def read_config(path: str | Path) -> Any:
    """The config in a JSON file such as a model's ``config.json``.

    Raises:
        ValueError: it is no JSON object, or of no kind of model that transformers knows, or its values do not fit.
        OSError: there is no such file.
    """
    path = Path(path)
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"config: {path} holds no JSON object; expected a model's config.json")
    kind = settings.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"config: {path} has the model_type {kind!r:.40}, expected one that transformers knows")
    try:
        return AutoConfig.for_model(kind, **settings)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"config: {path}: {' '.join(lines[:2])}") from error
