"""The plan of a run: exact counts for the real Mistral-7B, and estimates that move the right way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from condense_core.training.plan import MemoryPlan, memory_plan, meta_model
from condense_core.training.run import RunConfig, plan
from condense_core.training.trainer import TrainConfig

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
GIB = 2**30


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without network, at once."""

    def fail(name: str, **_: object) -> None:
        raise OSError(f"cannot reach a hub for {name}\nand more lines")

    monkeypatch.setattr("condense_core.training.plan.AutoConfig.from_pretrained", fail)


@pytest.fixture
def mistral(no_hub: None) -> PreTrainedModel:
    return meta_model(MISTRAL)


def run(tmp_path: Path, **changes: object) -> RunConfig:
    return replace(RunConfig(model=MISTRAL, corpus=None, out=tmp_path), **changes)


def test_the_shapes_are_those_that_were_published(mistral: PreTrainedModel) -> None:
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in mistral.parameters())
    assert sum(p.numel() for p in mistral.parameters()) == 7_241_732_096
    layer = mistral.model.layers[31]
    assert layer.self_attn.k_proj.weight.shape == (1024, 4096)
    assert layer.mlp.up_proj.weight.shape == (14336, 4096)
    assert mistral.lm_head.weight.shape == (32000, 4096)
    assert mistral.config.sliding_window is None
    assert mistral.config.rope_parameters["rope_theta"] == 1e6


def test_counts_and_bytes_of_a_run(no_hub: None, tmp_path: Path) -> None:
    """By hand: what an adapter, a pooler and a projection have for eight layers of this width."""
    made = plan(run(tmp_path, ratios=(4, 8)), TrainConfig())
    d, kv, wide, rank = 4096, 1024, 14336, 32
    linears = [(d, d), (d, kv), (d, kv), (d, d), (d, wide), (d, wide), (wide, d)]
    adapter = 8 * sum(rank * (rows + columns) for rows, columns in linears)
    pooler = d + d + 32 * (4 + 8)  # norm, queries, a bias per head and place
    projection = d + (d * 2 * d + 2 * d) + (2 * d * d + d) + 1  # norm, up, down, gain
    layer = sum(rows * columns for rows, columns in linears) + 2 * d
    assert made.decoder_parameters == 7_241_732_096
    assert made.trainable_parameters == adapter + pooler + projection
    assert made.encoder_parameters == 8 * layer
    assert made.weights == 7_241_732_096 * 2 + 4 * made.trainable_parameters
    assert made.weights - 4 * made.trainable_parameters == pytest.approx(13.49 * GIB, rel=1e-3)
    assert made.gradients_and_optimizer == 12 * made.trainable_parameters
    assert made.total == made.weights + made.gradients_and_optimizer + made.activations + made.logits


def test_estimates_move_the_right_way(mistral: PreTrainedModel, tmp_path: Path) -> None:
    config = run(tmp_path).compressor_config(mistral)

    def make(tokens: int = 8192, answer_tokens: int = 2048, checkpointing: bool = False) -> MemoryPlan:
        return memory_plan(mistral, config, tokens=tokens, answer_tokens=answer_tokens, checkpointing=checkpointing)

    base = make()
    assert min(vars(base).values()) > 0
    assert make(checkpointing=True).activations < base.activations / 5
    assert make(tokens=16384).activations == pytest.approx(2 * base.activations)
    assert make(answer_tokens=4096).logits == 2 * base.logits
    assert make(checkpointing=True).weights == base.weights


def test_the_plan_is_said_in_gib(no_hub: None, tmp_path: Path) -> None:
    lines = plan(run(tmp_path), TrainConfig(gradient_checkpointing=True)).lines()
    assert "7,241.7 M parameters" in lines[0]
    assert lines[-1].startswith("total")
    assert lines[-1].endswith("GiB per process")


def test_a_local_model(tiny_model_path: Path, tmp_path: Path) -> None:
    model = meta_model(str(tiny_model_path))
    assert all(p.is_meta for p in model.parameters())
    assert plan(run(tmp_path, model=str(tiny_model_path), encoder_layers=2), TrainConfig()).total > 0


def test_a_model_that_nobody_knows(no_hub: None) -> None:
    with pytest.raises(ValueError, match="model: cannot read the config of 'maker/unknown'") as caught:
        meta_model("maker/unknown")
    assert "\n" not in str(caught.value)


def test_too_deep_an_encoder(no_hub: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder_layers: got 33, expected 0 to 32"):
        plan(run(tmp_path, encoder_layers=33), TrainConfig())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "select"}, ValueError, "method: got 'select', expected one of pool, mean, memory"),
        ({"ratios": ()}, ValueError, "ratios: empty"),
        ({"ratios": (4, 0)}, ValueError, "ratio: got 0"),
        ({"ratios": (2.5,)}, TypeError, "ratio: got 2.5"),
    ],
)
def test_a_bad_run(tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, **changes)


@pytest.mark.parametrize("method", ["pool", "mean", "memory"])
def test_the_compressor_of_a_run(mistral: PreTrainedModel, tmp_path: Path, method: str) -> None:
    config = run(tmp_path, method=method, ratios=(8, 4, 8), halo=2, lora_rank=16).compressor_config(mistral)
    assert (config.method, config.d_model, config.encoder_layers, config.ratios) == (method, 4096, 8, (4, 8))
    assert (config.lora_rank, config.lora_alpha, config.model_id) == (16, 16.0, MISTRAL)
    assert (config.num_heads, config.halo) == ((32, 2) if method == "pool" else (1, 0))
    assert (config.segment_tokens > 0) == (method == "memory")
