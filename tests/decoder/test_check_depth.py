"""How much of a model a self-check runs: every kind of layer, and no more of a large one."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from condense_core.compressor.encoder import Encoder
from condense_core.decoder import architecture
from condense_core.decoder.architecture import check_depth, layer_kinds
from condense_core.pruning import Rerotate, SnapKV, prune
from condense_core.pruning.rotary_check import rotary_of

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def gemma3() -> PreTrainedModel:
    """Five layers of a sliding window, then one that sees everything, twice."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=8)).eval()


def smollm3() -> PreTrainedModel:
    """Every fourth layer has no rotary embedding."""
    return SmolLM3ForCausalLM(SmolLM3Config(**SMALL)).eval()


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "_SMALL", 0)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    ("build", "kinds", "depth"),
    [
        pytest.param(llama, 1, 1, id="layers of one kind"),
        pytest.param(gemma3, 2, 6, id="sliding and full layers"),
        pytest.param(smollm3, 2, 4, id="layers with and without RoPE"),
    ],
)
def test_a_large_model_runs_until_every_kind_was_met(build, kinds, depth):
    torch.manual_seed(0)
    model = build()
    assert len(set(layer_kinds(model))) == kinds
    assert check_depth(model) == depth


def test_a_small_model_runs_four_layers_at_least():
    assert check_depth(llama()) == 4


@pytest.mark.usefixtures("everything_is_large")
def test_no_later_layer_of_a_large_model_is_run():
    torch.manual_seed(0)
    model, run = llama(), set()
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: run.add(index))
    Encoder(model, 8)
    prune(model, Rerotate(SnapKV(keep=0.5)))
    assert run == {0}


@pytest.mark.usefixtures("everything_is_large")
def test_layers_that_were_not_run_have_the_rotation_of_their_kind():
    torch.manual_seed(0)
    found = rotary_of(smollm3())
    assert [len(rotary.inv_freq) for rotary in found] == [4, 4, 4, 0] * 3
