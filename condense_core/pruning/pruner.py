"""Pruning one layer: the budget, what the method is told, and the layer that comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from condense_core.pruning.base import LayerContext, Method, ScoringPass, layer_budgets
from condense_core.pruning.layers import PrunedLayer, UniformLayer
from condense_core.pruning.padding import Padding
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.rotary import Rotary

RECENT = 64
"""Queries of generated tokens that are remembered for an eviction while decoding."""


@dataclass
class LayerCall:
    """One attention layer's forward pass, from its hook to its attention function.

    hidden: ``[B, Q, d_model]``. positions: ``[B or 1, Q]`` int64, of the queries. was_empty: the layer held nothing
    before. memo: what a method computes once for all layers of a forward pass.
    """

    module: Any
    cache: Cache | None
    layer: PrunedLayer | None
    hidden: Tensor
    positions: Tensor
    was_empty: bool
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def index(self) -> int:
        """The layer's place in the model."""
        return int(self.module.layer_idx)


@dataclass
class Chunks:
    """A prefill in several passes, of one sequence without padding.

    total: its tokens. final: whether the present pass is the last. scores: of each layer's held tokens,
    ``[1, G, held]``, for methods that score a token once. surprise: ``[1, n]`` of the tokens so far, and hidden: the
    last hidden state ``[1, 1, d_model]`` of the pass before, for methods that read it.
    """

    total: int
    final: bool = False
    scores: dict[int, Tensor] = field(default_factory=dict)
    surprise: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class PassScores:
    """A scoring pass that is under way behind the ``num_tokens`` of one sequence, and what it has found.

    scores: of each layer, ``[1, G, num_tokens]``. contexts: what the method was told, of each layer.
    """

    scoring_pass: ScoringPass
    num_tokens: int
    scores: dict[int, Tensor] = field(default_factory=dict)
    contexts: dict[int, LayerContext] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A layer whose keys and values ``k, v [B, G, N, D]`` a method has scored, and which is not pruned yet.

    enough: it holds no more than its budget. sliding_window: as the model's queries have it.
    """

    layer: UniformLayer
    k: Tensor
    v: Tensor
    scores: Tensor
    ctx: LayerContext
    enough: bool
    sliding_window: int | None


@dataclass(frozen=True)
class Pruner:
    """``method`` on a model of ``num_layers`` layers.

    rotaries: the rotary embedding of each layer; None where it is not known, which a method that reads it cannot do
    with.
    """

    method: Method
    rotaries: tuple[Rotary, ...] | None
    num_layers: int

    def budgets(self, index: int, totals: Sequence[int]) -> tuple[int, ...]:
        """What layer ``index`` keeps of sequences of ``totals`` tokens: all of those that it would protect as a whole.

        ``ValueError`` if that is less than it must.
        """
        return layer_budgets(self.method, index, self.num_layers, totals)

    def prefill(
        self,
        call: LayerCall,
        layer: UniformLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Padding | None,
        chunks: Chunks | None,
        sliding_window: int | None = None,
    ) -> Scored | None:
        """Behind the attention of a prefill, or of one chunk of it: shrink the layer to its budget.

        sliding_window: how many tokens back the model's queries look, themselves included; None: all. What no later
        query will see is evicted first.

        Returns:
            What ``finish`` needs once all layers have been scored, if the method looks across them; None: all is done.
        """
        method, num_held = self.method, k.shape[2]
        lengths = (num_held,) * k.shape[0] if padding is None else padding.lengths
        budgets = self.budgets(call.index, lengths if chunks is None else (chunks.total,))
        if chunks is not None and sliding_window is not None:
            budgets = tuple(min(budget, sliding_window - 1) for budget in budgets)
        final = chunks is None or chunks.final
        enough = (
            all(held <= budget for held, budget in zip(lengths, budgets, strict=True))
            if method.traits.bounded
            else not final
        )
        if enough and not (chunks is not None and method.traits.uses_previous):
            return None
        ctx = self._context(
            call,
            lengths,
            budgets,
            bounds=None if padding is None else padding.bounds.to(k.device),
            positions=layer.all_positions(),
            previous=None if chunks is None or q.shape[2] == num_held else chunks.scores.get(call.index),
            final=final,
        )
        if sliding_window is not None and chunks is None and sliding_window - 1 < num_held:
            q, k, v, ctx = _in_sliding_window(q, k, v, ctx, sliding_window - 1)
        scores = method.score(call.module, q, k, v, ctx)
        scored = Scored(layer, k, v, scores, ctx, enough, sliding_window)
        if method.traits.whole_model and not enough:
            return scored
        self._shrink(call.cache, scored, scores, chunks)
        return None

    def finish(
        self, cache: Cache | None, scored: Sequence[Scored], chunks: Chunks | None, surprise: Tensor | None
    ) -> None:
        """Shrink the layers that ``prefill`` left as they were, in the light of all; surprise: as in a context."""
        if not scored:  # every layer has room for all that it holds
            return
        contexts = [replace(one.ctx, surprise=surprise) for one in scored]
        ranked = self.method.across([one.scores for one in scored], contexts)
        for one, ctx, scores in zip(scored, contexts, ranked, strict=True):
            self._shrink(cache, replace(one, ctx=ctx), scores, chunks)

    def _shrink(self, cache: Cache | None, scored: Scored, ranked: Tensor, chunks: Chunks | None) -> None:
        """Keep the best of a scored layer by ``ranked [B, G, N]``, and remember its own scores for the next chunk."""
        if chunks is not None and scored.sliding_window is not None:
            ranked = _behind_sliding_window(ranked, scored.ctx, scored.sliding_window - 1)
        own = ranked if not self.method.traits.whole_model else scored.scores
        indices = None
        if not scored.enough:
            indices = self.apply(cache, scored.layer, scored.k, scored.v, ranked, scored.ctx)
        if chunks is not None:
            chunks.scores[scored.ctx.layer_idx] = own if indices is None else own.gather(2, indices)

    def score_pass(self, call: LayerCall, found: PassScores, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Score a context by the queries of the tokens that a scoring pass appends."""
        total = found.num_tokens
        ctx = self._context(call, (k.shape[2],), self.budgets(call.index, (total,)), scoring_pass=found.scoring_pass)
        found.scores[call.index] = self.method.score(call.module, q, k, v, ctx)[:, :, :total]
        found.contexts[call.index] = ctx

    def evict(self, call: LayerCall, layer: UniformLayer, recent: Tensor, k: Tensor, v: Tensor, budget: int) -> None:
        """Shrink a layer that has grown while text was generated. recent: ``[B, H, r, D]``, its last queries."""
        if budget < self.method.protected:
            raise ValueError(
                f"{self.method!r}: {budget} tokens, fewer than the {self.method.protected} that it always keeps; "
                "expected a larger budget"
            )
        batch, num_held = k.shape[0], k.shape[2]
        ctx = self._context(
            replace(call, positions=torch.arange(layer.seen - recent.shape[2], layer.seen, device=k.device)[None]),
            (num_held,) * batch,
            (budget,) * batch,
            positions=layer.all_positions(),
        )
        scores = self.method.score(call.module, recent, k, v, ctx)
        self.apply(call.cache, layer, k, v, scores, ctx)

    def apply(
        self, cache: Cache | None, layer: UniformLayer, k: Tensor, v: Tensor, scores: Tensor, ctx: LayerContext
    ) -> Tensor | None:
        """Keep the best of ``k, v [B, G, N, D]`` by ``scores``: in the layer, or in a ragged one in its place.

        Returns:
            The kept columns ``[B, G, M]``, or None where heads or sequences keep different numbers.
        """
        kept = self.method.select(scores, ctx)
        keys, values = self.method.compact(k, v, kept, ctx)
        batch, kv_heads = k.shape[:2]
        moved = self.method.traits.rotates and ctx.final
        if kept.cu_seqlens is None:
            positions = kept.indices if ctx.positions is None else ctx.positions.gather(2, kept.indices)
            if moved:
                positions = torch.arange(keys.shape[2], device=k.device).expand_as(kept.indices)
            layer.hold_kept(keys, values, positions, keys.shape[2] if moved else layer.seen)
            return kept.indices
        assert cache is not None
        offsets = kept.cu_seqlens
        head = torch.arange(batch * kv_heads, device=k.device).repeat_interleave(
            offsets.diff(), output_size=len(kept.indices)
        )
        if moved:
            positions = torch.arange(len(head), device=k.device) - offsets[head]
        elif ctx.positions is not None:
            positions = ctx.positions.flatten(0, 1)[head, kept.indices]
        else:
            positions = kept.indices if ctx.bounds is None else kept.indices - ctx.bounds[head // kv_heads, 0]
        cache.layers[ctx.layer_idx] = RaggedLayer(
            keys,
            values,
            offsets,
            batch=batch,
            kv_heads=kv_heads,
            positions=positions,
            seen=max(map(min, ctx.budgets, ctx.lengths)) if moved else layer.seen,
        )
        cache.layers[ctx.layer_idx].in_session = layer.in_session
        return None

    def _context(self, call: LayerCall, lengths: Sequence[int], budgets: Sequence[int], **more: Any) -> LayerContext:
        known: dict[str, Any] = {
            "module": call.module,
            "layer_idx": call.index,
            "num_layers": self.num_layers,
            "budgets": tuple(budgets),
            "lengths": tuple(lengths),
            "bounds": None,
            "scale": float(call.module.scaling),
            "rotary": None if self.rotaries is None else self.rotaries[call.index],
            "cos": None,
            "sin": None,
            "hidden": call.hidden,
            "memo": call.memo,
        }
        if self.method.traits.reads_rotary and self.rotaries is not None:
            known["cos"], known["sin"] = self._half_table(call, self.rotaries[call.index])
        return LayerContext(**known | more)

    def _half_table(self, call: LayerCall, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """``Rotary.half_table`` of the queries in the model's dtype, once for all layers with this rotary embedding."""
        key = (Pruner, rotary, id(call.positions))
        if key not in call.memo:
            cos, sin = rotary.half_table(call.positions)
            # The positions are kept beside the table, so that no other tensor gets their id.
            call.memo[key] = call.positions, cos.to(call.hidden.dtype), sin.to(call.hidden.dtype)
        _, cos, sin = call.memo[key]
        return cos, sin


def _behind_sliding_window(scores: Tensor, ctx: LayerContext, count: int) -> Tensor:
    """``scores [1, G, N]`` of one chunk, with tokens that stand before the last ``count`` below all others.

    Heads have kept different tokens of earlier chunks, so that they cannot be cut at one column.
    """
    positions = torch.arange(scores.shape[2], device=scores.device) if ctx.positions is None else ctx.positions
    return scores.masked_fill(positions <= positions[..., -1:] - count, torch.finfo(scores.dtype).min)


def _in_sliding_window(
    q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext, count: int
) -> tuple[Tensor, Tensor, Tensor, LayerContext]:
    """The last ``count`` tokens of every sequence: the next query of a sliding window looks back so far."""
    if ctx.bounds is not None:
        start, stop = ctx.bounds.unbind(1)
        lengths = tuple(min(n, count) for n in ctx.lengths)
        bounds = torch.stack([torch.maximum(start, stop - count), stop], 1)
        # Positions count from the first real column, which is no longer where the bounds begin.
        positions = (torch.arange(k.shape[2], device=k.device) - start[:, None])[:, None].expand(-1, k.shape[1], -1)
        budgets = tuple(map(min, ctx.budgets, lengths))
        return q, k, v, replace(ctx, bounds=bounds, lengths=lengths, budgets=budgets, positions=positions)
    first = k.shape[2] - count
    positions = torch.arange(first, k.shape[2], device=k.device).expand(*k.shape[:2], -1)
    ctx = replace(
        ctx,
        lengths=(count,) * len(ctx.lengths),
        budgets=tuple(min(budget, count) for budget in ctx.budgets),
        positions=positions,
        cos=None if ctx.cos is None else ctx.cos[:, -count:],
        sin=None if ctx.sin is None else ctx.sin[:, -count:],
        hidden=ctx.hidden[:, -count:],
    )
    return q[:, :, -count:], k[:, :, -count:], v[:, :, -count:], ctx
