"""Rotary embeddings by layer: what ``rotary_of`` finds out is what the models do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from condense_core.pruning.methods.common import unrotate
from condense_core.pruning.rotary import Rotary
from condense_core.pruning.rotary_check import rotary_of

HALVES, PAIRS, NONE = "halves", "pairs", "none"

# Of 16 channels a head, unless the family fixes its own head_dim: how many each layer turns, and how they are paired.
FORMS = {
    "Cohere": [(16, PAIRS), (16, PAIRS)],
    "Cohere2": [(16, PAIRS), (0, NONE)],
    "Gemma2": [(16, HALVES), (16, HALVES)],
    "Gemma3Text": [(16, HALVES), (16, HALVES)],
    "Glm": [(8, PAIRS), (8, PAIRS)],
    "Glm4": [(8, PAIRS), (8, PAIRS)],
    "GptOss": [(16, HALVES), (16, HALVES)],
    "Granite": [(16, HALVES), (16, HALVES)],
    "Llama": [(16, HALVES), (16, HALVES)],
    "Mistral": [(16, HALVES), (16, HALVES)],
    "Mixtral": [(16, HALVES), (16, HALVES)],
    "NanoChat": [(16, HALVES), (16, HALVES)],
    "Nemotron": [(8, HALVES), (8, HALVES)],
    "Olmo2": [(16, HALVES), (16, HALVES)],
    "Olmo3": [(16, HALVES), (16, HALVES)],
    "Phi3": [(16, HALVES), (16, HALVES)],
    "Qwen2": [(16, HALVES), (16, HALVES)],
    "Qwen3": [(16, HALVES), (16, HALVES)],
    "SmolLM3": [(16, HALVES), (0, NONE)],
    "StableLm": [(4, HALVES), (4, HALVES)],
}


@torch.no_grad()
def keys_at(model: PreTrainedModel, first: int, count: int = 12) -> list[Tensor]:
    """Of every layer the keys ``[1, G, count, D]`` that the model caches of one text, which begins at ``first``."""
    ids = torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache(config=model.config)
    positions = torch.arange(first, first + count)[None]
    model.model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("family", FORMS)
def test_the_form_of_every_layer_is_found(family_model: Callable[..., PreTrainedModel], family: str) -> None:
    found = []
    for rotary in rotary_of(family_model(family)):
        form = (PAIRS if rotary.interleaved else HALVES) if rotary.turns else NONE
        found.append((rotary.rotary_dim, form))
    assert found == FORMS[family]


@pytest.mark.parametrize("distance", [37, -5])
@pytest.mark.parametrize("family", FORMS)
def test_keys_move_as_the_model_would_have_made_them(
    family_model: Callable[..., PreTrainedModel], family: str, distance: int
) -> None:
    """Attention depends on distances alone, so that all layers of a text that begins elsewhere see the same."""
    model = family_model(family)
    layers = zip(keys_at(model, 20), keys_at(model, 20 + distance), rotary_of(model), strict=True)
    for here, there, rotary in layers:
        torch.testing.assert_close(rotary.move(here, torch.tensor(distance)), there, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FORMS)
def test_channels_in_halves_turn_by_the_half_table(family_model: Callable[..., PreTrainedModel], family: str) -> None:
    """What ops are given of keys at positions 20 to 31, undone by its table, is what they would be given at 0."""
    model = family_model(family)
    for turned, rotary in zip(keys_at(model, 20), rotary_of(model), strict=True):
        at_zero = rotary.move(turned, -torch.arange(20, 32))
        table = (t[None] for t in rotary.half_table(torch.arange(20, 32)))
        undone = unrotate(rotary.to_halves(turned), *table)
        factor = torch.ones(rotary.width)
        factor[: rotary.rotary_dim] = rotary.factor
        torch.testing.assert_close(undone, rotary.to_halves(at_zero / factor), atol=1e-5, rtol=1e-5)


def test_layers_of_two_frequencies_are_told_apart(family_model: Callable[..., PreTrainedModel]) -> None:
    """Gemma 3: 10,000 in layers with a sliding window, 1,000,000 in the others."""
    local, everywhere = rotary_of(family_model("Gemma3Text"))
    slowest = [1e4 ** -(14 / 16), 1e6 ** -(14 / 16)]
    assert [float(r.inv_freq[-1]) for r in (local, everywhere)] == pytest.approx(slowest, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama", "Cohere2", "Glm4", "GptOss"])
def test_the_form_is_found_in_16_bits_too(
    family_model: Callable[..., PreTrainedModel], family: str, dtype: torch.dtype
) -> None:
    model = family_model(family)
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    for parameter in half.parameters():  # buffers stay, as they do when a checkpoint is loaded in 16 bits
        parameter.data = parameter.data.to(dtype)
    assert all(map(Rotary.same_as, rotary_of(half), rotary_of(model)))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dynamic", {"factor": 4.0}),
        (
            "longrope",
            {
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        ),
    ],
)
def test_frequencies_that_change_with_the_length_are_refused(
    family_model: Callable[..., PreTrainedModel], kind: str, settings: dict[str, Any]
) -> None:
    model = family_model("Llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4} | settings)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM is of the kind '{kind}', .*; supported: rotary") as error:
        rotary_of(model)
    assert "\n" not in str(error.value)


def test_keys_that_move_in_another_way_are_refused(
    family_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("Llama", num_hidden_layers=1)
    embedding = model.model.rotary_emb
    own = embedding.forward
    monkeypatch.setattr(embedding, "forward", lambda x, position_ids: own(x, position_ids**2))
    with pytest.raises(ValueError, match=r"layer 0 of LlamaForCausalLM do not move .*; supported: .*\(Cohere\)"):
        rotary_of(model)


def test_a_model_is_run_once(family_model: Callable[..., PreTrainedModel]) -> None:
    model = family_model("Llama", num_hidden_layers=3)
    calls = []
    hook = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    first, second = rotary_of(model), rotary_of(model)
    hook.remove()
    assert (first is second, len(calls)) == (True, 1)
    assert not model.model.layers[0].self_attn._forward_pre_hooks
