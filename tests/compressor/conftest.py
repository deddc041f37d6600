"""A condenser over a random decoder whose answers depend on every token of its prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from condense_core.compressor.condenser import Condenser


@pytest.fixture(scope="session")
def lively_path(
    build_model: Callable[..., PreTrainedModel], tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a decoder whose answers depend on every token of its prompt; it has no compressor checkpoint."""
    folder = tmp_path_factory.mktemp("lively") / "random-lively"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = build_model(vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lively(lively_path: Path) -> Condenser:
    """A condenser of the method ``select`` over the decoder of ``lively_path``."""
    return Condenser.from_pretrained(lively_path, device="cpu")
