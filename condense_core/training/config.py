"""How to train a compressor: the settings of a run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimizer steps.
        tokens: context and tail tokens per process and step.
        min_context, max_context: context length in tokens, drawn log-uniformly.
        turns: questions per context.
        lr: peak AdamW learning rate, after ``warmup`` steps; it falls to a tenth along a cosine.
        warmup: steps of linear warm-up.
        kl_weight, ce_weight: factors on the two losses.
        reconstruction, continuation, quotes, told: shares of the batches; the rest is question answering. Quotes ask
            for the words that follow some words of the context; what is told are facts in whole sentences, for which no
            teacher is asked.
        ratio_weights: how often each ratio is drawn, in the order of the compressor's; empty: equally.
        curriculum: share of the steps in which ratios come in one by one, the smallest first; 0: all from the start.
        save_every: steps between saves; 0: only at the end.
        eval_every: steps between evaluations; 0: only at the end.
        log_every: steps between two lines of the log.
        gradient_checkpointing: recompute activations in the backward pass.
        bf16: autocast the forward passes to bfloat16 on a GPU. A CPU computes in the decoder's dtype, since most are
            several times slower in bfloat16; a decoder in half precision is autocast anywhere.
        max_skipped: so many steps in a row without a finite loss and gradient end the run.
        seed: which batches are drawn.
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
    quotes: float = 0.0
    told: float = 0.0
    ratio_weights: tuple[float, ...] = ()
    curriculum: float = 0.0
    save_every: int = 200
    eval_every: int = 0
    log_every: int = 20
    gradient_checkpointing: bool = False
    bf16: bool = True
    max_skipped: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "min_context", "turns", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("warmup", "save_every", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")
        if not 64 <= self.min_context <= self.max_context:
            raise ValueError(
                f"min_context, max_context: got {self.min_context}, {self.max_context}; expected 64 <= min <= max"
            )
        shares = self.reconstruction, self.continuation, self.quotes, self.told
        if min(shares) < 0 or not sum(shares) <= 1 + 1e-9:
            raise ValueError("reconstruction, continuation, quotes, told: expected shares that sum to at most 1")
        if not 0 <= self.curriculum <= 1:
            raise ValueError(f"curriculum: got {self.curriculum}, expected a share in [0, 1]")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: got {self.lr}, expected a positive number")

    def weights(self, num_ratios: int, step: int) -> list[float]:
        """How often each of ``num_ratios`` ratios, smallest first, is drawn in ``step``, counted from 0."""
        weights = list(self.ratio_weights) or [1.0] * num_ratios
        open_at = [self.curriculum * self.steps * i / num_ratios for i in range(num_ratios)]
        return [weight if step >= start else 0.0 for weight, start in zip(weights, open_at, strict=True)]

    def learning_rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


#: Settings of ``TrainConfig`` that a run may change when it is resumed: how long it is and how it is computed, not what
#: is learned.
FREE = (
    "steps warmup save_every eval_every log_every gradient_checkpointing bf16 max_skipped".split()  # warmup: of steps
)
