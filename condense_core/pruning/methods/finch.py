"""Finch: what the question attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringMethod, check_count
from condense_core.pruning.methods.common import attention_blocks


@dataclass(frozen=True, kw_only=True, repr=False)
class Finch(ScoringMethod):
    """``score_i = mean over the question's queries t of n_t * softmax(q_t k / sqrt(D))_i``, mean over a group's heads.

    Corallo and Papotti, arXiv 2408.00167. The prompt is the context, then the question of ``window`` tokens, which is
    kept. ``n_t`` is the number of cached tokens before query t: attention thins out as more is seen. The paper cuts the
    context into chunks and gives kept tokens new positions: ``Rerotate(Finch(...))`` in a prefill in chunks, where the
    question should end every chunk.

    Attributes:
        window: tokens of the question at the end of the prompt, >= 1.
        normalize_scores: False leaves ``n_t`` out; ``ops.window_scores`` then does all of it.
    """

    name = "finch"
    summary = "tokens that the question at the end of the prompt attends to"
    paper = "2408.00167"
    window: int = 64
    normalize_scores: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Finch: window", self.window, minimum=1)

    @property
    def protected(self) -> int:
        return self.window

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        num_columns = k.shape[2]
        queries = ctx.last_queries(q, self.window, num_columns)
        if not self.normalize_scores:
            scores = ops.window_scores(queries, k, scale=ctx.scale, kernel_size=1, bounds=ctx.bounds)
            # Between chunks there may be fewer queries than the window has tokens.
            return scores if queries.shape[2] == self.window else ctx.protect(scores, window=self.window)

        width = queries.shape[2]
        row = torch.arange(width, device=k.device).unsqueeze(0)
        own = row + (num_columns if ctx.bounds is None else ctx.bounds[:, 1:]) - width
        before = (own if ctx.bounds is None else own - ctx.bounds[:, :1]).float()  # [B or 1, w]
        scores = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
        for rows, weights in attention_blocks(queries, k, scale=ctx.scale, bounds=ctx.bounds, own=own):
            weighted = (weights * before[:, None, None, rows, None]).sum(dim=3).mean(dim=2)
            scores[:, :, : weights.shape[-1]] += weighted
        return ctx.protect(scores / width, window=self.window)
