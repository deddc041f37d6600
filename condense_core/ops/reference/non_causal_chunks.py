"""Specification of `non_causal_chunks`: the attention that a key gets from the queries of its chunk.

Public function: `condense_core.ops.non_causal_chunks`. Kernels: kernels/non_causal_chunks.py,
csrc/cpu/kernels/non_causal_chunks.h.

Shapes: B sequences, G key-value heads, N cached tokens, D head_dim, H query heads.
"""

import torch
from torch import Tensor

from condense_core.ops.reference.padding import accumulation_dtype, real_tokens


def non_causal_chunks(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, G, N, D]
    chunk_size: int = 256,
    scale: float | None = None,  # default 1/sqrt(D)
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """Attention that every key gets from the queries of its own chunk, later ones too: `[B, G, N]`.

    Chunk c of a sequence holds its tokens [start + c * chunk_size, start + (c + 1) * chunk_size), clipped at `stop`.
    With p[h, i] the softmax over the keys j of i's chunk of `scale * <q[h, i], k[j]>`, the score of key j is the sum of
    p[h, i, j] over the queries i of its chunk, averaged over the query heads of the group. Padding scores -inf.

    The attention part of Compactor, arXiv 2507.08143.
    """
    compute = accumulation_dtype(k)
    (batch, heads, num_tokens, head_dim), kv_heads = q.shape, k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    start, stop = real_tokens(bounds, batch, num_tokens, k.device)  # [B, 1] each
    chunk_size = min(chunk_size, max(num_tokens, 1))  # a wider chunk sees no more
    num_chunks = -(-num_tokens // chunk_size)

    # Every sequence moves to the front of whole chunks. What it leaves is filled with zeros: 0 * NaN would be NaN.
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
    real_key = inside.squeeze(-1)[:, :, None, :, None]  # [B, 1, 1, C, 1, chunk_size]
    real_query = inside[:, :, None]  # [B, 1, 1, C, chunk_size, 1]
    p = logits.masked_fill(~real_key, float("-inf")).softmax(-1).masked_fill(~real_query, 0.0)
    sums = p.sum(-2).mean(2).flatten(2)  # [B, G, C * chunk_size]

    i = torch.arange(num_tokens, device=k.device)
    real = ((i >= start) & (i < stop)).unsqueeze(1)  # [B, 1, N]
    place = (i - start).clamp(min=0).unsqueeze(1).expand(-1, kv_heads, -1)
    return sums.gather(2, place).masked_fill(~real, float("-inf"))
