"""What wrappers ask of a selection: which head a kept row belongs to, and the selection as a mask.

Nothing is read back from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condense_core.pruning.base import Kept, LayerContext


def rows_of_heads(kept: Kept) -> tuple[Tensor, Tensor]:
    """The head n = b*G + g of every entry of ``kept.indices``, and its place in that head, in their shape.

    A row behind the last head has n = B*G.
    """
    if kept.cu_seqlens is None:
        batch, heads, width = kept.indices.shape
        head = torch.arange(batch * heads, device=kept.indices.device).view(batch, heads, 1)
        place = torch.arange(width, device=kept.indices.device)
        return head.expand_as(kept.indices), place.expand_as(kept.indices)
    row = torch.arange(len(kept.indices), device=kept.indices.device)
    offsets = kept.cu_seqlens.long()
    head = torch.searchsorted(offsets[1:], row, right=True)
    return head, row - offsets[head]


def kept_mask(kept: Kept, batch: int, heads: int, num_tokens: int) -> Tensor:
    """``[B, G, N]`` bool: the columns that stay."""
    head, _ = rows_of_heads(kept)
    # Row B*G and column N take what is no column of any head.
    mask = torch.zeros(batch * heads + 1, num_tokens + 1, dtype=torch.bool, device=kept.indices.device)
    column = torch.where(kept.indices < 0, num_tokens, kept.indices)
    mask.view(-1).scatter_(0, (head * (num_tokens + 1) + column).flatten(), True)
    return mask[:-1, :-1].unflatten(0, (batch, heads))


def without_appended(scores: Tensor, ctx: LayerContext, num_queries: int) -> Tensor:
    """``scores [B, G, N]``; in a scoring pass the appended tokens, the last ``num_queries``, get -inf like padding.

    They are dropped behind the pass, so that no budget may be spent on them and no neighbour judged by them.
    """
    if ctx.scoring_pass is None:
        return scores
    column = torch.arange(scores.shape[2], device=scores.device)
    return scores.masked_fill(column >= scores.shape[2] - num_queries, float("-inf"))


def pack(mask: Tensor) -> Kept:
    """The columns of ``mask [B, G, N]``, head after head."""
    lengths = mask.flatten(0, 1).sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return Kept(mask.nonzero()[:, 2], offsets)  # the read-back
