"""What several methods share: positions of cached tokens, keys before RoPE, attention in blocks of queries, z-scores.

Shapes as in ``base``: B sequences, H query heads, G key-value heads, N columns, Q queries of the last Q columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext

BLOCK_ELEMENTS = {"cpu": 1 << 19}
"""Logits that ``attention_blocks`` holds at a time, by the kind of device: 2 MiB in float32, which a core's cache holds
through product, mask, softmax and maximum (twice as fast as 64 MiB)."""
_BLOCK_ELEMENTS = 1 << 24  # on others, where a launch costs more than memory: 64 MiB, and as much for the softmax


def token_positions(k: Tensor, ctx: LayerContext) -> Tensor:
    """The position of every cached token in its sequence, ``[B or 1, G or 1, N]`` int64; of padding, any number."""
    if ctx.positions is not None:
        return ctx.positions
    column = torch.arange(k.shape[2], device=k.device).view(1, 1, -1)
    return column if ctx.bounds is None else column - ctx.bounds[:, :1, None]


def between(bounds: Tensor | None, num_columns: int) -> Tensor | None:
    """``[B, 1, N]``: whether a column lies in ``bounds [B, 2]``; None where all do."""
    if bounds is None:
        return None
    column = torch.arange(num_columns, device=bounds.device)
    start, stop = (edge[:, None, None] for edge in bounds.unbind(1))
    return (column >= start) & (column < stop)


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``keys [B, G, n, D]`` before their rotary embedding ``cos, sin [B or 1, n, D]``, in float32.

    Channels i and i + D/2 are a pair, as ``Rotary.to_halves`` makes them. The exact inverse, whatever factor or
    rounding cos and sin carry.
    """
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    turned = keys.float()
    low, high = turned.chunk(2, dim=-1)
    return (turned * cos + torch.cat([high, -low], dim=-1) * sin) / (cos.square() + sin.square())


def join_previous(name: str, fresh: Tensor, ctx: LayerContext, num_columns: int) -> Tensor:
    """The scores ``[B, G, N]``: those kept from earlier passes, then the ``fresh [B, G, Q]`` ones."""
    past = num_columns - fresh.shape[2]
    if not past:
        return fresh
    if ctx.previous is None:
        raise ValueError(
            f"{name}: ctx.previous is None, expected the scores of the {past} columns before the queries; it scores a "
            "token when it is read, so it prunes prefills, not text that is being generated"
        )
    return torch.cat([ctx.previous, fresh], dim=2)


def standardize(scores: Tensor, scored: Tensor | None) -> Tensor:
    """Z-scores of ``scores [B, G, n]`` over the heads and the ``scored [B, 1, n]`` tokens of each sequence.

    The variance is unbiased, the deviation at least 1e-6. What is not scored gets 0.
    """
    if scored is None:
        scored = scores.new_ones(1, 1, scores.shape[2], dtype=torch.bool)
    count = scored.sum(dim=2, keepdim=True) * scores.shape[1]
    mean = scores.masked_fill(~scored, 0.0).sum(dim=(1, 2), keepdim=True) / count.clamp(min=1)
    centred = (scores - mean).masked_fill(~scored, 0.0)
    variance = centred.square().sum(dim=(1, 2), keepdim=True) / (count - 1).clamp(min=1)
    return centred / variance.sqrt().clamp(min=1e-6)


def attention_blocks(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bounds: Tensor | None,
    own: Tensor | None = None,
    appended: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """The causal attention of ``q [B, H, Q, D]`` over ``k [B, G, N, D]``, some queries at a time, in float32.

    Args:
        bounds: ``[B, 2]``: the columns that are real; None: all.
        own: ``[B or 1, Q]``: the column of each query's token, at most N - Q + its row; None: the last Q columns.
        appended: the last Q columns are those of a scoring pass: they and their queries are real, though they lie
            outside of ``bounds``.

    Yields:
        Rows of q and their weights ``[B, G, H/G, t, C]``: softmax over the real columns up to the query's own, zero for
        queries that are padding. No query of the rows sees a column from C on.
    """
    (batch, heads, num_queries, _), (kv_heads, num_columns) = q.shape, k.shape[1:3]
    past = num_columns - num_queries
    keys = k.float()
    column = torch.arange(num_columns, device=k.device)
    in_order = own is None and bounds is None  # then all rows of a block see all columns before its first
    own = column[past:].unsqueeze(0) if own is None else own
    real_column = real_query = None
    if bounds is not None:
        start, stop = bounds[:, :1], bounds[:, 1:]
        real_column = (column >= start) & ((column < stop) | (appended & (column >= past)))
        real_query = (own >= start) & ((own < stop) | appended)
    elements = BLOCK_ELEMENTS.get(k.device.type, _BLOCK_ELEMENTS)
    block = max(1, elements // (batch * heads * max(num_columns, 1)))
    for first in range(0, num_queries, block):
        rows = slice(first, min(first + block, num_queries))
        width = past + rows.stop
        queries = q[:, :, rows].float().reshape(batch, kv_heads, -1, q.shape[3])
        logits = (queries @ keys[:, :, :width].mT * scale).view(batch, kv_heads, heads // kv_heads, -1, width)
        start_masked = past + first if in_order else 0
        seen = column[start_masked:width] <= own[:, rows, None]
        if real_column is not None:
            seen = seen & real_column[:, None, :width]
        logits[..., start_masked:].masked_fill_(~seen[:, None, None], float("-inf"))
        weights = logits.softmax(dim=-1)
        if real_query is not None:
            weights = weights.masked_fill_(~real_query[:, None, None, rows, None], 0.0)
        yield rows, weights
