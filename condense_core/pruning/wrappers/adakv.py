"""AdaKV: the heads of a layer share its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import Kept, LayerContext, Wrapper, check_share, keep_best


@dataclass(frozen=True, repr=False)
class AdaKV(Wrapper):
    """A layer's ``G * budget`` places go to the highest scores of all its heads. Feng et al., arXiv 2407.11550.

    Heads then hold different numbers of tokens, for real: the cache is ragged. Between the chunks of a chunked prefill
    all heads still keep equally many.

    Attributes:
        floor: share of the budget that every head keeps for its own best tokens, in [0, 1] (the paper's safeguard).
    """

    name: ClassVar[str] = "adakv"
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor != 0:
            check_share("AdaKV: floor", self.floor)

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return True

    def select(self, scores: Tensor, ctx: LayerContext) -> Kept:
        if not ctx.final:
            return keep_best(scores, ctx, "head")
        least = int(self.floor * ctx.budget)
        if least and ctx.bounds is None:
            scores = _secure(scores, least)
        elif self.floor and ctx.bounds is not None:
            scores = scores.clone()
            for b, budget in enumerate(ctx.budgets):
                if least := int(self.floor * budget):
                    scores[b : b + 1] = _secure(scores[b : b + 1], least)
        return keep_best(scores, ctx, "layer")


def _secure(scores: Tensor, count: int) -> Tensor:
    """The best ``count`` tokens of every head at +inf."""
    return scores.scatter(2, ops.select(scores, count)[0], math.inf)
