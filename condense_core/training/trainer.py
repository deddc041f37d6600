"""Train a compressor for a frozen decoder: distillation from full context, continuation, reconstruction.

The decoder reads its context once as tokens (teacher, no gradient) and once as soft tokens (student). The loss is
KL(teacher || student) plus cross-entropy on the answer tokens. Ratios are drawn per batch, so one checkpoint serves all
of them. Where the teacher's answers were written down before (``teacher.teach``), it is not run again: questions are
drawn from there, and the other tasks, whose targets stand in the text, have the cross-entropy alone.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.files.folders import replace_folder, restore_folder
from condense_core.training.checkpoint import load_state, read_meta, save_state
from condense_core.training.config import TrainConfig
from condense_core.training.data import Batch, BatchMaker, TopLogits
from condense_core.training.fingerprint import (
    Fingerprint,
    check_same_run,
    compressor_fingerprint,
    model_fingerprint,
    training_fingerprint,
)
from condense_core.training.finite import StepGuard
from condense_core.training.losses import answer_losses, answer_states, scored_context
from condense_core.training.teacher import Taught

__all__ = ["Distillation", "TrainConfig", "Trainer", "draw", "train_compressor"]

Evaluate = Callable[[Compressor], dict[str, Any]]
Progress = Callable[[int, str], None]


class Distillation(nn.Module):
    """Compressor and frozen decoder as one module, so that accelerate can wrap and replicate it."""

    def __init__(
        self,
        model: PreTrainedModel,
        compressor: Compressor,
        kl_weight: float,
        ce_weight: float,
        *,
        live_teacher: bool = True,
        sentence_ends: Tensor | None = None,
    ) -> None:
        """Args: sentence_ends: as ``losses.scored_context`` takes it."""
        super().__init__()
        self.sentence_ends = sentence_ends
        self.model, self.compressor = model, compressor
        self.kl_weight, self.ce_weight = kl_weight, ce_weight
        self.live_teacher = live_teacher

    def forward(self, batch: Batch, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, KL, cross-entropy), each a mean over answer tokens, in nats."""
        teacher: Tensor | TopLogits | None = batch.teacher
        # Activations that are computed again in the backward pass, which transformers does in training mode only, must
        # come from the same kernels.
        device, dtype = batch.context.device, self.model.dtype
        with nullcontext() if self.model.training else training_attention(device, dtype):
            if self.kl_weight and teacher is None and self.live_teacher:
                with torch.no_grad():
                    teacher = answer_states(self.model, self.model.get_input_embeddings()(batch.context), batch)
            soft, scores = scored_context(self.compressor, batch, ratio, self.sentence_ends)
            student = answer_states(self.model, soft, batch)
        cross_entropy, kl = answer_losses(self.model, student, batch.answer_ids, teacher)
        loss = self.kl_weight * kl + self.ce_weight * cross_entropy
        if scores is not None and batch.marks is not None:
            # What is kept exact is decided by rank, which has no gradient: the scorer has a loss of its own.
            loss = loss + F.binary_cross_entropy_with_logits(scores, batch.marks.float())
        return loss, kl, cross_entropy


