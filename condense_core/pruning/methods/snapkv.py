"""SnapKV: what the last tokens of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringMethod, check_count


@dataclass(frozen=True, kw_only=True, repr=False)
class SnapKV(ScoringMethod):
    """``score_i = pool_i(mean over the last w queries of softmax(q k / sqrt(D)))``, mean over a group's query heads.

    Li et al., arXiv 2404.14469. The softmax is causal and over all tokens, the window's own columns are dropped,
    ``pool`` is a centred mean over ``kernel_size`` tokens with zeros beyond the ends. The window itself is kept.

    Attributes:
        window: w, the last tokens whose queries score, >= 1.
        kernel_size: width of the pooling, odd, >= 1.
    """

    name = "snapkv"
    summary = "tokens that the last tokens of the prompt attend to"
    paper = "2404.14469"
    window: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("SnapKV: window", self.window, minimum=1)
        check_count("SnapKV: kernel_size", self.kernel_size, minimum=1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"SnapKV: kernel_size is {self.kernel_size}, expected an odd int")

    @property
    def protected(self) -> int:
        return self.window

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        queries = ctx.last_queries(q, self.window, k.shape[2])
        scores = ops.window_scores(queries, k, scale=ctx.scale, kernel_size=self.kernel_size, bounds=ctx.bounds)
        # Between chunks there may be fewer queries than the window has tokens.
        return scores if queries.shape[2] == self.window else ctx.protect(scores, window=self.window)
