"""Training a compressor: the decoder stays, the compressor learns, and a run resumes where it was."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import MistralForCausalLM

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.training import teacher
from condense_core.training.data import BatchMaker
from condense_core.training.losses import distillation, scored_context, soft_context, tail_logits, top_divergence
from condense_core.training.teacher import teach
from condense_core.training.trainer import Distillation, TrainConfig, draw, train_compressor

TOLERANCES = {
    # fp32 sums in another order.
    "loss": {"atol": 1e-5, "rtol": 1e-5},
    # After two steps of Adam on gradients that are recomputed; its steps are about lr long whatever the gradient.
    "steps": {"atol": 1e-4, "rtol": 1e-4},
    # What is saved is bf16, 2^-9 of values of order 1, and passes through two layers and an MLP.
    "saved": {"atol": 5e-2, "rtol": 5e-2},
}
CONFIG = TrainConfig(
    steps=4,
    tokens=250,
    min_context=96,
    max_context=128,
    turns=2,
    lr=0.01,
    warmup=1,
    reconstruction=0.25,
    continuation=0.25,
    save_every=2,
    log_every=1,
    bf16=False,
)

Build = Callable[[int], MistralForCausalLM]


class CutOffError(Exception):
    pass


def build_compressor(model: MistralForCausalLM, method: str = "pool", seed: int = 0) -> Compressor:
    torch.manual_seed(seed)
    config = CompressorConfig(
        method,
        d_model=48,
        encoder_layers=1,
        ratios=(2, 4),
        num_heads=4 if method in ("pool", "mixed") else 1,
        window=8 if method == "mixed" else 0,
        residual=method == "mixed",
        mlp_hidden=32,
        segment_tokens=64 if method == "memory" else 0,
        lora_rank=4,
        lora_alpha=8.0,
    )
    compressor = Compressor(model, config)
    compressor.attach_lora()
    return compressor


def changed(config: TrainConfig, **changes: object) -> TrainConfig:
    return TrainConfig(**(vars(config) | changes))


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def test_what_it_computes_is_the_plain_loop(build_model: Build, maker: BatchMaker, tmp_path: Path) -> None:
    """Full logits, one loss, one optimizer step after the other: the recipe written down without the machinery."""
    model = build_model(0)
    model.requires_grad_(False)
    plain = build_compressor(model)
    parameters = plain.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    expected = []
    for step in range(CONFIG.steps):
        ratio = random.Random(f"ratio-{CONFIG.seed}-{step}").choices([2, 4])[0]
        batch = draw(maker, maker.rng(step), CONFIG, ratio)
        student, ids = tail_logits(model, soft_context(plain, batch, ratio), batch)
        with torch.no_grad():
            teacher, _ = tail_logits(model, model.get_input_embeddings()(batch.context), batch)
        kl, cross_entropy = distillation(student, teacher), F.cross_entropy(student, ids)
        optimizer.zero_grad()
        (kl + cross_entropy).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / CONFIG.steps))
        optimizer.param_groups[0]["lr"] = CONFIG.lr * (0.1 + 0.9 * cosine)
        optimizer.step()
        expected.append((kl.item(), cross_entropy.item()))
    trained = build_compressor(model)
    train_compressor(model, trained, maker, CONFIG, tmp_path)
    found = [(row["kl"], row["ce"]) for row in rows(tmp_path)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **TOLERANCES["loss"])
    for ours, theirs in zip(trained.trainable_parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCES["steps"])


@pytest.mark.parametrize("method", ["pool", "mixed", "mean", "memory"])
def test_a_run_cut_off_and_resumed_is_the_same_run(
    build_model: Build, maker: BatchMaker, tmp_path: Path, method: str
) -> None:
    model = build_model(0)
    whole = build_compressor(model, method)
    start = [p.detach().clone() for p in whole.trainable_parameters()]
    train_compressor(model, whole, maker, CONFIG, tmp_path / "whole")

    def cut_off(done: int, _: str) -> None:
        if done == 3:  # behind the state of step 2
            raise CutOffError

    first = build_compressor(model, method)
    assert all(torch.equal(a, b) for a, b in zip(first.trainable_parameters(), start, strict=True))
    with pytest.raises(CutOffError):
        train_compressor(model, first, maker, CONFIG, tmp_path / "parts", progress=cut_off)
    second = build_compressor(model, method, seed=9)
    steps = []
    train_compressor(model, second, maker, CONFIG, tmp_path / "parts", progress=lambda done, _: steps.append(done))
    assert steps == [3, 4]
    ends = [whole.trainable_parameters(), second.trainable_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start, ends[0], strict=True))
    last = [rows(tmp_path / name)[-1] for name in ("whole", "parts")]
    assert {k: v for k, v in last[0].items() if k != "seconds"} == {k: v for k, v in last[1].items() if k != "seconds"}


def test_a_cpu_computes_in_the_dtype_of_the_decoder(build_model: Build, maker: BatchMaker, tmp_path: Path) -> None:
    """Autocast is for GPUs: with it and without it, a run is the same."""
    ends = []
    for bf16 in (False, True):
        model = build_model(0)
        compressor = build_compressor(model)
        train_compressor(model, compressor, maker, changed(CONFIG, steps=1, bf16=bf16), tmp_path / str(bf16))
        ends.append(compressor.trainable_parameters())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_decoder_keeps_every_bit(build_model: Build, maker: BatchMaker, tmp_path: Path, bf16: bool) -> None:
    model = build_model(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    train_compressor(model, build_compressor(model), maker, changed(CONFIG, steps=2, bf16=bf16), tmp_path)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


@pytest.mark.parametrize("goal", ["ce", "kl"])
def test_it_learns_and_what_it_saves_is_what_it_learned(
    build_model: Build, maker: BatchMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goal: str
) -> None:
    """Thirty steps on one batch. Each loss falls where it is the goal; with a random decoder the two conflict."""
    monkeypatch.setattr(maker, "rng", lambda _: random.Random(0))
    model = build_model(0)
    compressor = build_compressor(model)
    config = changed(
        CONFIG,
        steps=30,
        min_context=128,
        lr=0.02,
        reconstruction=0.0,
        continuation=0.0,
        save_every=0,
        log_every=5,
        kl_weight=float(goal == "kl"),
        ce_weight=float(goal == "ce"),
    )
    train_compressor(model, compressor, maker, config, tmp_path)
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [5, 10, 15, 20, 25, 30]
    losses = [row[goal] for row in log]
    assert losses[-1] < {"ce": losses[0] - 0.5, "kl": 0.6 * losses[0]}[goal], losses

    folder = tmp_path / "checkpoint"
    loaded = Compressor(model, CompressorConfig.load(folder))
    loaded.load_weights(folder)
    ids = maker.text(maker.rng(99), batch=1, context=64, length=32).context[0]
    with torch.no_grad():
        learned = compressor(ids, [0, 64], 4)
        torch.testing.assert_close(loaded(ids, [0, 64], 4), learned, **TOLERANCES["saved"])
        untrained = build_compressor(model)(ids, [0, 64], 4)
    assert not torch.allclose(untrained, learned, **TOLERANCES["saved"])


def test_the_loss_is_divergence_from_full_context_plus_cross_entropy(build_model: Build, maker: BatchMaker) -> None:
    model = build_model(0)
    compressor = build_compressor(model)
    batch = maker.questions(maker.rng(0), batch=1, context=96, facts=2, turns=2)
    with torch.no_grad():
        loss, kl, cross_entropy = Distillation(model, compressor, 0.5, 2.0)(batch, 4)
        table = model.get_input_embeddings()
        soft = compressor(batch.context[0], [0, 96], 4)
        start = len(batch.prefix)
        full_ids = torch.cat([batch.prefix, batch.context[0], batch.tail[0]])
        teacher = model(input_ids=full_ids[None]).logits[0, start + 96 - 1 : -1]
        embeds = torch.cat([table(batch.prefix), soft, table(batch.tail[0])])
        student = model(inputs_embeds=embeds[None]).logits[0, start + 24 - 1 : -1]
        mask = batch.tail_mask[0]
        log_p, log_q = teacher[mask].log_softmax(-1), student[mask].log_softmax(-1)
        expected_kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        expected_ce = F.cross_entropy(student[mask], batch.tail[0][mask])
    torch.testing.assert_close(kl, expected_kl, **TOLERANCES["loss"])
    torch.testing.assert_close(cross_entropy, expected_ce, **TOLERANCES["loss"])
    torch.testing.assert_close(loss, 0.5 * kl + 2.0 * cross_entropy, **TOLERANCES["loss"])
    with torch.no_grad():
        without = Distillation(model, compressor, 0.0, 1.0)(batch, 4)
    assert without[1] == 0
    torch.testing.assert_close(without[0], cross_entropy, **TOLERANCES["loss"])


def test_gradient_checkpointing_changes_memory_only(build_model: Build, maker: BatchMaker, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = build_model(0)
        compressor = build_compressor(model)
        config = changed(CONFIG, steps=2, gradient_checkpointing=checkpointing)
        train_compressor(model, compressor, maker, config, tmp_path / str(checkpointing))
        results.append(compressor.trainable_parameters())
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, **TOLERANCES["steps"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_evaluates_when_asked_to(build_model: Build, maker: BatchMaker, tmp_path: Path, checkpointing: bool) -> None:
    """In training mode a checkpointing decoder drops its KV cache, and its answers would be wrong."""
    model = build_model(0)
    compressor = build_compressor(model)
    modes = []

    def evaluate(live: Compressor) -> dict[str, float]:
        modes.append((live is compressor, model.training, live.encoder.training))
        return {"accuracy": 0.5}

    config = changed(CONFIG, steps=3, eval_every=2, gradient_checkpointing=checkpointing)
    train_compressor(model, compressor, maker, config, tmp_path, evaluate=evaluate)
    assert modes == [(True, False, False)] * 2
    evaluated = [row for row in rows(tmp_path) if "eval" in row]
    assert [(row["step"], row["eval"]) for row in evaluated] == [(2, {"accuracy": 0.5}), (3, {"accuracy": 0.5})]


def test_batches_are_of_the_kinds_and_lengths_asked_for(maker: BatchMaker) -> None:
    config = changed(CONFIG, min_context=96, max_context=200, tokens=600)
    tasks = []
    for step in range(40):
        ratio = (2, 4, 32)[step % 3]
        batch = draw(maker, maker.rng(step), config, ratio)
        tasks.append(batch.task)
        assert batch.context.shape[1] % ratio == 0
        assert 96 - ratio < batch.context.shape[1] <= 200
    assert 4 < tasks.count("reconstruction") < 18
    assert 4 < tasks.count("continuation") < 18
    assert tasks.count("question") > 10


def test_ratios_come_in_one_by_one() -> None:
    config = changed(CONFIG, steps=100, curriculum=0.3, ratio_weights=(2.0, 1.0, 1.0))
    assert config.weights(3, 0) == [2, 0, 0]
    assert config.weights(3, 9) == [2, 0, 0]
    assert config.weights(3, 10) == [2, 1, 0]
    assert config.weights(3, 20) == [2, 1, 1]
    assert changed(CONFIG, curriculum=0.0).weights(2, 0) == [1, 1]


def test_quotes_and_taught_questions_take_their_shares(maker: BatchMaker) -> None:
    class Taught:
        def draw(self, rng: random.Random, tokens: int, *_: object) -> str:
            assert tokens == 1000
            return "taught"

    config = changed(CONFIG, tokens=1000, reconstruction=0.2, continuation=0.0, quotes=0.2, told=0.2)
    drawn = [draw(maker, maker.rng(step), config, 2, Taught()) for step in range(60)]  # type: ignore[arg-type]
    tasks = [batch if isinstance(batch, str) else batch.task for batch in drawn]
    assert 4 < tasks.count("reconstruction") < 20
    assert 4 < tasks.count("quote") < 20
    assert 4 < tasks.count("told") < 20
    assert 14 < tasks.count("taught") < 34


def test_with_answers_written_down_the_teacher_is_not_run(
    build_model: Build, maker: BatchMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions have the divergence from what was kept, other tasks the cross-entropy alone."""
    monkeypatch.setattr(teacher, "contained", lambda *_: 1.0)
    model = build_model(0).requires_grad_(False).eval()
    taught = teach(model, maker, tmp_path, contexts=32, min_context=96, max_context=100, turns=2)
    module = Distillation(model, build_compressor(model), 1.0, 1.0, live_teacher=False)
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = taught.draw(random.Random(0), 300)
    loss, kl, cross_entropy = module(batch, 2)
    assert len(calls) == 1
    student, ids = tail_logits(model, soft_context(module.compressor, batch, 2), batch)
    assert batch.teacher is not None
    log_q = F.log_softmax(student.float(), -1)
    torch.testing.assert_close(kl, top_divergence(log_q, batch.teacher).mean(), **TOLERANCES["loss"])
    torch.testing.assert_close(cross_entropy, F.cross_entropy(student, ids), **TOLERANCES["loss"])
    torch.testing.assert_close(loss, kl + cross_entropy)
    calls.clear()
    loss, kl, cross_entropy = module(maker.quotes(random.Random(0), batch=2, context=96, quotes=2), 2)
    assert len(calls) == 1
    assert kl == 0
    assert torch.equal(loss, cross_entropy)


