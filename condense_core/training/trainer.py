"""Train a compressor for a frozen decoder: distillation from full context, continuation, reconstruction.

The decoder reads its context once as tokens (teacher, no gradient) and once as soft tokens (student); the loss is
KL(teacher || student) plus cross-entropy on the answer tokens. Ratios are drawn per batch, so one checkpoint serves
all.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.training.checkpoint import load_state, save_state
from condense_core.training.data import Batch, BatchMaker
from condense_core.training.losses import distillation, soft_context, tail_logits

Evaluate = Callable[[Compressor], dict[str, Any]]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    steps: optimizer steps. tokens: context and tail tokens per process and step. min_context, max_context: context
    length in tokens, drawn log-uniformly. turns: questions per context. lr: peak AdamW learning rate, after
    ``warmup`` steps, cosine to a tenth. kl_weight, ce_weight: of the two losses. reconstruction, continuation: shares
    of batches; the rest is question answering. ratio_weights: how often each ratio is drawn (default: equally).
    save_every, eval_every: steps (0: only at the end). bf16: autocast the forward passes.
    """

    steps: int = 2000
    tokens: int = 8192
    min_context: int = 128
    max_context: int = 2048
    turns: int = 8
    lr: float = 5e-4
    warmup: int = 100
    kl_weight: float = 1.0
    ce_weight: float = 1.0
    reconstruction: float = 0.2
    continuation: float = 0.2
    ratio_weights: tuple[float, ...] = ()
    save_every: int = 200
    eval_every: int = 0
    log_every: int = 20
    gradient_checkpointing: bool = False
    bf16: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "min_context", "turns", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 64 <= self.min_context <= self.max_context:
            raise ValueError(
                f"min_context, max_context: got {self.min_context}, {self.max_context}; expected 64 <= min <= max"
            )
        if not 0 <= self.reconstruction + self.continuation <= 1:
            raise ValueError("reconstruction, continuation: expected shares that sum to at most 1")
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected a positive number")


