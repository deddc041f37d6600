"""Pretrain the small LM: text and conversations about a context, then also contexts given as soft tokens.

A 7B model reads vectors it never saw in training (ICAE, ARC-Encoder and others keep it frozen); a model of 7M
parameters has no such reserve. So a part of its pretraining shows contexts as soft tokens, written by each trained
method in equal share while both learn. Afterwards the LM is frozen, and compressors are trained for it as for any other
model.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.training.checkpoint import load_state, read_meta, save_state
from condense_core.training.data import Batch, BatchMaker
from condense_core.training.fingerprint import check_same_run, compressor_fingerprint
from condense_core.training.finite import StepGuard
from condense_core.training.losses import answer_losses, answer_states, soft_context

Progress = Callable[[int, str], None]

_MAX_SKIPPED = 5  # steps in a row without a finite loss, behind which nothing better is to be expected


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        steps: optimizer steps.
        min_context, max_context: tokens of a context, drawn log-uniformly.
        tokens: tokens of a batch.
        lr: peak learning rate.
        plain: share of the batches whose context stays tokens.
        text: of these, the share that is running text; the rest is question answering.
        reconstruction: of the compressed batches, the share that repeats its context.
        turns: questions about a context.
        ratios: how often each ratio is drawn.
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
        losses.append(answer_losses(model, hidden[:, :-1][picked], ids[:, 1:][picked])[0])
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
    """Run the stages in place, resuming from ``folder``; a step without a finite loss and gradient is skipped.

    Args:
        model: the LM, which learns.
        compressors: by method; batch by batch they take turns. Empty where every stage is plain.
        maker: draws the batches.
        stages: one after the other.
        folder: of the state and of ``log.jsonl``.
        log_every: steps between two lines of the log.
        save_every: steps between two saves; the end of a stage is saved too.
        progress: called every step with the number of steps done and a line to show.

    Raises:
        ValueError: ``folder`` holds a run of other stages, compressors or text, or no state that can be read.
        DivergenceError: several steps in a row had no finite loss.
    """
    run = _Pretraining(model, compressors, maker, stages, folder)
    line = ""
    for index in range(run.meta["stage"], len(stages)):
        stage = stages[index]
        for step in range(run.meta["step"] if index == run.meta["stage"] else 0, stage.steps):
            run.step(stage, step)
            if run.meta["total"] % log_every == 0:
                line = run.write_log(index, log_every)
            done = step + 1 == stage.steps
            if run.meta["total"] % save_every == 0 or done:
                run.save({"stage": index + done, "step": 0 if done else step + 1})
            if progress:
                progress(run.meta["total"], line)


class _Pretraining:
    """The state of a run of ``pretrain``."""

    def __init__(
        self,
        model: PreTrainedModel,
        compressors: dict[str, Compressor],
        maker: BatchMaker,
        stages: list[Stage],
        folder: Path,
    ) -> None:
        self.model, self.compressors, self.maker, self.folder = model, compressors, maker, folder
        model.train()
        self.trained: dict[str, nn.Module] = {"lm": model}
        for name, compressor in compressors.items():
            self.trained |= {f"{name}-{key}": module for key, module in compressor.own_modules().items()}
            adapters = [p for n, p in compressor.encoder.named_parameters() if "lora_" in n]
            self.trained[f"{name}-lora"] = nn.ParameterList(adapters)
        self.everything = nn.ModuleDict(self.trained)
        self.optimizer = _adamw(self.everything)
        self.fingerprint = {
            "stages": [asdict(stage) for stage in stages],
            "compressors": {name: compressor_fingerprint(c.config) for name, c in compressors.items()},
            "corpus": maker.store.digest,
            "seed": maker.seed,
        }
        self.meta: dict[str, Any] = {"stage": 0, "step": 0, "total": 0, "tokens": 0, "skipped": 0}
        if found := read_meta(folder):
            check_same_run(folder, found.get("fingerprint"), self.fingerprint)
            load_state(folder, self.trained, self.optimizer)
            self.meta |= found
        skipped, total = self.meta["skipped"], self.meta["total"]
        self.guard = StepGuard(folder, limit=_MAX_SKIPPED, skipped=skipped, saved_step=total)
        folder.mkdir(parents=True, exist_ok=True)
        self._sums: dict[str, list[float]] = {}
        self._mark = time.monotonic()

    def step(self, stage: Stage, step: int) -> None:
        """Take step ``step`` of ``stage``."""
        total, device = self.meta["total"], self.model.device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(stage, step, total)
        # As in TrainConfig.bf16: most CPUs are several times slower in bfloat16.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu"):
            loss, answer, label, num_tokens = self._loss(stage, total)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.everything.parameters(), 1.0)
        if self.guard.accept(total + 1, bool(torch.isfinite(loss.detach()) & torch.isfinite(norm))):
            self.optimizer.step()
            self._sums.setdefault(label, []).append(answer.item())
        tokens = self.meta["tokens"] + num_tokens
        self.meta |= {"total": total + 1, "tokens": tokens, "skipped": self.guard.skipped}

    def _loss(self, stage: Stage, total: int) -> tuple[Tensor, Tensor, str, int]:
        """What is minimised, the part of it that answers make, a name for the log, and the batch's tokens."""
        choice, compressors = self.maker.rng(-1 - total), self.compressors
        if not compressors or choice.random() < stage.plain:
            batch = draw_plain(self.maker, total, stage).to(self.model.device)
            is_text = batch.task == "text"
            answer, context = lm_losses(self.model, batch, context_share=0.5 if is_text else 0.1, seed=total)
            loss = (answer + context) * 0.5 if is_text else answer + 0.1 * context
            return loss, answer, "text" if is_text else "full", batch.num_tokens
        name = list(compressors)[total % len(compressors)]
        ratio = choice.choices(list(stage.ratios), list(stage.ratios.values()))[0]
        batch = draw_compressed(self.maker, total, stage, ratio).to(self.model.device)
        states = answer_states(self.model, soft_context(compressors[name], batch, ratio), batch)
        answer, _ = answer_losses(self.model, states, batch.answer_ids)
        return answer, answer, f"{name}/{ratio}/{batch.task[:3]}", batch.num_tokens

    def write_log(self, stage: int, steps: int) -> str:
        """A line with the means of the last ``steps`` steps; what of it to show."""
        now = time.monotonic()
        row: dict[str, Any] = {k: round(sum(v) / len(v), 3) for k, v in sorted(self._sums.items())}
        line = "  ".join(f"{k} {v}" for k, v in row.items() if k in ("text", "full"))
        row |= {"stage": stage, "step": self.meta["total"], "tokens": self.meta["tokens"]}
        row |= {"skipped": self.guard.skipped} if self.guard.skipped else {}
        row |= {"s_per_step": round((now - self._mark) / steps, 3)}
        self._mark, self._sums = now, {}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return line

    def save(self, place: dict[str, int]) -> None:
        """Write the state; place: stage and step with which the run is to go on."""
        self.guard.check_weights(self.meta["total"], self.trained)
        save_state(self.folder, self.trained, self.optimizer, self.meta | place | {"fingerprint": self.fingerprint})
        self.guard.saved_step = self.meta["total"]


def _adamw(modules: nn.Module) -> torch.optim.AdamW:
    parameters = [p for p in modules.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
