"""Scores of cached keys by the attention that queries give them.

Shapes: B batch, H query heads, G key-value heads, H a multiple of G, N tokens, D head_dim, w queries of the window.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from condense_core.ops.reference.padding import accumulation_dtype, real_tokens


def window_scores(
    q_win: Tensor,  # [B, H, w, D], row t stands at position stop - w + t
    k: Tensor,  # [B, G, N, D]
    scale: float | None = None,  # default 1/sqrt(D)
    kernel_size: int = 5,  # odd
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """Attention that the last w queries of each sequence give to earlier keys, averaged and smoothed: `[B, G, N]`.

    With p[h, t] = softmax over the keys i, start <= i <= stop - w + t, of `scale * <q_win[h, t], k[i]>`: `a[h, i] =
    mean_t p[h, t, i]` for start <= i < stop - w, and zero elsewhere; smoothed over kernel_size neighbours, `b[h, i] =
    sum_{|j - i| <= kernel_size // 2} a[h, j] / kernel_size`; the score is the mean of b over the query heads of the
    group. The last w tokens score +inf, padding -inf. Rows that stand before `start` do not exist; then the sequence
    has no more than w tokens, and all of them score +inf.

    SnapKV, https://arxiv.org/abs/2404.14469, with the mean over the group of query heads.
    """
    compute = accumulation_dtype(k)
    (batch, heads, window, head_dim), (kv_heads, num_tokens) = q_win.shape, k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    start, stop = real_tokens(bounds, batch, num_tokens, k.device)  # [B, 1] each
    i = torch.arange(num_tokens, device=k.device)
    position = stop - window + torch.arange(window, device=k.device)  # [B, w]
    real = (i >= start) & (i < stop)  # [B, N]
    forced = real & (i >= stop - window)
    scored = real & ~forced
    seen = (i >= start.unsqueeze(-1)) & (i <= position.unsqueeze(-1))  # [B, w, N]

    q = q_win.to(compute).view(batch, kv_heads, heads // kv_heads, window, head_dim)
    logits = scale * torch.einsum("bghtd,bgnd->bghtn", q, k.to(compute))
    p = logits.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    a = p.mean(-2).masked_fill(~scored[:, None, None], 0.0)  # [B, G, H/G, N]
    b = F.avg_pool1d(a.flatten(1, 2), kernel_size, stride=1, padding=kernel_size // 2).view(a.shape)
    scores = b.mean(2).masked_fill(forced.unsqueeze(1), float("inf"))
    return scores.masked_fill(~real.unsqueeze(1), float("-inf"))


def non_causal_chunks(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, G, N, D]
    chunk_size: int = 256,
    scale: float | None = None,  # default 1/sqrt(D)
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """Attention that every key gets from the queries of its own chunk, later ones too: `[B, G, N]`.

    Chunk c of a sequence holds its tokens [start + c * chunk_size, start + (c + 1) * chunk_size), clipped at `stop`.
    With p[h, i] = softmax over the keys j of i's chunk of `scale * <q[h, i], k[j]>`, the score of key j is the sum of
    p[h, i, j] over the queries i of its chunk, and the mean of that over the query heads of the group. Padding scores
    -inf.

    The attention part of Compactor, https://arxiv.org/abs/2507.08143.
    """
    compute = accumulation_dtype(k)
    (batch, heads, num_tokens, head_dim), kv_heads = q.shape, k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    start, stop = real_tokens(bounds, batch, num_tokens, k.device)  # [B, 1] each
    chunk_size = min(chunk_size, max(num_tokens, 1))  # a wider chunk sees no more
    num_chunks = -(-num_tokens // chunk_size)

    # Every sequence moves to the front of whole chunks; zeros, not what stood there, fill what it leaves: 0 * NaN is
    # NaN.
    token = start + torch.arange(num_chunks * chunk_size, device=k.device)  # [B, C * chunk_size]
    inside = (token < stop).view(batch, 1, num_chunks, chunk_size, 1)
    index = token.clamp(max=max(num_tokens - 1, 0)).view(batch, 1, -1, 1)
    q, k = (
        x.to(compute).gather(2, index.expand(-1, x.shape[1], -1, head_dim)).unflatten(2, (num_chunks, chunk_size))
        for x in (q, k)
    )
    q = q.masked_fill(~inside, 0.0).unflatten(1, (kv_heads, heads // kv_heads))  # [B, G, H/G, C, chunk_size, D]
    k = k.masked_fill(~inside, 0.0)  # [B, G, C, chunk_size, D]

    logits = scale * torch.einsum("bghcid,bgcjd->bghcij", q, k)
    keys, queries = (
        inside.squeeze(-1)[:, :, None, :, None],
        inside[:, :, None],
    )  # [B, 1, 1, C, 1, chunk_size] and transposed
    p = logits.masked_fill(~keys, float("-inf")).softmax(-1).masked_fill(~queries, 0.0)
    sums = p.sum(-2).mean(2).flatten(2)  # [B, G, C * chunk_size]

    i = torch.arange(num_tokens, device=k.device)
    real = ((i >= start) & (i < stop)).unsqueeze(1)  # [B, 1, N]
    place = (i - start).clamp(min=0).unsqueeze(1).expand(-1, kv_heads, -1)
    return sums.gather(2, place).masked_fill(~real, float("-inf"))
