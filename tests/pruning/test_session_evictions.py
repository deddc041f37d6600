"""Evictions while text is generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from condense_core.pruning.base import LayerContext, ScoringMethod, Traits
from condense_core.pruning.methods.knorm import Knorm
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import Decoding, Rerotate
from condense_testing.pruning import models
from condense_testing.pruning.sessions import (
    ATTENTIONS,
    HALF,
    NUM_TOKENS,
    TOLERANCE,
    Build,
    generate_ids,
    tokens,
)


def test_positions_go_on_behind_all_tokens_seen(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    seen: list[list[int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"].flatten().tolist())

    prune(model, HALF)  # looks once at how the model turns its keys
    handle = model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with prune(model, HALF):
            out = generate_ids(model, ids, count=3, return_dict_in_generate=True)
            with_shift = len(seen)
            moved = model(ids).past_key_values
        with prune(model, Rerotate(HALF)):
            generate_ids(model, ids, count=3)
    finally:
        handle.remove()
    everything = list(range(NUM_TOKENS))
    assert seen[:with_shift] == [everything, [NUM_TOKENS], [NUM_TOKENS + 1]]
    assert seen[with_shift + 1 :] == [everything, [45], [46]]
    cache = out.past_key_values
    assert cache.get_seq_length() == NUM_TOKENS + 2
    assert [layer.held for layer in cache.layers] == [45 + 2] * 3
    assert moved.get_seq_length() == NUM_TOKENS
    assert cache.get_mask_sizes(4, 0) == (45 + 2 + 4, 45)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_evicting_while_generating(lively_model: Build, attention: str) -> None:
    """The reference: at every step the tokens that the cache says it holds, at the positions that it says."""
    model, ids = lively_model("mistral", attention), tokens(1, 40)
    method = Decoding(Knorm(keep=1.0), budget=30, interval=5)
    reference = models.Reference(model)
    with prune(model, method), torch.no_grad():
        out = model(ids)
        cache, sequence = out.past_key_values, ids
        sizes = []
        for _ in range(20):
            sequence = torch.cat([sequence, out.logits[:, -1:].argmax(-1)], 1)
            before = [layer.all_positions() for layer in cache.layers]
            out = model(sequence[:, -1:], past_key_values=cache)
            sizes.append({layer.held for layer in cache.layers})
            keys_at_first_layer = cache.layers[0].keys
            at = cache.layers[0].all_positions()
            whole = reference.prefill(sequence[0])
            for g in range(2):
                places = at[0, g].tolist()
                expected = reference.turned(whole.keys[0][g, places], places)
                models.close(keys_at_first_layer[0, g], expected, TOLERANCE)
            assert before[0] is None or before[0].shape[2] >= 30
    assert all(len(size) == 1 for size in sizes)
    assert {min(size) for size in sizes} == set(range(30, 35))
    assert cache.get_seq_length() == 60


class Watching(ScoringMethod):
    """Keeps the tokens of the first positions, and remembers the queries that it was given in the first layer."""

    traits = Traits(reads_rotary=True)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        if ctx.layer_idx == 0:
            WATCHED.append((q, ctx.cos, ctx.sin))
        return -torch.arange(k.shape[2], device=k.device).float().expand(k.shape[:3])


WATCHED: list[tuple[Tensor, Tensor, Tensor]] = []


def test_an_eviction_is_told_the_last_queries(lively_model: Build) -> None:
    """Also behind a turn of several tokens, and behind tokens that were taken back."""
    model, ids = lively_model("llama"), tokens(1, 60)
    reference, inner = models.Reference(model), model.model
    cache, sequence = DynamicCache(), ids[:, :20]
    WATCHED.clear()
    with prune(model, Decoding(Watching(keep=1.0), budget=18, interval=6)), torch.no_grad():
        model(sequence, past_key_values=cache)
        model(ids[:, 20:21], past_key_values=cache)
        model(ids[:, 21:24], past_key_values=cache)
        cache.crop(-1)
        sequence = ids[:, :23]
        for step in range(23, 60):
            new = ids[:, step : step + 1]
            sequence = torch.cat([sequence, new], 1)
            before = len(WATCHED)
            model(new, past_key_values=cache)
            for q, cos, sin in WATCHED[before:]:
                count = q.shape[2]
                assert count == (4 if before == 0 else 6)  # those since the prefill, or since the last eviction
                hidden = inner.layers[0].input_layernorm(inner.embed_tokens(sequence[0, -count:]))
                raw = inner.layers[0].self_attn.q_proj(hidden).view(count, 4, 12).transpose(0, 1)
                places = range(len(sequence[0]) - count, len(sequence[0]))
                for h in range(4):
                    models.close(q[0, h], reference.turned(raw[h].double(), places), TOLERANCE)
                expected_cos, expected_sin = inner.rotary_emb(hidden[None], torch.tensor([list(places)]))
                models.close(cos, expected_cos, TOLERANCE)
                models.close(sin, expected_sin, TOLERANCE)
    assert len(WATCHED) == 7


def test_padded_batches_do_not_shrink_while_generating(lively_model: Build) -> None:
    """They are refused before anything is generated; a cache that was padded before the session, at its first token."""
    model = lively_model()
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 47), "left")
    for inner in (Knorm(keep=1.0), Knorm(keep=0.5)):
        method = Decoding(inner, budget=30, interval=1)
        with prune(model, method), pytest.raises(ValueError, match="cannot evict from a padded batch"):
            model(ids, attention_mask=mask)
        with prune(model, inner):
            cache = model(ids, attention_mask=mask).past_key_values
        with prune(model, method), pytest.raises(ValueError, match="cannot evict from a padded batch"):
            model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)