class Distillation(nn.Module):
    """Compressor and frozen decoder as one module, so that accelerate can wrap and replicate it."""

    def __init__(self, model: PreTrainedModel, compressor: Compressor, kl_weight: float, ce_weight: float) -> None:
        super().__init__()
        self.model, self.compressor = model, compressor
        self.kl_weight, self.ce_weight = kl_weight, ce_weight

    def forward(self, batch: Batch, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, KL, cross-entropy), each a mean over answer tokens, in nats."""
        student, ids = tail_logits(self.model, soft_context(self.compressor, batch, ratio), batch)
        cross_entropy = F.cross_entropy(student.float(), ids)
        kl = torch.zeros_like(cross_entropy)
        if self.kl_weight:
            with torch.no_grad():
                embeds = self.model.get_input_embeddings()(batch.context)
                teacher, _ = tail_logits(self.model, embeds, batch)
            kl = distillation(student, teacher)
        return self.kl_weight * kl + self.ce_weight * cross_entropy, kl, cross_entropy


def draw(maker: BatchMaker, rng: random.Random, config: TrainConfig, ratio: int) -> Batch:
    """One batch; context lengths are multiples of ``ratio``."""
    context = round(math.exp(rng.uniform(math.log(config.min_context), math.log(config.max_context))))
    context = max(context - context % ratio, ratio * max(1, 64 // ratio))
    kind = rng.random()
    if kind < config.reconstruction + config.continuation:
        length = min(128, context)
        make = maker.reconstruction if kind < config.reconstruction else maker.continuation
        return make(rng, batch=max(1, config.tokens // (context + length)), context=context, length=length)
    facts = min(3 * config.turns, max(2, context // rng.choice((30, 40, 60))))
    turns = min(facts, config.turns)
    rows = max(1, config.tokens // (context + 20 * turns))
    return maker.questions(rng, batch=rows, context=context, facts=facts, turns=turns)


def train_compressor(
    model: PreTrainedModel,
    compressor: Compressor,
    maker: BatchMaker,
    config: TrainConfig,
    folder: Path,
    *,
    evaluate: Evaluate | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> None:
    """Train ``compressor`` in place for the frozen ``model``; resume from ``folder`` where a state is there.

    Writes ``state.safetensors`` and ``log.jsonl`` into ``folder`` and, at each save, the checkpoint into
    ``folder/checkpoint``. evaluate: called every ``eval_every`` steps and at the end, its result goes into the log.
    progress: called every step with the number of steps done and a line to show.
    """
    # A batch trains the window bias of its own ratio only.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no", kwargs_handlers=[unused])
    device = accelerator.device
    model.requires_grad_(False).to(device)
    compressor.to(device)
    trainable = compressor.trainable_parameters()
    for parameter in trainable:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        # Renamed in transformers 5.23; the older name goes in 6.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()  # transformers checkpoints only in training mode; there is no dropout in these decoders
        compressor.encoder.checkpoint_like(model)
    optimizer = torch.optim.AdamW(trainable, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    state = nn.ParameterList(trainable)
    meta = load_state(folder, {"trained": state}, optimizer) or {"step": 0, "tokens": 0, "seconds": 0.0}
    step_module, optimizer = accelerator.prepare(
        Distillation(model, compressor, config.kl_weight, config.ce_weight), optimizer
    )
    ratios = list(compressor.config.ratios)
    weights = list(config.ratio_weights) or [1.0] * len(ratios)
    folder.mkdir(parents=True, exist_ok=True)
    mark, sums = time.monotonic(), defaultdict[str, list[float]](list)
    for step in range(meta["step"], config.steps):
        # Every process draws the same ratio and its own rows.
        ratio = random.Random(f"ratio-{config.seed}-{step}").choices(ratios, weights)[0]
        rng = maker.rng(step * accelerator.num_processes + accelerator.process_index)
        batch = draw(maker, rng, config, ratio).to(device)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        with accelerator.autocast():
            loss, kl, cross_entropy = step_module(batch, ratio)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        # Tasks differ in difficulty by nats: a curve that mixes them shows the draw, not the progress.
        for key, value in (("kl", kl), ("ce", cross_entropy), (f"ce/{batch.task}", cross_entropy)):
            sums[key].append(float(value.detach()))
        meta |= {"step": step + 1, "tokens": meta["tokens"] + batch.num_tokens * accelerator.num_processes}
        last = step + 1 == config.steps
        means = {key: fmean(values) for key, values in sums.items()}
        line = f"kl {means['kl']:.3f}  ce {means['ce']:.3f}"
        if accelerator.is_main_process and ((step + 1) % config.log_every == 0 or last):
            meta["seconds"] += time.monotonic() - mark
            row = {"step": step + 1, **means, "lr": _learning_rate(config, step), "tokens": meta["tokens"]}
            _append(folder / "log.jsonl", row | {"seconds": round(meta["seconds"], 1)})
            mark = time.monotonic()
            sums.clear()
        if evaluate and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
            if accelerator.is_main_process:
                compressor.eval()
                model.eval()  # in training mode a checkpointing layer drops the KV cache: answers would be wrong
                with accelerator.autocast():
                    _append(folder / "log.jsonl", {"step": step + 1, "eval": evaluate(compressor)})
                compressor.train(config.gradient_checkpointing)
                model.train(config.gradient_checkpointing)
            accelerator.wait_for_everyone()
        if accelerator.is_main_process and (last or (config.save_every and (step + 1) % config.save_every == 0)):
            compressor.save(folder / "checkpoint")  # first: cut off in between, a run goes back and writes it again
            save_state(folder, {"trained": state}, optimizer, meta)
        if progress and accelerator.is_main_process:
            progress(step + 1, line)
    accelerator.wait_for_everyone()  # nobody leaves before the checkpoint is written
    model.eval()
    compressor.eval()


def _learning_rate(config: TrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
