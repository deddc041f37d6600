"""Surprise: what the model did not expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, ScoringMethod, Traits, check_count
from condense_core.pruning.methods.common import token_positions


@dataclass(frozen=True, kw_only=True, repr=False)
class Surprise(ScoringMethod):
    """``score_i = (-log p(token_i | tokens before it))^2`` with the model's own p: the same in every head and layer.

    Selective Context (Li et al., arXiv 2310.06201) cuts a prompt by the same measure before the model reads it. Here
    the model has read all of it, and what could have been guessed is evicted. The logits of the context are computed
    for it, and nothing is evicted before all layers have read it (in a prefill in chunks, the chunk). Needs token ids.

    Single tokens that surprise are of little use without those around them: ``Sentences(Surprise(keep=0.25))``.

    Attributes:
        sink: the first tokens, which are kept, >= 0.
    """

    name = "surprise"
    summary = "tokens that the model did not expect"
    paper = "2310.06201"
    traits = Traits(prefills_only=True, whole_model=True, reads_surprise=True, any_budget=True)
    sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Surprise: sink", self.sink, minimum=0)

    @property
    def protected(self) -> int:
        return self.sink

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        """Zeros: what surprises is known behind the last layer, in ``across``."""
        return ctx.protect(torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device), sink=self.sink)

    def across(self, scores: Sequence[Tensor], contexts: Sequence[LayerContext]) -> list[Tensor]:
        return [_at_tokens(own, ctx) for own, ctx in zip(scores, contexts, strict=True)]


def _at_tokens(scores: Tensor, ctx: LayerContext) -> Tensor:
    """The squared surprise of the held tokens where ``scores [B, G, N]`` are finite."""
    if ctx.surprise is None:
        raise ValueError("Surprise: ctx.surprise is None, expected that of every token that was read")
    position = token_positions(scores, ctx)
    column = position if ctx.bounds is None else position + ctx.bounds[:, :1, None]
    column = column.clamp(0, ctx.surprise.shape[1] - 1).expand(scores.shape)
    found = ctx.surprise.square()[:, None].expand(-1, scores.shape[1], -1).gather(2, column)
    return found.where(scores.isfinite(), scores)
