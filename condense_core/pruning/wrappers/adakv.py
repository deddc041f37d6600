"""AdaKV: the heads of a layer share its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import Kept, LayerContext, Traits, Wrapper, check_share, keep_best
from condense_core.pruning.wrappers.kept import kept_mask
from condense_core.pruning.wrappers.nesting import (
    refuse_competition,
    refuse_decoding,
    refuse_rotation,
    refuse_unbounded,
)


@dataclass(frozen=True, repr=False)
class AdaKV(Wrapper):
    """A layer's ``G * budget`` places go to the highest scores of all its heads. Feng et al., arXiv 2407.11550.

    Every head first keeps its own best ``max(floor * budget, protected)`` tokens, ``protected`` being those that the
    method keeps whatever they score. Heads then hold different numbers of tokens, for real: the cache is ragged.
    Between the chunks of a chunked prefill all heads still keep equally many.

    Attributes:
        floor: share of the budget that every head keeps for its own best tokens, in [0, 1] (the paper's safeguard).
    """

    name = "adakv"
    summary = "lets the heads of a layer compete for its budget"
    paper = "2407.11550"
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor != 0:
            check_share("AdaKV: floor", self.floor)
        refuse_unbounded(self)
        refuse_competition(self)
        refuse_rotation(self)
        refuse_decoding(self)

    @property
    def traits(self) -> Traits:
        return replace(self.method.traits, ragged=True)

    def select(self, scores: Tensor, ctx: LayerContext) -> Kept:
        if not ctx.final:
            return keep_best(scores, ctx, "head")
        if ctx.bounds is None:
            return keep_best(self._secure(scores, ctx.budget), ctx, "layer")
        rows = [self._secure(scores[b : b + 1], budget) for b, budget in enumerate(ctx.budgets)]
        return keep_best(torch.cat(rows), ctx, "layer")

    def _secure(self, scores: Tensor, budget: int) -> Tensor:
        """The tokens that are every head's own at +inf, all others below.

        What is forced in one head must not take the places of another, where the budget is too small for all that is
        forced.
        """
        least = max(math.floor(self.floor * budget + 1e-9), min(self.protected, budget))
        if not least:
            return scores
        own = kept_mask(Kept(ops.select(scores, least)[0]), *scores.shape)
        return scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(own, math.inf)
