"""AcrossLayers: the heads of all layers share one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condense_core.pruning.base import Kept, LayerContext, Traits, Wrapper, keep_best
from condense_core.pruning.wrappers.kept import pack
from condense_core.pruning.wrappers.nesting import (
    refuse_competition,
    refuse_decoding,
    refuse_rotation,
    refuse_unbounded,
)


@dataclass(frozen=True, repr=False)
class AcrossLayers(Wrapper):
    """The ``L * G * budget`` places of a model go to the highest scores of all its heads in all its layers.

    So KVzip prunes (Kim et al., arXiv 2505.23416): a head that copies keeps nearly all tokens, and one that looks
    nowhere in particular next to none. Scores must mean the same in every layer, as shares of attention do. Every head
    keeps at least its best token, since attention over no key has no value: there may be so many more in all.

    The whole cache exists before any of it is evicted, and its size is read back from the device once a layer. Between
    the chunks of a chunked prefill all heads keep equally many.
    """

    name = "across_layers"
    summary = "lets the heads of all layers compete for one budget"
    paper = "2505.23416"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unbounded(self)
        refuse_competition(self)
        refuse_rotation(self)
        refuse_decoding(self)

    @property
    def traits(self) -> Traits:
        return replace(self.method.traits, ragged=True, layers_differ=True, whole_model=True)

    def across(self, scores: Sequence[Tensor], contexts: Sequence[LayerContext]) -> list[Tensor]:
        scores = self.method.across(scores, contexts)
        if not contexts[0].final:
            return scores
        chosen = [torch.zeros_like(own, dtype=torch.bool) for own in scores]
        for b in range(scores[0].shape[0]):
            rows = torch.cat([own[b].flatten() for own in scores])
            places = sum(ctx.budgets[b] * own.shape[1] for own, ctx in zip(scores, contexts, strict=True))
            ranked = rows.nan_to_num(nan=torch.finfo(rows.dtype).min, neginf=-math.inf, posinf=math.inf)
            kept = torch.zeros_like(ranked, dtype=torch.bool)
            kept[ranked.topk(min(places, len(ranked))).indices] = True
            kept &= rows != -math.inf
            for mask, part in zip(chosen, kept.split([own[b].numel() for own in scores]), strict=True):
                mask[b] = part.view_as(mask[b])
        return [
            torch.where(mask, math.inf, own.clamp(max=torch.finfo(own.dtype).max))
            for mask, own in zip(chosen, scores, strict=True)
        ]

    def select(self, scores: Tensor, ctx: LayerContext) -> Kept:
        if not ctx.final:
            return keep_best(scores, ctx, "head")
        chosen = scores == math.inf
        best = torch.zeros_like(chosen).scatter_(2, scores.argmax(2, keepdim=True), True) & (scores != -math.inf)
        return pack(chosen | (best & ~chosen.any(2, keepdim=True)))
