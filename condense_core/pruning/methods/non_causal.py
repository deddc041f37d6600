"""NonCausal: attention from both sides, chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringMethod, Traits, check_count
from condense_core.pruning.methods.common import between, join_previous, standardize


@dataclass(frozen=True, kw_only=True, repr=False)
class NonCausal(ScoringMethod):
    """``score_i = z(pool_i(||v_i|| * sum_t softmax_i(scale * q_t k)))``, sums over the queries of i's chunk.

    Chari and Van Durme, arXiv 2507.08143, the attention half of Compactor. The softmax is over the keys of the chunk,
    later ones too; mean over a group's query heads; ``pool`` is a centred mean over 3 tokens with zeros beyond the
    ends; z is the z-score over the heads and tokens of a sequence.

    A token is scored among those that were read in the same pass and keeps that score later. kvpress masks what fills
    up the last chunk with -1e-9 instead of -1e9, so that its zeros take part in the softmax; here they do not.

    Attributes:
        chunk: tokens of a chunk, >= 1.
        scale: factor on the logits, > 0. The authors' implementations take 1, not ``1 / sqrt(D)``.
    """

    name = "non_causal"
    summary = "tokens that get most attention in their chunk, from both sides"
    paper = "2507.08143"
    traits = Traits(any_budget=True, uses_previous=True, prefills_only=True)
    chunk: int = 256
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("NonCausal: chunk", self.chunk, minimum=1)
        check_positive("NonCausal: scale", self.scale)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        past = k.shape[2] - q.shape[2]
        bounds = None if ctx.bounds is None else ctx.bounds - past
        fresh = chunk_attention(q, k[:, :, past:], v[:, :, past:], chunk=self.chunk, scale=self.scale, bounds=bounds)
        return ctx.protect(join_previous("NonCausal", fresh, ctx, k.shape[2]))


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk: int, scale: float, bounds: Tensor | None) -> Tensor:
    """Z-scores ``[B, G, n]`` of the attention that ``k [B, G, n, D]`` gets from ``q [B, H, n, D]`` within chunks."""
    scores = ops.non_causal_chunks(q, k, chunk_size=chunk, scale=scale, bounds=bounds)
    scores = scores * torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32)
    scored = between(bounds, k.shape[2])
    if scored is not None:
        scores = scores.masked_fill(~scored, 0.0)
    return standardize(F.avg_pool1d(scores, 3, stride=1, padding=1), scored)


def check_positive(name: str, value: float) -> None:
    """``value`` must be a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected a number > 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number > 0")
