"""What comes into a session: caches, masks, models, gradients; what is not understood is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, Fp8QuantizedLayer

from condense_core.pruning.cache_layers import prunable_layer
from condense_core.pruning.methods.expected_attention import ExpectedAttention
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV, Rerotate
from condense_testing.pruning import models
from condense_testing.pruning.session_state import state
from condense_testing.pruning.sessions import (
    ATTENTIONS,
    EVICTING,
    HALF,
    NUM_TOKENS,
    TOLERANCE,
    Build,
    generate_ids,
    tokens,
)


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_a_users_cache_is_pruned_in_place(lively_model: Build, configured: bool, window: int | None) -> None:
    model, ids = lively_model("mistral", sliding_window=window), tokens(1, NUM_TOKENS)
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    with prune(model, SnapKV(budget=20, window=8)):
        out = model(ids, past_key_values=cache)
    assert out.past_key_values is cache
    assert [layer.held for layer in cache.layers] == [20] * 3
    assert cache.get_seq_length() == NUM_TOKENS
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    with prune(model, AdaKV(SnapKV(budget=20, window=8))):
        model(ids, past_key_values=cache)
    assert all(isinstance(layer, RaggedLayer) for layer in cache.layers)


def test_a_cache_that_was_filled_before_is_taken_over_as_it_is(lively_model: Build) -> None:
    """A prefill is a pass with an empty cache: a session that opens later prunes nothing, and changes nothing."""
    for window in (None, 40):
        model, ids = lively_model("mistral", sliding_window=window), tokens(1, NUM_TOKENS)
        plain, taken = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (plain, taken):
            model(ids[:, :80], past_key_values=cache)
        for step in ids[:, 80:].split(5, 1):
            expected = model(step, past_key_values=plain).logits
            with prune(model, HALF):
                models.close(model(step, past_key_values=taken).logits, expected, TOLERANCE)
        assert taken.get_seq_length() == NUM_TOKENS


def test_caches_that_cannot_be_pruned_are_refused(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    before = state(model)
    with prune(model, HALF):
        with pytest.raises(ValueError, match=r"StaticLayer, expected a DynamicCache or a PrunedCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=120))
        with pytest.raises(ValueError, match=r"StaticLayer, expected a DynamicCache"):
            generate_ids(model, ids, cache_implementation="static")
        offloaded = DynamicCache()
        offloaded.offloading = True  # made so by offloading=True, which wants a GPU
        with pytest.raises(ValueError, match=r"cannot prune an offloaded cache .* expected a DynamicCache"):
            model(ids, past_key_values=offloaded)
    assert state(model) == before
    quantized = Cache(layers=[Fp8QuantizedLayer()])  # a growing layer, too, but not with keys in `keys` alone
    with pytest.raises(ValueError, match=r"type Fp8QuantizedLayer, expected a DynamicCache"):
        prunable_layer(quantized, 0)


def test_masks_that_say_too_much_are_refused(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(2, NUM_TOKENS)
    with prune(model, HALF):
        with pytest.raises(ValueError, match=r"expected \[B, tokens\] or None, to prune by"):
            model(ids, attention_mask=torch.ones(2, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril())
        mask = torch.ones_like(ids)
        mask[1, 30:33] = 0
        with pytest.raises(ValueError, match=r"sequence 1 has 87 tokens .* padding on the left or on the right"):
            model(ids, attention_mask=mask)


@pytest.mark.slow
def test_flex_attention_is_refused(build_model: Build) -> None:
    model = build_model()
    model.config._attn_implementation = "flex_attention"
    before = state(model)
    with (
        pytest.raises(ValueError, match=r"'flex_attention' cannot be pruned, expected one of sdpa, eager"),
        prune(model, HALF),
    ):
        pass
    assert state(model) == before


def test_what_is_no_method_or_no_decoder_is_refused(lively_model: Build) -> None:
    for bad in (None, "snapkv", SnapKV):
        with pytest.raises(TypeError, match=r"expected a pruning method such as SnapKV\(keep=0.25\)"):
            prune(lively_model(), bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: Linear has no embed_tokens, .*; supported are Mistral"):
        prune(torch.nn.Linear(2, 2), HALF)  # type: ignore[arg-type]


def test_a_budget_below_the_window_is_refused_and_a_short_prompt_is_kept(lively_model: Build) -> None:
    model, method = lively_model(), SnapKV(keep=0.25, window=16)
    with prune(model, method):
        with pytest.raises(ValueError, match=r"10 of 40 tokens in layer 0, fewer than the 16 .* at least 0.400"):
            model(tokens(1, 40))
        assert model(tokens(1, 12)).past_key_values.layers[0].held == 12  # all of it is the window
        assert model(tokens(1, 64)).past_key_values.layers[0].held == 16
        padded, mask, _ = models.padded(tokens(2, 64), (64, 12), "left")
        cache = model(padded, attention_mask=mask).past_key_values
        assert cache.layers[0].lengths.tolist() == [16, 16, 12, 12]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_without_a_cache_nothing_changes(lively_model: Build, attention: str) -> None:
    model = lively_model("llama", attention)
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 30), "left")
    packed = torch.cat([torch.arange(50), torch.arange(40)])[None]
    holes = torch.ones_like(ids)
    holes[:, 20:25] = 0
    square = torch.zeros(1, 1, NUM_TOKENS, NUM_TOKENS)
    square[..., 7] = -math.inf  # all queries but one see something
    square[..., 7, 7] = 0
    cases: list[dict[str, Any]] = [
        {},
        {"attention_mask": mask},
        {"attention_mask": holes},
        {"attention_mask": square},
        {"position_ids": packed},
    ]
    for case in cases:
        given = ids[:1] if "position_ids" in case else ids
        expected = model(given, use_cache=False, **case).logits
        with prune(model, HALF):
            found = model(given, use_cache=False, **case)
        assert found.past_key_values is None
        real = torch.ones_like(given, dtype=torch.bool)  # what padding computes is nobody's business
        if "attention_mask" in case and case["attention_mask"].dim() == 2:
            real = case["attention_mask"].bool()
        assert torch.equal(found.logits[real], expected[real]), list(case)
    expected = generate_ids(model, ids, mask, 4)
    with prune(model, HALF):
        assert generate_ids(model, ids, mask, 4, use_cache=False).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["uniform", "ragged"])
def test_gradients_flow_through_a_prefill(lively_model: Build, name: str) -> None:
    """What the prefill computes does not depend on what is kept behind it: neither do its gradients."""
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    grads = []
    for method in (None, EVICTING[name]):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        if method is None:
            model(inputs_embeds=embeds).logits.square().sum().backward()
        else:
            with prune(model, method):
                out = model(inputs_embeds=embeds)
                out.logits.square().sum().backward()
                again = model.get_input_embeddings()(ids[:, :1]).detach().requires_grad_()
                model(inputs_embeds=again, past_key_values=out.past_key_values)
            assert not any(layer.keys.requires_grad for layer in out.past_key_values.layers if name == "ragged")
        grads.append(embeds.grad)
    assert torch.equal(*grads)
    model.zero_grad(set_to_none=True)


def test_attention_weights_are_still_to_be_had(lively_model: Build) -> None:
    model, ids = lively_model("llama", "eager"), tokens(1, NUM_TOKENS)
    expected = model(ids, output_attentions=True).attentions
    with prune(model, HALF):
        out = generate_ids(model, ids, count=2, output_attentions=True, return_dict_in_generate=True)
    for found, weights in zip(out.attentions[0], expected, strict=True):
        assert torch.equal(found, weights)
    assert out.attentions[1][0].shape == (1, 4, 1, 46)


def test_a_rotary_embedding_that_is_not_understood_is_refused_where_it_is_needed(build_model: Build) -> None:
    model = build_model()
    own = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: own(x, position_ids**2)
    prune(model, HALF)  # needs no rotary embedding
    for method in (Rerotate(HALF), ExpectedAttention(keep=0.5)):
        with pytest.raises(ValueError, match=r"layer 0 of MistralForCausalLM do not move .*; supported: rotary"):
            prune(model, method)
