"""Specification of `select`: which tokens of a cache are kept, given their scores.

Public function: `condense_core.ops.select`. Kernels: csrc/cpu/kernels/select.h, csrc/cuda/select.cu.

Shapes: B sequences, G key-value heads, N cached tokens.
"""

import torch
from torch import Tensor


def select(
    scores: Tensor,  # [B, G, N]
    budget: int,
    across_heads: bool = False,
    protect: Tensor | None = None,  # [B or 1, P, 2]
) -> tuple[Tensor, Tensor]:
    """Indices of the kept tokens, ascending, and how many each head keeps, `[B, G]`.

    Tokens rank by score, highest first. Those in a range start <= i < stop of `protect` rank with +inf, above every
    number; NaN ranks below every number; a token that scores -inf is padding and never kept. Of equal tokens the
    earlier ranks higher (-0.0 equals 0.0).

    Each head keeps its first `budget` tokens: indices `[B, G, min(budget, N)]`. Across heads, a sequence keeps the
    first G*budget of all its heads' tokens, of equal ones those of the earlier head: indices `[B, min(G*budget, G*N)]`,
    the tokens of one head after those of the other. -1 follows where fewer can be kept.
    """
    batch, heads, num_tokens = scores.shape
    value = torch.where(_protected(protect, scores) & (scores != float("-inf")), float("inf"), scores)
    last = 2 * (value == float("-inf")).int() + value.isnan().int()  # 0: a number, 1: NaN, 2: never
    rows, share = (batch, heads * budget) if across_heads else (batch * heads, budget)
    value, last = value.nan_to_num(nan=float("-inf"), posinf=None).reshape(rows, -1), last.reshape(rows, -1)
    order = value.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, last.gather(-1, order).argsort(dim=-1, stable=True))

    width = min(share, order.shape[-1])
    kept = torch.zeros_like(value, dtype=torch.bool).scatter(-1, order[:, :width], True) & (last < 2)  # [rows, n]
    places = kept.int().argsort(dim=-1, descending=True, stable=True)[:, :width] % max(num_tokens, 1)
    beyond = torch.arange(width, device=scores.device) >= kept.sum(-1, keepdim=True)
    indices = places.masked_fill(beyond, -1)
    return indices if across_heads else indices.view(batch, heads, width), kept.view(scores.shape).sum(-1)


def _protected(protect: Tensor | None, scores: Tensor) -> Tensor:
    """Whether a token lies in one of its sequence's ranges: broadcasts to `[B, G, N]`."""
    token = torch.arange(scores.shape[2], device=scores.device)
    if protect is None:
        return torch.zeros_like(token, dtype=torch.bool)
    start, stop = protect.unsqueeze(-1).unbind(2)  # [B or 1, P, 1]
    return ((token >= start) & (token < stop)).any(1).unsqueeze(1)
