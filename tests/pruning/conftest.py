"""Random decoders for the tests of sessions and caches, each built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def lively_model(build_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """``lively_model(family, attention, **config changes)``: the same object for the same arguments.

    Tests leave its weights and its config as they are.
    """

    @cache
    def lively(family: str = "mistral", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
        return build_model(family, attn_implementation=attention, **({"max_position_embeddings": 512} | changes))

    return lively


# What a family needs besides `_SMALL`; the class is NAME + "ForCausalLM" of the config NAME + "Config".
_SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 1024,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "Cohere": {},
    "Cohere2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "Gemma3Text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "Glm": {"head_dim": 16},
    "Glm4": {"head_dim": 16},
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 512},
    "Granite": {"attention_multiplier": 0.25, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"num_local_experts": 4},
    "NanoChat": {},
    "Nemotron": {},
    "Olmo2": {},
    "Olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
    "Phi3": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "StableLm": {},
}


@pytest.fixture(scope="session")
def family_model() -> Callable[..., PreTrainedModel]:
    """``family_model("Gemma2", **config changes)``: a random decoder of two layers in fp32.

    It is the same object for the same arguments. Attention is sharp enough that a wrong position, softcap or sink
    shows.
    """
    built: dict[str, PreTrainedModel] = {}

    def of(family: str, **changes: Any) -> PreTrainedModel:
        key = repr((family, changes))
        if key not in built:
            config = getattr(transformers, f"{family}Config")(**(_SMALL | _FAMILIES[family] | changes))
            model = getattr(transformers, family.removesuffix("Text") + "ForCausalLM")(config).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("sinks"):
                        parameter.fill_(2.0)
                    elif parameter.dim() > 1:
                        parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            built[key] = model
        return built[key]

    return of
