"""ObservedAttention: how much attention a token has got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, ScoringMethod, Traits
from condense_core.pruning.methods.common import attention_blocks


@dataclass(frozen=True, kw_only=True, repr=False)
class ObservedAttention(ScoringMethod):
    """``score_i = mean over the queries t >= i of softmax(q_t k / sqrt(D))_i``, mean over a group's query heads.

    Like H2O, Zhang et al., arXiv 2306.14048, which takes the sum: the mean does not favour early tokens. Attention is
    computed anew in blocks of queries: any attention implementation will do, and memory stays bounded.

    A token that stays from an earlier pass has its mean extended: ``(n_old * old + sum over the new queries) / (n_old +
    n_new)``, where ``n_old`` is how many queries had seen it, by its position. Without evictions between them, passes
    over chunks give what one pass does.
    """

    name = "observed_attention"
    summary = "tokens that got the most attention on average"
    paper = "2306.14048"
    traits = Traits(any_budget=True, uses_previous=True)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        num_columns = k.shape[2]
        past = num_columns - q.shape[2]
        sums = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
        for _, weights in attention_blocks(q, k, scale=ctx.scale, bounds=ctx.bounds):
            sums[:, :, : weights.shape[-1]] += weights.sum(dim=3).mean(dim=2)

        column = torch.arange(num_columns, device=k.device)
        stop = num_columns if ctx.bounds is None else ctx.bounds[:, 1, None, None]
        count = (stop - column.clamp(min=past)).clamp(min=0).expand(sums.shape)
        if past and ctx.previous is not None:
            if ctx.positions is None:
                seen = past - column[:past]
            else:
                seen = ctx.positions[:, :, past, None] - ctx.positions[:, :, :past]
            # A sequence that ended before these queries keeps its scores, whatever stands at its padding.
            seen = seen.clamp(min=1).expand(ctx.previous.shape)
            sums[:, :, :past] += ctx.previous * seen
            count = torch.cat([count[:, :, :past] + seen, count[:, :, past:]], dim=2)
        return ctx.protect(sums / count.clamp(min=1))
