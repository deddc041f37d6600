"""ChunkKV: neighbouring tokens stay or go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, Wrapper, check_count
from condense_core.pruning.wrappers.kept import without_appended


@dataclass(frozen=True, repr=False)
class ChunkKV(Wrapper):
    """``score_i = mean of the scores in token i's chunk``. Liu et al., arXiv 2502.00299.

    Chunk c is the positions ``c*chunk`` to ``(c+1)*chunk - 1`` of the sequence.

    The tokens of a chunk then tie, and selection, in which the earlier of equal tokens ranks higher, keeps whole chunks
    in the order of their means; of the one at the edge of the budget it keeps the first tokens. Tokens that must stay
    (+inf) do, and count neither for nor against the rest of their chunk.

    kvpress 0.5.5 adds up the heads of a layer, so that all of them keep the same chunks, counts the window's stand-in
    scores into the means, and rounds the budget down to whole chunks. Here every head has chunks of its own (with AdaKV
    outside they compete), and the budget is met exactly. The paper's reuse of one layer's chunks in the next is not
    done.

    Attributes:
        chunk: consecutive tokens of a chunk, >= 1.
    """

    name = "chunkkv"
    summary = "keeps or evicts neighbouring tokens together"
    paper = "2502.00299"
    chunk: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("ChunkKV: chunk", self.chunk, minimum=1)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        scores = without_appended(self.method.score(layer, q, k, v, ctx), ctx, q.shape[2])
        finite = scores.isfinite()
        chunk = self._chunks(scores, ctx)
        # In float64, so that the order in which a GPU adds up is lost when the mean is rounded.
        total = torch.zeros_like(scores, dtype=torch.float64)
        total.scatter_add_(2, chunk, scores.where(finite, 0).double())
        count = torch.zeros_like(total).scatter_add_(2, chunk, finite.double())
        means = (total / count.clamp(min=1)).float().gather(2, chunk)
        return means.where(finite, scores)

    def _chunks(self, scores: Tensor, ctx: LayerContext) -> Tensor:
        """``[B, G, N]`` the number of each column's chunk among those that the cache still holds tokens of."""
        positions = ctx.positions
        if positions is None:
            positions = torch.arange(scores.shape[2], device=scores.device).expand(scores.shape)
            if ctx.bounds is not None:
                positions = positions - ctx.bounds[:, :1, None]
        number = positions.div(self.chunk, rounding_mode="floor")
        return (number.diff(dim=2, prepend=number[:, :, :1]) != 0).cumsum(2)
