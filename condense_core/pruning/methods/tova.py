"""TOVA: what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringMethod


@dataclass(frozen=True, kw_only=True, repr=False)
class TOVA(ScoringMethod):
    """``score_i = mean over all query heads of softmax(q k / sqrt(D))_i``, q the query of the last token.

    Oren et al., arXiv 2401.06104. All heads of a layer share the score. The last token itself is kept, which the paper
    leaves to its usually high weight.
    """

    name = "tova"
    summary = "tokens that the last token attends to"
    paper = "2401.06104"

    @property
    def protected(self) -> int:
        return 1

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        last = ctx.last_queries(q, 1, k.shape[2])
        scores = ops.window_scores(last, k, scale=ctx.scale, kernel_size=1, bounds=ctx.bounds)
        return scores.mean(dim=1, keepdim=True).expand_as(scores)
