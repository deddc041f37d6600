"""The plan of a run: exact counts for the real Mistral-7B, and a memory that is the one a real step takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM, PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.training.config import TrainConfig
from condense_core.training.data import BatchMaker
from condense_core.training.plan import MemoryPlan, largest_batch, memory_plan, meta_model
from condense_core.training.run import RunConfig, plan
from condense_core.training.trainer import Trainer

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
GIB = 2**30


def without_hub(patch: pytest.MonkeyPatch) -> None:
    """As on a machine without network, at once."""

    def fail(name: str, **_: object) -> None:
        raise OSError(f"cannot reach a hub for {name}\nand more lines")

    patch.setattr("condense_core.training.plan.AutoConfig.from_pretrained", fail)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    without_hub(monkeypatch)


@pytest.fixture
def mistral(no_hub: None) -> PreTrainedModel:
    return meta_model(MISTRAL)


@pytest.fixture(scope="module")
def mistral_plan() -> MemoryPlan:
    """Of a run on a GPU; a step of 40 layers takes some seconds even without values."""
    run = RunConfig(model=MISTRAL, corpus=None, out=Path("nowhere"), ratios=(4, 8))
    with pytest.MonkeyPatch.context() as patch:
        without_hub(patch)
        return plan(run, TrainConfig(gradient_checkpointing=True), device="cuda")


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


def test_counts_and_bytes_of_a_run(mistral_plan: MemoryPlan) -> None:
    """By hand: what an adapter, a pooler and a projection have for eight layers of this width."""
    made = mistral_plan
    d, kv, wide, rank = 4096, 1024, 14336, 32
    linears = [(d, d), (d, kv), (d, kv), (d, d), (d, wide), (d, wide), (wide, d)]
    adapter = 8 * sum(rank * (rows + columns) for rows, columns in linears)
    pooler = d + d + 32 * (4 + 8)  # norm, queries, a bias per head and place
    projection = d + (d * 2 * d + 2 * d) + (2 * d * d + d) + 2  # norm, up, down, two gains
    layer = sum(rows * columns for rows, columns in linears) + 2 * d
    assert made.decoder_parameters == 7_241_732_096
    assert made.trainable_parameters == adapter + pooler + projection
    assert made.encoder_parameters == 8 * layer
    assert made.weights == 7_241_732_096 * 2 + 4 * made.trainable_parameters
    assert made.weights - 4 * made.trainable_parameters == pytest.approx(13.49 * GIB, rel=1e-3)
    assert made.gradients_and_optimizer == 12 * made.trainable_parameters
    assert made.total == made.weights + made.gradients_and_optimizer + made.step
    # With checkpointing: a row of the residual stream for each position and layer, and some layers' worth of more.
    assert 0.5 * GIB < made.step < 8 * GIB


def test_the_plan_is_said_in_gib(mistral_plan: MemoryPlan) -> None:
    lines = mistral_plan.lines()
    assert "7,241.7 M parameters, frozen, bfloat16" in lines[0]
    assert lines[-1].startswith("total")
    assert lines[-1].endswith("GiB per process")


STEP = TrainConfig(
    steps=9, tokens=1200, min_context=192, max_context=192, turns=2, reconstruction=0.0, continuation=1.0
)
TOLERANCE = 0.15
"""The plan counts the tensors that operators return, for a tail of assumed length. A real step has what operators
allocate inside, and the tail that its tokenizer gives. The largest difference found is 11%."""


def measured(trainer: Trainer, steps: int) -> int:
    """The most bytes that torch's allocator gave out at once in some steps, beyond those before; the first is warm-up.

    Counted by torch's profiler, which knows nothing of how the plan is made.
    """
    trainer.step(0)
    peak = 0
    for step in range(1, 1 + steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.step(step)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.fixture
def both(build_model: Callable[..., MistralForCausalLM], maker: BatchMaker, tmp_path: Path) -> Callable[..., Any]:
    """``both(dtype, train, steps, **config)``: the plan's bytes of a step, and those of real steps."""

    def compare(dtype: torch.dtype, train: TrainConfig, steps: int = 1, **changes: Any) -> tuple[int, int]:
        settings = {"method": "pool", "d_model": 48, "encoder_layers": 1, "ratios": (4,), "mlp_hidden": 48}
        settings |= {"num_heads": 1, "lora_rank": 4, "lora_alpha": 4.0, "segment_tokens": 64}
        config = CompressorConfig(**(settings | changes))
        model = build_model(0).to(dtype)
        with torch.device("meta"):
            shapes = type(model)(model.config).to(dtype)
        planned = memory_plan(shapes, config, train, autocast=dtype != torch.float32)
        compressor = Compressor(model, config)
        compressor.attach_lora()
        trainer = Trainer(model, compressor, maker, train, tmp_path)
        trainer.resume()
        return planned.step, measured(trainer, steps)

    return compare


@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "recomputed"])
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        pytest.param(torch.float32, {}, id="pool"),
        pytest.param(torch.bfloat16, {}, id="pool, bf16"),
        pytest.param(torch.float32, {"method": "mean", "ratios": (2,)}, id="mean, ratio 2"),
        pytest.param(torch.float32, {"method": "memory", "ratios": (8,)}, id="memory, ratio 8"),
        pytest.param(torch.float32, {"encoder_layers": 2, "lora_rank": 0, "halo": 2}, id="pool, halo, no adapter"),
    ],
)
def test_the_memory_of_a_step_is_the_one_that_is_measured(
    both: Callable[..., Any], dtype: torch.dtype, changes: dict[str, Any], checkpointing: bool
) -> None:
    planned, real = both(dtype, replace(STEP, gradient_checkpointing=checkpointing), **changes)
    assert planned == pytest.approx(real, rel=TOLERANCE)


def test_the_memory_is_enough_for_every_batch_that_is_drawn(both: Callable[..., Any]) -> None:
    """Contexts, kinds and ratios as they come: no step needs more, and the largest not half as much."""
    train = replace(STEP, min_context=64, max_context=256, continuation=0.4, reconstruction=0.2)
    planned, real = both(torch.float32, train, steps=6, ratios=(2, 4))
    assert 0.5 * planned < real < (1 + TOLERANCE) * planned


def test_the_largest_batch_is_one_that_can_be_drawn() -> None:
    config = CompressorConfig("pool", d_model=48, encoder_layers=2, ratios=(2, 8))
    train = TrainConfig(tokens=4000, min_context=100, max_context=1000)
    for layers in (0, 4, 100):
        batch = largest_batch(config, train, layers)
        assert batch.context.shape[1] % 2 == 0
        assert 98 <= batch.context.shape[1] <= 1000
        assert 0.9 * 4000 < batch.num_tokens < 1.2 * 4000
    only_questions = replace(train, reconstruction=0.0, continuation=0.0)
    assert largest_batch(config, only_questions, 4).tail_mask.float().mean() < 0.5


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
        plan(run(tmp_path, encoder_layers=33), TrainConfig(), device="cuda")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "select"}, ValueError, "method: got 'select', expected one of pool, mixed, mean, memory"),
        ({"ratios": ()}, ValueError, "ratios: empty"),
        ({"ratios": (4, 0)}, ValueError, "ratio: got 0"),
        ({"ratios": (2.5,)}, ValueError, "ratio: got 2.5, expected an integer"),
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
