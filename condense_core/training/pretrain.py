"""Pretrain the small LM: text and conversations about a context, then also contexts given as soft tokens.

A 7B model reads vectors it never saw in training (ICAE, ARC-Encoder and others keep it frozen); a model of 7M
parameters has no such reserve. So a part of its pretraining shows contexts as soft tokens, written by each trained
method in equal share while both learn. Afterwards the LM is frozen, and compressors are trained for it as for any
other model.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.training.checkpoint import load_state, save_state
from condense_core.training.data import Batch, BatchMaker
from condense_core.training.losses import soft_context, tail_logits

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Stage:
    """A part of the run: rows of ``min_context`` to ``max_context`` tokens (log-uniform), ``tokens`` tokens a step.

    plain: share of batches whose context stays tokens; of these ``text`` is running text, the rest question answering.
    reconstruction: share of the compressed batches that repeat their context. ratios: ratio -> weight.
    """

    steps: int
    min_context: int
    max_context: int
    tokens: int
    lr: float
    plain: float = 1.0
    text: float = 0.3
    reconstruction: float = 0.0
    turns: int = 8
    ratios: dict[int, float] = field(default_factory=lambda: {2: 0.1, 4: 0.35, 8: 0.3, 16: 0.15, 32: 0.1})


def _draw_length(rng: random.Random, stage: Stage) -> int:
    return round(math.exp(rng.uniform(math.log(stage.min_context), math.log(stage.max_context))))


def _draw_questions(maker: BatchMaker, rng: random.Random, stage: Stage, context: int) -> Batch:
    facts = min(24, max(2, context // rng.choice((24, 36, 60))))
    turns = min(facts, stage.turns)
    rows = max(1, stage.tokens // (context + 20 * turns))
    return maker.questions(rng, batch=rows, context=context, facts=facts, turns=turns)


def draw_plain(maker: BatchMaker, step: int, stage: Stage) -> Batch:
    """The batch of ``step`` with its context as tokens."""
    rng = maker.rng(step)
    context = _draw_length(rng, stage)
    if rng.random() < stage.text:
        length = max(32, context // 4)
        return maker.text(rng, batch=max(1, stage.tokens // (context + length)), context=context, length=length)
    return _draw_questions(maker, rng, stage, context)


def draw_compressed(maker: BatchMaker, step: int, stage: Stage, ratio: int) -> Batch:
    """The batch of ``step`` for a compressor: the context's length is a multiple of ``ratio``."""
    rng = maker.rng(step)
    repeat = rng.random() < stage.reconstruction
    context = min(_draw_length(rng, stage), 256) if repeat else _draw_length(rng, stage)
    context -= context % ratio
    if repeat:
        length = min(96, context)
        rows = max(1, stage.tokens // (context + length))
        return maker.reconstruction(rng, batch=rows, context=context, length=length)
    return _draw_questions(maker, rng, stage, context)


def lm_losses(model: PreTrainedModel, batch: Batch, *, context_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over answer tokens, and over a random ``context_share`` of the context tokens (nats)."""
    rows = batch.context.shape[0]
    ids = torch.cat([batch.prefix.expand(rows, -1), batch.context, batch.tail], 1)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    tail_start = ids.shape[1] - batch.tail.shape[1]
    answer = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    answer[:, tail_start:] = batch.tail_mask
    generator = torch.Generator().manual_seed(seed)
    context = (torch.rand(ids.shape, generator=generator) < context_share).to(ids.device)
    context[:, tail_start:] = False
    losses = []
    for mask in (answer, context):
        picked = mask[:, 1:]
        logits = model.get_output_embeddings()(hidden[:, :-1][picked])
        losses.append(F.cross_entropy(logits.float(), ids[:, 1:][picked]))
    return losses[0], losses[1]


def learning_rate(stage: Stage, step: int, total: int) -> float:
    """Linear warm-up over the run's first 100 steps, cosine to a tenth at the end of each stage."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, stage.steps)))
    return stage.lr * min(1.0, (total + 1) / 100) * (0.1 + 0.9 * cosine)


def pretrain(
    model: PreTrainedModel,
    compressors: dict[str, Compressor],
    maker: BatchMaker,
    stages: list[Stage],
    folder: Path,
    *,
    log_every: int = 40,
    save_every: int = 200,
    progress: Progress | None = None,
) -> None:
    """Run the stages in place, resuming from ``folder``; one JSON line per ``log_every`` steps in ``folder/log.jsonl``.

    compressors: by method; batch by batch they take turns. Empty where every stage is plain.
    """
    model.train()
    trained: dict[str, nn.Module] = {"lm": model}
    for name, compressor in compressors.items():
        trained |= {f"{name}-{key}": module for key, module in compressor.own_modules().items()}
        adapters = [p for n, p in compressor.encoder.named_parameters() if "lora_" in n]
        trained[f"{name}-lora"] = nn.ParameterList(adapters)
    everything = nn.ModuleDict(trained)
    optimizer = _adamw(everything)
    meta = load_state(folder, trained, optimizer) or {"stage": 0, "step": 0, "total": 0, "tokens": 0}
    folder.mkdir(parents=True, exist_ok=True)
    device = model.device
    sums: dict[str, list[float]] = {}
    mark, line = time.monotonic(), ""
    for index in range(meta["stage"], len(stages)):
        stage = stages[index]
        for step in range(meta["step"] if index == meta["stage"] else 0, stage.steps):
            total = meta["total"]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, step, total)
            choice = maker.rng(-1 - total)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                if not compressors or choice.random() < stage.plain:
                    batch = draw_plain(maker, total, stage).to(device)
                    is_text = batch.task == "text"
                    answer, context = lm_losses(model, batch, context_share=0.5 if is_text else 0.1, seed=total)
                    loss = (answer + context) * 0.5 if is_text else answer + 0.1 * context
                    label = "text" if is_text else "full"
                else:
                    name = list(compressors)[total % len(compressors)]
                    ratio = choice.choices(list(stage.ratios), list(stage.ratios.values()))[0]
                    batch = draw_compressed(maker, total, stage, ratio).to(device)
                    logits, ids = tail_logits(model, soft_context(compressors[name], batch, ratio), batch)
                    answer = loss = F.cross_entropy(logits.float(), ids)
                    label = f"{name}/{ratio}/{batch.task[:3]}"
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
            optimizer.step()
            meta |= {"total": total + 1, "tokens": meta["tokens"] + batch.num_tokens}
            sums.setdefault(label, []).append(answer.item())
            if meta["total"] % log_every == 0:
                now = time.monotonic()
                row = {k: round(sum(v) / len(v), 3) for k, v in sorted(sums.items())}
                line = "  ".join(f"{k} {v}" for k, v in row.items() if k in ("text", "full"))
                row |= {"stage": index, "step": meta["total"], "tokens": meta["tokens"]}
                row |= {"s_per_step": round((now - mark) / log_every, 3)}
                mark, sums = now, {}
                with (folder / "log.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            done = step + 1 == stage.steps
            if meta["total"] % save_every == 0 or done:
                save_state(
                    folder,
                    trained,
                    optimizer,
                    meta | {"stage": index + done, "step": 0 if done else step + 1},
                )
            if progress:
                progress(meta["total"], line)


def _adamw(modules: nn.Module) -> torch.optim.AdamW:
    parameters = [p for p in modules.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
