"""KeyDiff: keys that point elsewhere than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringMethod


@dataclass(frozen=True, kw_only=True, repr=False)
class KeyDiff(ScoringMethod):
    """``score_i = -cos(k_i, mean_j k_j / ||k_j||)``, the mean over the cached tokens of the sequence and head.

    Park et al., arXiv 2504.15364. The paper evicts block by block: that is a prefill in chunks, where the mean is over
    what is left and the new chunk.
    """

    name = "keydiff"
    summary = "tokens whose keys differ most from the mean key"
    paper = "2504.15364"

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return ops.key_similarity(k, bounds=ctx.bounds)
