"""Random decoders of every supported family, with weights large enough that a wrong position or mask shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from condense_core.compressor.condenser import Condenser

_CLASSES = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def enliven(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights of unit gain instead of transformers' 0.02: attention is sharp and every layer changes its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_((0.3 if name.endswith("bias") else 1.0) + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (2.0 if "q_proj" in name else 1.0) / parameter.shape[1] ** 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PreTrainedModel]:
    """``build_model(family, seed=, **config changes)``: a lively random decoder in fp32."""

    def build(family: str = "mistral", *, seed: int = 0, **changes: object) -> PreTrainedModel:
        config_class, model_class = _CLASSES[family]
        settings = {
            "vocab_size": 400,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
        if family == "mistral":
            settings["sliding_window"] = None
        if family == "qwen2":
            del settings["head_dim"]  # Qwen2 has none of its own
        return enliven(model_class(config_class(**(settings | changes))), seed)

    return build


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


@pytest.fixture
def tokenizer(tiny_model_path: Path) -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer; a copy of its own for every test."""
    return AutoTokenizer.from_pretrained(tiny_model_path)
