"""The encoder against transformers' own forward pass, over packs of every shape, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from condense_core.compressor.encoder import Encoder
from condense_core.compressor.packed import Packing, strongest_attention
from condense_core.tasks.architectures import FAMILIES as FAMILIES_OF_ALL

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
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])  # plain, a softcap and windows, sinks
def test_what_is_observed_is_the_attention_of_every_layer(name: str) -> None:
    """The strongest weights that a continuation gives, against the attention that transformers reports."""
    model = next(f for f in FAMILIES_OF_ALL if f.kind == name).build(attn_implementation="eager")
    ids = tokens(19) % 100
    attention = model(input_ids=ids[None], output_attentions=True).attentions
    found: dict[int, Tensor] = {}
    packing = Packing([0, 12, 19], parents=(None, 0), observe=lambda i, seen: found.update({i: seen}))
    Encoder(model, 3).read(model.model.embed_tokens(ids), packing)
    assert sorted(found) == [0, 1, 2]
    for layer, seen in found.items():
        expected = attention[layer][0, :, 12:, :12].amax((0, 1))
        torch.testing.assert_close(strongest_attention(seen, packing, 1), expected, **TOLERANCES)


@torch.no_grad()
def test_what_continues_a_sequence_is_read_behind_it_and_behind_nothing_else(model: PreTrainedModel) -> None:
    """Two continuations of the second sequence equal two sequences of which each holds it all."""
    encoder = Encoder(model, 2)
    other, text, first, second = (tokens(n, seed) for seed, n in enumerate((6, 9, 5, 1)))
    ids = torch.cat([other, text, first, second])
    packing = Packing([0, 6, 15, 20, 21], parents=(None, None, 1, 1))
    found = encoder.read(model.model.embed_tokens(ids), packing)
    expected = [encode(encoder, model, other), encode(encoder, model, text)]
    expected += [encode(encoder, model, torch.cat([text, behind]))[9:] for behind in (first, second)]
    torch.testing.assert_close(found, torch.cat(expected), **TOLERANCES)


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
