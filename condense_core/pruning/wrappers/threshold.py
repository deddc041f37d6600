"""Threshold: what scores too low goes, however much that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condense_core.pruning.base import Kept, LayerContext, Traits, Wrapper, check_count
from condense_core.pruning.wrappers.kept import pack
from condense_core.pruning.wrappers.nesting import refuse_competition, refuse_decoding, refuse_rotation


@dataclass(frozen=True, repr=False)
class Threshold(Wrapper):
    """Keeps each token with ``score >= threshold``, however many these are.

    The first ``sink`` and the last ``window`` tokens of each sequence stay too, and of every head at least the token
    with the highest score.

    So evicts DMS at inference (Lancucki et al., arXiv 2506.05345), whose scores are a trained head's; any method's do
    here. The method's own budget is not looked at. How much stays, in each head, depends on the text. To free the rest
    its size must be known: one read-back of the device for each layer. Between the chunks of a chunked prefill, when
    heads must hold equally many tokens, all stay: only the end of the prefill saves memory.

    Attributes:
        threshold: the least score that stays, finite; what is a good one depends on the method.
        sink: first tokens that stay, >= 0.
        window: last tokens that stay, >= 0.
    """

    name = "threshold"
    summary = "keeps every token above a score, however many these are"
    paper = "2506.05345"
    needs = "a threshold"
    threshold: float
    sink: int = 4
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise TypeError(f"Threshold: threshold is {self.threshold!r}, expected a number")
        if not math.isfinite(self.threshold):
            raise ValueError(f"Threshold: threshold is {self.threshold}, expected a finite number")
        check_count("Threshold: sink", self.sink, minimum=0)
        check_count("Threshold: window", self.window, minimum=0)
        refuse_rotation(self)
        refuse_competition(self)
        refuse_decoding(self)

    @property
    def traits(self) -> Traits:
        return replace(self.method.traits, ragged=True, bounded=False)

    @property
    def protected(self) -> int:
        return max(self.method.protected, self.sink + self.window)

    def select(self, scores: Tensor, ctx: LayerContext) -> Kept:
        if not ctx.final:
            if ctx.bounds is None:
                return Kept(torch.arange(scores.shape[2], device=scores.device).repeat(*scores.shape[:2], 1))
            return pack(ctx.protect(torch.zeros_like(scores)) == 0)
        forced = ctx.protect(torch.zeros_like(scores), sink=self.sink, window=self.window) == math.inf
        chosen = forced | (scores >= self.threshold)
        # A head that would be left with nothing keeps its best token: attention over no key has no value.
        ranked = scores.masked_fill(scores.isnan(), torch.finfo(scores.dtype).min)
        best = torch.zeros_like(chosen).scatter_(2, ranked.argmax(2, keepdim=True), True) & (scores != -math.inf)
        return pack(chosen | (best & ~chosen.any(2, keepdim=True)))