def training_attention(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Around forward passes: the attention whose forward and backward pass together are fastest.

    On a CPU in bfloat16 the fused kernel's backward pass takes more than twice the time of matrix products written out;
    everywhere else torch chooses well.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def process_device() -> torch.device:
    """The device that accelerate gives this process, decided as ``Accelerator`` decides it."""
    device: torch.device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    return device


def autocasts(config: TrainConfig, dtype: torch.dtype, device_type: str) -> bool:
    """Whether forward passes are autocast to bfloat16.

    A decoder in half precision needs it, because what is trained is fp32; one in fp32 has it where that is faster.
    """
    return dtype != torch.float32 or (config.bf16 and device_type != "cpu")


def checkpoint_activations(model: PreTrainedModel, compressor: Compressor) -> None:
    """Let decoder and encoder recompute their layers' activations in the backward pass."""
    # Renamed in transformers 5.23; the older name goes in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()  # transformers checkpoints only in training mode; there is no dropout in these decoders
    compressor.encoder.checkpoint_like(model)


def draw(
    maker: BatchMaker, rng: random.Random, config: TrainConfig, ratio: float, taught: Taught | None = None
) -> Batch:
    """One batch; lengths of contexts are multiples of an integer ``ratio``, those that were ``taught`` excepted."""
    context = round(math.exp(rng.uniform(math.log(config.min_context), math.log(config.max_context))))
    whole = math.ceil(ratio)
    context = max(context - context % whole, whole * max(1, 64 // whole))
    kind = rng.random()
    if kind < config.reconstruction + config.continuation:
        length = min(128, context)
        make = maker.reconstruction if kind < config.reconstruction else maker.continuation
        return make(rng, batch=max(1, config.tokens // (context + length)), context=context, length=length)
    asked = min(config.turns, max(1, context // 40))
    rows = max(1, config.tokens // (context + 40 * asked))
    if kind < config.reconstruction + config.continuation + config.quotes:
        return maker.quotes(rng, batch=rows, context=context, quotes=asked)
    if kind < config.reconstruction + config.continuation + config.quotes + config.told:
        return maker.told_facts(rng, batch=rows, context=context, facts=asked)
    if taught is not None:
        return taught.draw(rng, config.tokens, config.max_context, config.turns)
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
    taught: Taught | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> None:
    """Train ``compressor`` in place for the frozen ``model``; resume from ``folder`` where a state is there.

    Writes ``state.safetensors`` and ``log.jsonl`` into ``folder`` and, at each save, the checkpoint into
    ``folder/checkpoint``. A step without a finite loss and gradient is skipped; the log counts these.

    Args:
        model: the decoder, whose weights stay as they are.
        compressor: with its adapter attached.
        maker: draws the batches.
        config: how to train.
        folder: of the run.
        taught: questions that the decoder has answered before; None: it reads every context anew.
        evaluate: called every ``eval_every`` steps and at the end; its result goes into the log.
        progress: called every step with the number of steps done and a line to show.

    Raises:
        ValueError: ``folder`` holds a run with other settings, or no state that can be read.
        DivergenceError: several steps in a row had no finite loss, or a weight is not finite. What was saved before
            stays as it is.
    """
    trainer = Trainer(model, compressor, maker, config, folder, taught)
    trainer.resume()
    for step in range(trainer.meta["step"], config.steps):
        line = trainer.step(step)
        trainer.write_log(step)
        if evaluate and trainer.is_due(step, config.eval_every):
            trainer.evaluate(step, evaluate)
        if trainer.is_due(step, config.save_every):
            trainer.save()
        if progress and trainer.accelerator.is_main_process:
            progress(step + 1, line)
    trainer.finish()


class Trainer:
    """A run: the modules on their device, the optimizer, and what the log says. See ``train_compressor``."""

    def __init__(
        self,
        model: PreTrainedModel,
        compressor: Compressor,
        maker: BatchMaker,
        config: TrainConfig,
        folder: Path,
        taught: Taught | None = None,
    ) -> None:
        self.model, self.compressor, self.maker, self.config, self.folder = model, compressor, maker, config, folder
        self.taught = taught
        self.accelerator = Accelerator(
            mixed_precision="bf16" if autocasts(config, model.dtype, process_device().type) else "no",
            # A batch trains the window bias of its own ratio only.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.fingerprint: Fingerprint = {
            **model_fingerprint(model),
            **compressor_fingerprint(compressor.config),
            "corpus": maker.store.digest,
            "wording": maker.wording,
            "teacher": taught.digest if taught else None,
            **training_fingerprint(config),
        }
        model.requires_grad_(False).to(self.accelerator.device)
        compressor.to(self.accelerator.device)
        self.trained = compressor.trainable_parameters()
        for parameter in self.trained:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        if config.gradient_checkpointing:
            checkpoint_activations(model, compressor)
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.state: dict[str, nn.Module] = {"trained": nn.ParameterList(self.trained)}
        self.meta: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0}
        self.guard = StepGuard(folder / "checkpoint", limit=config.max_skipped)
        self._sums = defaultdict[str, list[float]](list)
        self._mark = time.monotonic()

    def resume(self) -> None:
        """Go on where the folder's state is, if there is one and it is of this run."""
        restore_folder(self.folder / "checkpoint")
        if found := read_meta(self.folder):
            check_same_run(self.folder, found.get("fingerprint"), self.fingerprint)
            load_state(self.folder, self.state, self.optimizer)
            self.meta |= found
            self.guard.skipped, self.guard.saved_step = self.meta["skipped"], self.meta["step"]
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = self.config.kl_weight, self.config.ce_weight
        ends = self.maker.sentence_ends if self.compressor.scorer is not None else None
        module = Distillation(
            self.model, self.compressor, *weights, live_teacher=self.taught is None, sentence_ends=ends
        )
        self.module, self.optimizer = self.accelerator.prepare(module, self.optimizer)
        self._mark = time.monotonic()

    def step(self, step: int) -> str:
        """Take step number ``step``, counted from 0; a line about it to show."""
        config, accelerator = self.config, self.accelerator
        ratio, batch = self._draw(step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)  # before the forward pass, whose activations need the room
        with accelerator.autocast():
            loss, kl, cross_entropy = self.module(batch, ratio)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.trained, 1.0)
        if self.guard.accept(step + 1, self._is_finite(loss, norm)):
            self.optimizer.step()
            # Tasks and ratios differ in difficulty by nats: a curve that mixes them shows the draw, not the progress.
            losses = {"ce": cross_entropy, f"ce/{batch.task}": cross_entropy, f"ce/{batch.task}/{ratio}": cross_entropy}
            if self.taught is None or batch.teacher:
                losses["kl"] = kl
            for key, value in losses.items():
                self._sums[key].append(float(value.detach()))
        tokens = self.meta["tokens"] + batch.num_tokens * accelerator.num_processes
        self.meta |= {"step": step + 1, "tokens": tokens, "skipped": self.guard.skipped}
        shown = [f"{key} {fmean(self._sums[key]):.3f}" for key in ("kl", "ce") if key in self._sums]
        return "  ".join([*shown, *([f"{self.guard.skipped} skipped"] if self.guard.skipped else [])])

    def _draw(self, step: int) -> tuple[float, Batch]:
        """Every process draws the same ratio and its own rows."""
        ratios = list(self.compressor.config.ratios)
        weights = self.config.weights(len(ratios), step)
        ratio = random.Random(f"ratio-{self.config.seed}-{step}").choices(ratios, weights)[0]
        rng = self.maker.rng(step * self.accelerator.num_processes + self.accelerator.process_index)
        return ratio, draw(self.maker, rng, self.config, ratio, self.taught).to(self.accelerator.device)

    def _is_finite(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether loss and gradient are finite in all processes: they must agree on whether a step is taken."""
        bad = 1.0 - (torch.isfinite(loss.detach()) & torch.isfinite(norm)).float()
        total: Tensor = self.accelerator.reduce(bad, reduction="sum")
        return float(total) == 0

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens ``every`` so many steps, and at the end, happens behind ``step``."""
        return step + 1 == self.config.steps or bool(every and (step + 1) % every == 0)

    def write_log(self, step: int) -> None:
        """A line with the means since the last one, where one is due."""
        if not self.accelerator.is_main_process or not self.is_due(step, self.config.log_every):
            return
        now = time.monotonic()
        self.meta["seconds"] += now - self._mark
        row = {"step": step + 1, **{key: fmean(values) for key, values in self._sums.items()}}
        row |= {"lr": self.config.learning_rate(step), "tokens": self.meta["tokens"]}
        row |= {"skipped": self.guard.skipped} if self.guard.skipped else {}
        self._append(row | {"seconds": round(self.meta["seconds"], 1)})
        self._mark = now
        self._sums.clear()

    def evaluate(self, step: int, evaluate: Evaluate) -> None:
        """Write what ``evaluate`` says of the compressor as it is into the log."""
        if self.accelerator.is_main_process:
            self.compressor.eval()
            self.model.eval()  # in training mode a checkpointing layer drops the KV cache: answers would be wrong
            with self.accelerator.autocast():
                self._append({"step": step + 1, "eval": evaluate(self.compressor)})
            self.compressor.train(self.config.gradient_checkpointing)
            self.model.train(self.config.gradient_checkpointing)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Write checkpoint and state; both stay as they were if a weight is not finite or the process is killed.

        The checkpoint goes first: cut off in between, a run goes back to the state before and writes it again.
        """
        if not self.accelerator.is_main_process:
            return
        self.guard.check_weights(self.meta["step"], self.state)
        replace_folder(self.folder / "checkpoint", self.compressor.save)
        save_state(self.folder, self.state, self.optimizer, self.meta | {"fingerprint": self.fingerprint})
        self.guard.saved_step = self.meta["step"]

    def finish(self) -> None:
        """Leave model and compressor ready for use, once every process has come so far."""
        self.accelerator.wait_for_everyone()  # nobody leaves before the checkpoint is written
        self.model.eval()
        self.compressor.eval()

    def _append(self, row: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
