"""Compactor: leverage of the keys and attention from both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from condense_core.pruning.base import LayerContext, ScoringMethod, Traits, check_count
from condense_core.pruning.methods.common import join_previous
from condense_core.pruning.methods.leverage import leverage, projection
from condense_core.pruning.methods.non_causal import check_positive, chunk_attention


@dataclass(frozen=True, kw_only=True, repr=False)
class Compactor(ScoringMethod):
    """``score_i = blending * LeverageScore_i + NonCausal_i``, over the tokens between the sinks and the window.

    Chari and Van Durme, arXiv 2507.08143. Sinks and window are kept, and take no part in either score.

    A token is scored among those that were read in the same pass and keeps that score later. The last tokens of a pass
    have none: when they have become earlier ones, they count as average, 0. See ``LeverageScore`` and ``NonCausal`` for
    what differs from kvpress.

    Attributes:
        sink: the first tokens, which are kept, >= 0.
        window: the last tokens, which are kept, >= 0.
        chunk: tokens of a chunk of attention, >= 1.
        scale: factor on the logits of attention, > 0.
        sketch: width of the sketch of the keys, >= 1.
        blending: weight of the leverage, >= 0; None: the share of tokens that is dropped, as in kvpress.
        seed: of the sketch, >= 0.
    """

    name = "compactor"
    summary = "tokens of high leverage and much attention from both sides"
    paper = "2507.08143"
    traits = Traits(uses_previous=True, prefills_only=True, reads_rotary=True)
    sink: int = 8
    window: int = 4
    chunk: int = 256
    scale: float = 1.0
    sketch: int = 48
    blending: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in {"sink": 0, "window": 0, "chunk": 1, "sketch": 1, "seed": 0}.items():
            check_count(f"Compactor: {name}", getattr(self, name), minimum=minimum)
        check_positive("Compactor: scale", self.scale)
        if self.blending is not None and self.blending != 0:
            check_positive("Compactor: blending", self.blending)

    @property
    def protected(self) -> int:
        return self.sink + self.window

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        (num_queries, head_dim), (kv_heads, num_columns) = q.shape[2:], k.shape[1:3]
        past = num_columns - num_queries
        if ctx.bounds is None:
            first = min(max(self.sink - past, 0), num_queries)
            rows, bounds = slice(first, max(num_queries - self.window, first)), None
        else:
            start, stop = ctx.bounds.unbind(1)
            rows = slice(0, num_queries)
            bounds = torch.stack([(start + self.sink - past).clamp(min=0), stop - self.window - past], dim=1)

        fresh = torch.zeros(*k.shape[:2], num_queries, dtype=torch.float32, device=k.device)
        if rows.start < rows.stop:
            queries, keys, values = (x[:, :, rows] for x in (q, k[:, :, past:], v[:, :, past:]))
            phi = projection(self.seed, ctx.layer_idx, (kv_heads, head_dim, self.sketch)).to(k.device)
            geometry = leverage(ctx.rotary.to_halves(keys), ctx.cos[:, rows], ctx.sin[:, rows], phi, bounds)
            attention = chunk_attention(queries, keys, values, chunk=self.chunk, scale=self.scale, bounds=bounds)
            blended = self._blending(k, ctx) * geometry + attention
            fresh = F.pad(blended, (rows.start, num_queries - rows.stop))
        scores = join_previous("Compactor", fresh, ctx, num_columns)
        if past:
            scores = scores.masked_fill(scores == math.inf, 0.0)
        return ctx.protect(scores, sink=self.sink, window=self.window)

    def _blending(self, k: Tensor, ctx: LayerContext) -> float | Tensor:
        if self.blending is not None:
            return self.blending
        if self.keep is not None:
            return 1 - self.keep
        shares = [1 - budget / max(length, 1) for budget, length in zip(ctx.budgets, ctx.lengths, strict=True)]
        return shares[0] if len(set(shares)) == 1 else torch.tensor(shares, device=k.device)[:, None, None]
