"""The encoder against transformers' own forward pass, over packs of every shape, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from condense_core.compressor.compressor import window_scores
from condense_core.compressor.encoder import Encoder

# fp32 through up to three layers whose activations are of order 1 to 10; SDPA may sum in another order.
TOLERANCES = {"atol": 1e-4, "rtol": 1e-4}

Build = Callable[..., PreTrainedModel]

# A window shorter than the sequences below; Qwen2's first layer is full, its others slide.
FAMILIES = {
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
}
# Equal lengths run as one batch, others one by one; empty and one-token sequences meet the edges of both.
PACKS = [[7, 7, 7], [5, 0, 9, 1], [1], [1, 1], [0, 4, 4], [12]]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, build_model: Build) -> PreTrainedModel:
    family, changes = FAMILIES[request.param]
    return build_model(family, **changes)


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(400, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encode(encoder: Encoder, model: PreTrainedModel, ids: Tensor, ends: list[int] | None = None) -> Tensor:
    return encoder(model.model.embed_tokens(ids), ends or [0, len(ids)])[0]


@torch.no_grad()
def test_every_depth_equals_the_models_own_hidden_states(model: PreTrainedModel) -> None:
    ids = tokens(12)
    expected = model(input_ids=ids[None], output_hidden_states=True).hidden_states
    depth = len(model.model.layers)
    for num_layers in range(depth + 1):
        hidden = encode(Encoder(model, num_layers), model, ids)
        if num_layers == depth:  # transformers gives the last one behind the final norm
            hidden = model.model.norm(hidden)
        torch.testing.assert_close(hidden, expected[num_layers][0], **TOLERANCES)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_pack_equals_its_sequences_alone(model: PreTrainedModel, lengths: list[int], causal: bool) -> None:
    encoder = Encoder(model, 2, causal=causal)
    ids, ends = tokens(sum(lengths)), [0, *accumulate(lengths)]
    alone = [encode(encoder, model, part) for part in ids.split(lengths) if len(part)]
    torch.testing.assert_close(encode(encoder, model, ids, ends), torch.cat(alone), **TOLERANCES)


@torch.no_grad()
def test_bidirectional_equals_the_model_under_a_full_mask(build_model: Build) -> None:
    model, ids = build_model(), tokens(9)
    full = torch.zeros(1, 1, 9, 9)
    expected = model(input_ids=ids[None], attention_mask=full, output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(encode(Encoder(model, 2, causal=False), model, ids), expected, **TOLERANCES)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_which_tokens_a_change_reaches(build_model: Build, causal: bool) -> None:
    """One layer with a window of 5: a token is seen 4 places on, and 4 places back only where attention is two-way."""
    model = build_model(sliding_window=5)
    encoder = Encoder(model, 1, causal=causal)
    ids = tokens(20)
    changed = ids.clone()
    changed[10] = (changed[10] + 1) % 400
    differs = (encode(encoder, model, ids) != encode(encoder, model, changed)).any(-1)
    assert differs.nonzero().flatten().tolist() == list(range(10 if causal else 6, 15))


@torch.no_grad()
def test_what_is_captured_are_the_queries_and_keys_of_that_layer(build_model: Build) -> None:
    model, ids = build_model(attn_implementation="eager"), tokens(12)
    attention = model(input_ids=ids[None], output_attentions=True).attentions
    for layer in range(3):
        _, packing = Encoder(model, 3)(model.model.embed_tokens(ids), [0, 12], capture_layer=layer)
        (seen,) = packing.captured
        query, key = seen.query, seen.key
        assert (query.shape, key.shape) == ((4, 12, 12), (2, 12, 12))
        expected = attention[layer][0, :, -3:].mean((0, 1))
        torch.testing.assert_close(window_scores(query, key, 3), expected, **TOLERANCES)


@torch.no_grad()
def test_the_model_itself_is_untouched_and_shares_its_weights(model: PreTrainedModel) -> None:
    ids = tokens(10)[None]
    before, implementation = model(input_ids=ids).logits, model.config._attn_implementation
    weights = {name: (p.data_ptr(), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    encoder = Encoder(model, 2, causal=False)
    encode(encoder, model, ids[0])
    for name, parameter in encoder.layers.named_parameters():
        assert parameter is model.model.layers.get_parameter(name)
    for name, parameter in model.named_parameters():
        pointer, value, requires_grad = weights[name]
        assert (parameter.data_ptr(), parameter.requires_grad) == (pointer, requires_grad)
        assert torch.equal(parameter, value)
    assert model.config._attn_implementation == implementation
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("num_layers", [-1, 4])
def test_a_depth_the_model_has_not(build_model: Build, num_layers: int) -> None:
    with pytest.raises(ValueError, match=rf"encoder_layers: got {num_layers}, expected 0 to 3"):
        Encoder(build_model(), num_layers)


def test_a_model_that_is_no_llama_shaped_decoder() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(TypeError, match="GPT2LMHeadModel has no embed_tokens, layers, norm, rotary_emb"):
        Encoder(model, 1)


def test_nothing_to_encode(build_model: Build) -> None:
    model = build_model()
    assert encode(Encoder(model, 2), model, tokens(0), [0, 0, 0]).shape == (0, 48)
