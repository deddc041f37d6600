"""PeakAttention: what any of the last tokens looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, ScoringMethod, Traits, check_count
from condense_core.pruning.methods.common import attention_blocks


@dataclass(frozen=True, kw_only=True, repr=False)
class PeakAttention(ScoringMethod):
    """``score_i = max over the last w queries and a group's query heads of softmax(q k / sqrt(D))_i``.

    SnapKV takes the mean, in which the one head that looks a fact up and the one token of the question that names it
    disappear among the others. KVzip (arXiv 2505.23416) takes the maximum as well, over a repetition of the context.
    The window itself is kept.

    Attributes:
        window: w, the last tokens whose queries score, >= 1.
    """

    name = "peak_attention"
    summary = "tokens that any of the last tokens of the prompt looks at"
    paper = "2505.23416"
    traits = Traits(any_budget=True)
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("PeakAttention: window", self.window, minimum=1)

    @property
    def protected(self) -> int:
        return self.window

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        queries = ctx.last_queries(q, self.window, k.shape[2])
        width, num_columns = queries.shape[2], k.shape[2]
        if ctx.bounds is None:
            own = torch.arange(num_columns - width, num_columns, device=k.device).unsqueeze(0)
        else:
            own = ctx.bounds[:, 1:] - width + torch.arange(width, device=k.device)
        best = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
        for _, weights in attention_blocks(queries, k, scale=ctx.scale, bounds=ctx.bounds, own=own):
            seen = weights.shape[-1]
            best[:, :, :seen] = torch.maximum(best[:, :, :seen], weights.amax(dim=(2, 3)))
        return ctx.protect(best, window=self.window)
