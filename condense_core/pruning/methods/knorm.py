"""Knorm: keys of small norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringMethod


@dataclass(frozen=True, kw_only=True, repr=False)
class Knorm(ScoringMethod):
    """``score_i = -||k_i||_2``: keys of small norm draw attention. Devoto et al., arXiv 2406.11430."""

    name = "knorm"
    summary = "tokens whose keys have a small norm"
    paper = "2406.11430"

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return ops.key_norm(k, bounds=ctx.bounds)
