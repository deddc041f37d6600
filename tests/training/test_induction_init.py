"""The structured start copies before any training, which is its whole purpose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from condense_core.training.induction_init import induction_init


def build(**changes: object) -> MistralForCausalLM:
    settings = {
        "vocab_size": 300,
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    return MistralForCausalLM(MistralConfig(**(settings | changes))).eval()


@torch.no_grad()
def losses(model: MistralForCausalLM, ids: Tensor) -> Tensor:
    """Cross-entropy per predicted place, mean over rows."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)


def repeated(rows: int, length: int) -> Tensor:
    half = torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(0))
    return torch.cat([half, half], 1)


def test_untrained_it_predicts_what_it_has_seen_before() -> None:
    model = build(hidden_size=384)  # a sixth of it is what a head compares: the embedded model's size
    induction_init(model, seed=0)
    per_place = losses(model, repeated(8, 48))
    first, second = per_place[:47].mean(), per_place[49:].mean()
    assert second < first - 3
    assert second < math.log(300) - 1  # and better than knowing nothing
    # It is the repetition that helps, not the place: other tokens in the second half gain nothing.
    fresh = torch.randint(300, (8, 96), generator=torch.Generator().manual_seed(1))
    assert losses(model, fresh)[49:].mean() > first - 1


def test_another_start_does_not() -> None:
    torch.manual_seed(0)
    per_place = losses(build(), repeated(8, 48))
    assert per_place[49:].mean() > per_place[:47].mean() - 0.3


def test_the_seed_decides() -> None:
    models = [build() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        induction_init(model, seed=seed)
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(parameter, same[name]) for name, parameter in first.items())
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 100},
        {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"head_dim": 14},  # no room for a sixth of the residual stream
    ],
    ids=str,
)
def test_a_shape_it_cannot_structure(changes: dict[str, object]) -> None:
    model = build(**changes)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="model: got hidden size"):
        induction_init(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
