"""Models whose attention a session does not reproduce are refused in one line: what they have, what is supported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from transformers import PreTrainedModel

from condense_core.pruning import Knorm, PrunedCache, prune

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LATENT = SMALL | {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
REFUSED = {
    "DeepseekV2": (LATENT | {"topk_method": "greedy"}, "attends to 4 heads of 32, but caches 1 of 16"),
    "DeepseekV3": (LATENT, "attends to 4 heads of 32, but caches 1 of 16"),
    "DiffLlama": (SMALL, "computes attention more than once"),
    "Doge": (SMALL, r"attention_mask: got \[1, 4, 4, 4\]"),
    "Llama4Text": (GROUPED | {"num_local_experts": 2, "intermediate_size_mlp": 96}, "of the kind chunked_attention"),
    "Phi": (SMALL, "has no norm where expected"),
}


def build(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = getattr(T, family.removesuffix("Text") + "ForCausalLM")
    model: PreTrainedModel = kind(getattr(T, f"{family}Config")(**settings)).eval()
    return model


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_pruned_is_said_in_one_line(family: str) -> None:
    settings, what = REFUSED[family]
    model = build(family, settings)
    for _ in range(2):  # the second time from memory
        with pytest.raises(TypeError, match=f"^model: .*{what}.*; supported are Mistral, Llama") as error:
            PrunedCache.prefill(model, torch.arange(3, 93)[None], Knorm(keep=0.5))
        assert "\n" not in str(error.value)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_attention_that_a_session_does_not_reproduce_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looks at an argument of its own, of which a session knows nothing."""
    from condense_core.pruning import session

    model = build("Llama", SMALL)
    own = session.base_attention

    def louder(module: Any, base: str) -> Any:
        def attention(*args: Any, **kwargs: Any) -> Any:
            out, weights = own(module, base)(*args, **kwargs)
            return 2 * out, weights

        return attention

    monkeypatch.setattr(session, "base_attention", louder)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has an attention that a session does not reproduce .* off"):
        prune(model, Knorm(keep=0.5))


def test_a_training_model_is_looked_at_without_its_dropout() -> None:
    model = build("Llama", SMALL | {"attention_dropout": 0.5}).train()
    prune(model, Knorm(keep=0.5))
    assert all(module.training for module in model.modules())
