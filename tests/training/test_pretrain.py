"""Pretraining: exact resumption, learning, and what a step's loss is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import MistralForCausalLM

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.training.data import BatchMaker
from condense_core.training.losses import distillation, soft_context, tail_logits
from condense_core.training.pretrain import Stage, draw_compressed, draw_plain, learning_rate, lm_losses, pretrain

TOLERANCES = {"atol": 1e-5, "rtol": 1e-5}  # fp32 log-softmaxes of logits of order 1, in another order of sums

Build = Callable[[int], MistralForCausalLM]


class CutOffError(Exception):
    pass


def compressors(model: MistralForCausalLM) -> dict[str, Compressor]:
    made = {}
    for method in ("pool", "mean", "memory"):
        config = CompressorConfig(
            method,
            d_model=48,
            encoder_layers=1,
            ratios=(2, 4),
            num_heads=4 if method == "pool" else 1,
            mlp_hidden=8,
            segment_tokens=64 if method == "memory" else 0,
            lora_rank=2,
            lora_alpha=2.0,
        )
        made[method] = Compressor(model, config)
        made[method].attach_lora()
    return made


def weights(model: MistralForCausalLM, made: dict[str, Compressor]) -> list[torch.Tensor]:
    own = [p for compressor in made.values() for p in compressor.trainable_parameters()]
    return [p.detach().clone() for p in (*model.parameters(), *own)]


@pytest.mark.parametrize("cut", [2, 3], ids=["within a stage", "between stages"])
def test_a_run_cut_off_and_resumed_is_the_same_run(
    build_model: Build, maker: BatchMaker, tmp_path: Path, cut: int
) -> None:
    common = {"lr": 0.05, "plain": 0.4, "reconstruction": 0.3, "turns": 2, "ratios": {2: 0.5, 4: 0.5}}
    stages = [Stage(3, 96, 110, tokens=250, **common), Stage(2, 96, 130, tokens=300, **common)]
    options = {"save_every": 2, "log_every": 1}

    whole = build_model(0)
    of_whole = compressors(whole)
    start = weights(whole, of_whole)
    pretrain(whole, of_whole, maker, stages, tmp_path / "whole", **options)

    def cut_off(done: int, _: str) -> None:
        if done == cut:
            raise CutOffError

    torch.manual_seed(0)
    first = build_model(0)
    of_first = compressors(first)
    for mine, theirs in zip(of_first.values(), of_whole.values(), strict=True):
        assert mine.config == theirs.config
    with torch.no_grad():
        for parameter, value in zip(
            [*first.parameters(), *(p for c in of_first.values() for p in c.trainable_parameters())], start, strict=True
        ):
            parameter.copy_(value)
    with pytest.raises(CutOffError):
        pretrain(first, of_first, maker, stages, tmp_path / "parts", progress=cut_off, **options)

    second = build_model(9)
    of_second = compressors(second)
    pretrain(second, of_second, maker, stages, tmp_path / "parts", **options)
    ends = [weights(whole, of_whole), weights(second, of_second)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert sum(not torch.equal(a, b) for a, b in zip(start, ends[0], strict=True)) > len(start) / 2
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "parts")]
    timeless = [[{k: v for k, v in row.items() if k != "s_per_step"} for row in log] for log in logs]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in logs[0]] == [1, 2, 3, 4, 5]

    def never(_: int, __: str) -> None:
        pytest.fail("a finished run took another step")

    pretrain(second, of_second, maker, stages, tmp_path / "parts", progress=never)


def test_it_learns(build_model: Build, maker: BatchMaker, tmp_path: Path) -> None:
    # Warm-up takes 100 steps, of which 30 are run: the rate stays below a third of lr.
    stage = Stage(30, 64, 64, tokens=600, lr=0.03, text=1.0)
    pretrain(build_model(0), {}, maker, [stage], tmp_path, log_every=5)
    losses = [json.loads(line)["text"] for line in (tmp_path / "log.jsonl").open()]
    assert losses[0] > 6
    assert losses[-1] < losses[0] - 1.5


def test_language_model_losses(build_model: Build, maker: BatchMaker) -> None:
    """Answer tokens alone make the first, context tokens alone the second, as transformers counts them."""
    model = build_model(0)
    batch = maker.questions(maker.rng(0), batch=2, context=96, facts=2, turns=2)
    ids = torch.cat([batch.prefix.expand(2, -1), batch.context, batch.tail], 1)
    start = ids.shape[1] - batch.tail.shape[1]
    with torch.no_grad():
        answer, context = lm_losses(model, batch, context_share=1.0, seed=0)
        labels = ids.clone()
        labels[:, :start] = -100
        labels[:, start:][~batch.tail_mask] = -100
        torch.testing.assert_close(answer, model(input_ids=ids, labels=labels).loss, **TOLERANCES)
        labels = ids.clone()
        labels[:, start:] = -100
        torch.testing.assert_close(context, model(input_ids=ids, labels=labels).loss, **TOLERANCES)


def test_tail_logits_are_those_of_the_whole_row(build_model: Build, maker: BatchMaker) -> None:
    model = build_model(0)
    batch = maker.questions(maker.rng(0), batch=2, context=96, facts=2, turns=2)
    ids = torch.cat([batch.prefix.expand(2, -1), batch.context, batch.tail], 1)
    with torch.no_grad():
        logits, picked = tail_logits(model, model.get_input_embeddings()(batch.context), batch)
        whole = model(input_ids=ids).logits
    start = ids.shape[1] - batch.tail.shape[1]
    expected = [whole[row, start + i - 1] for row in range(2) for i in batch.tail_mask[row].nonzero().flatten()]
    torch.testing.assert_close(logits, torch.stack(expected), **TOLERANCES)
    assert torch.equal(picked, batch.tail[batch.tail_mask])


def test_soft_contexts_are_those_of_each_row(build_model: Build, maker: BatchMaker) -> None:
    model = build_model(0)
    compressor = compressors(model)["memory"]  # read in segments of 64
    batch = maker.text(maker.rng(0), batch=3, context=98, length=20)
    with torch.no_grad():
        soft = soft_context(compressor, batch, 4)
        for row in range(3):
            ends = compressor.offsets([98], 4)
            torch.testing.assert_close(soft[row], compressor(batch.context[row], ends, 4), **TOLERANCES)
    assert soft.shape == (3, 25, 48)


def test_distillation_is_the_mean_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator) * 2 for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation(student, teacher), expected, **TOLERANCES)
    torch.testing.assert_close(distillation(teacher, teacher), torch.tensor(0.0), **TOLERANCES)
    # A zero-probability token of the teacher costs nothing.
    teacher[:, 0] = -200.0
    assert torch.isfinite(distillation(student, teacher))


@pytest.mark.parametrize("ratio", [2, 4, 32])
def test_compressed_batches_have_whole_windows(maker: BatchMaker, ratio: int) -> None:
    stage = Stage(1, 96, 200, tokens=400, lr=1.0, reconstruction=0.5, turns=2)
    tasks = set()
    for step in range(12):
        batch = draw_compressed(maker, step, stage, ratio)
        assert batch.context.shape[1] % ratio == 0
        assert 96 - ratio < batch.context.shape[1] <= 200
        tasks.add(batch.task)
    assert tasks == {"question", "reconstruction"}


def test_plain_batches_fill_the_budget(maker: BatchMaker) -> None:
    stage = Stage(1, 96, 200, tokens=900, lr=1.0, text=0.5, turns=2)
    batches = [draw_plain(maker, step, stage) for step in range(12)]
    assert {batch.task for batch in batches} == {"question", "text"}
    for batch in batches:
        assert 96 <= batch.context.shape[1] <= 200
        assert 500 < batch.num_tokens < 1300
    assert torch.equal(draw_plain(maker, 3, stage).context, batches[3].context)


def test_the_learning_rate_warms_up_once_and_falls_to_a_tenth() -> None:
    stage = Stage(1000, 64, 64, tokens=1, lr=2.0)
    assert learning_rate(stage, 0, 0) == pytest.approx(0.02)
    assert learning_rate(stage, 0, 5000) == pytest.approx(2.0)
    assert learning_rate(stage, 500, 5500) == pytest.approx(2.0 * (0.1 + 0.45))
    assert learning_rate(stage, 1000, 6000) == pytest.approx(0.2)


def test_a_loss_of_a_compressor_reaches_model_and_compressor(build_model: Build, maker: BatchMaker) -> None:
    """While both learn, the decoder's first layers get gradients through the encoder as well."""
    model = build_model(0)
    made = compressors(model)["pool"]
    batch = maker.questions(maker.rng(0), batch=1, context=96, facts=2, turns=2)
    logits, ids = tail_logits(model, soft_context(made, batch, 4), batch)
    F.cross_entropy(logits, ids).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert made.pooler.window_bias["4"].grad.any()