def test_a_mixed_compressor_s_scorer_learns_where_facts_were_inserted(build_model: Build, maker: BatchMaker) -> None:
    """Beside the losses of the answers it has one of its own: is this token of an inserted statement?"""
    model = build_model(0).requires_grad_(False).eval()
    module = Distillation(model, build_compressor(model, "mixed"), 1.0, 1.0, sentence_ends=maker.sentence_ends)
    batch = maker.quotes(random.Random(0), batch=3, context=110, quotes=1)
    loss, kl, cross_entropy = module(batch, 4)
    _, scores = scored_context(module.compressor, batch, 4, maker.sentence_ends)
    assert scores is not None
    assert batch.marks is not None
    own = F.binary_cross_entropy_with_logits(scores, batch.marks.float())
    torch.testing.assert_close(loss, kl + cross_entropy + own, **TOLERANCES["loss"])
    scorer = module.compressor.scorer
    assert scorer is not None
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        _, scores = scored_context(module.compressor, batch, 4)
        assert scores is not None
        F.binary_cross_entropy_with_logits(scores, batch.marks.float()).backward()
        optimizer.step()
    assert scores[batch.marks].mean() > scores[~batch.marks].mean() + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"turns": 0}, "turns: got 0"),
        ({"log_every": 0}, "log_every: got 0"),
        ({"min_context": 32}, "min_context, max_context: got 32, 2048; expected 64 <= min <= max"),
        ({"max_context": 100}, "min_context, max_context: got 128, 100"),
        ({"reconstruction": 0.7, "continuation": 0.4}, "reconstruction, continuation, quotes, told: expected"),
        (
            {"reconstruction": 0.3, "continuation": 0.3, "quotes": 0.5},
            "reconstruction, continuation, quotes, told: expected",
        ),
        ({"curriculum": 1.5}, "curriculum: got 1.5, expected a share in"),
        ({"lr": 0.0}, "lr: got 0.0, expected a positive number"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"lr": float("inf")}, "lr: got inf"),
        ({"save_every": -1}, "save_every: got -1, expected at least 0"),
        ({"max_skipped": 0}, "max_skipped: got 0, expected at least 1"),
    ],
)
def test_a_bad_config(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
