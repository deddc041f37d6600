"""A tokenizer, a corpus and a decoder small enough to train in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from condense_core.tasks.sources import ProseWriter
from condense_core.training.data import BatchMaker
from condense_core.training.store import SentenceStore


@pytest.fixture(scope="session")
def tokenizer(tiny_model_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture(scope="session")
def store(tokenizer: PreTrainedTokenizerBase) -> SentenceStore:
    return SentenceStore((ProseWriter().document(i, 60) for i in range(20, 26)), tokenizer)


@pytest.fixture
def maker(store: SentenceStore, tokenizer: PreTrainedTokenizerBase) -> BatchMaker:
    return BatchMaker(store, tokenizer, seed=5)


@pytest.fixture(scope="session")
def build_model(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], MistralForCausalLM]:
    """``build_model(seed)``: a decoder of two layers as transformers initialises it."""

    def build(seed: int) -> MistralForCausalLM:
        torch.manual_seed(seed)
        config = MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=512,
            sliding_window=None,
            tie_word_embeddings=False,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return MistralForCausalLM(config)

    return build


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the first run's precision for the whole process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
