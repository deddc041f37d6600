"""CriticalKV: what a token's value can add to the output decides about the second half of the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringPass, Wrapper, check_share
from condense_core.pruning.wrappers.kept import kept_mask, without_appended
from condense_core.pruning.wrappers.nesting import refuse_competition, refuse_unbounded


@dataclass(frozen=True, repr=False)
class CriticalKV(Wrapper):
    """``(score_i + epsilon) * ||W_o v_i||_1``, after the base score has chosen the first part of the budget.

    Feng et al., arXiv 2502.03805.

    The first ``first_share`` of the budget (rounded down, at least one token) is selected as the method selects, and
    scores +inf: ``CriticalKV(AdaKV(...))`` lets the heads compete for both parts, ``AdaKV(CriticalKV(...))`` for the
    second alone. The norm is averaged over the query heads that share a value. The scores should be shares of
    attention: where one is negative, a value that adds much counts against its token.

    Between the chunks of a chunked prefill a method that looks at its earlier scores (``uses_previous``) is left as it
    is, since those would be weighed again with every chunk.

    Attributes:
        epsilon: added to the scores, so that a value counts where attention is zero, >= 0.
        first_share: share of the budget that the method alone decides about, in [0, 1].
    """

    name = "criticalkv"
    summary = "weighs a score by how much the token's value adds to the output"
    paper = "2502.03805"
    epsilon: float = 1e-4
    first_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float):
            raise TypeError(f"CriticalKV: epsilon is {self.epsilon!r}, expected a number >= 0")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"CriticalKV: epsilon is {self.epsilon}, expected a finite number >= 0")
        if self.first_share != 0:
            check_share("CriticalKV: first_share", self.first_share)
        refuse_unbounded(self)
        refuse_competition(self)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        scores = self.method.score(layer, q, k, v, ctx)
        if self.traits.uses_previous and not ctx.final:
            return scores
        scores = without_appended(scores, ctx, q.shape[2])
        norms = ops.value_projection_norm(v, layer.o_proj.weight, bounds=ctx.bounds)
        critical = scores.where(scores.isinf(), (scores + self.epsilon) * norms)
        if not self.first_share:
            return critical
        budgets = tuple(min(budget, max(1, int(self.first_share * budget + 1e-9))) for budget in ctx.budgets)
        first = kept_mask(self.method.select(scores, replace(ctx, budgets=budgets)), *scores.shape)
        return critical.masked_fill(first, math.inf)

    def scoring_passes(self, num_tokens: int) -> list[ScoringPass]:
        passes = self.method.scoring_passes(num_tokens)
        if len(passes) > 1:
            # The first parts that each of them chose would add up to more than the budget.
            raise ValueError(
                f"CriticalKV: method is {self.method!r}, which reads a context of {num_tokens} tokens again in "
                f"{len(passes)} parts; expected a method that scores it at once"
            )
        return passes
