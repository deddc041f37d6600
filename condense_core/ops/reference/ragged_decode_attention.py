"""Specification of `ragged_decode_attention`: one decode step over heads that kept different numbers of tokens.

Public function: `condense_core.ops.ragged_decode_attention`. Kernels: kernels/ragged_decode_attention.py,
csrc/cpu/kernels/ragged_decode_attention.h.

Shapes: B sequences, H query heads, G key-value heads, D head_dim, T rows of all B*G heads one after another.
"""

import torch
from torch import Tensor

from condense_core.ops.reference.padding import accumulation_dtype


def ragged_decode_attention(
    q: Tensor,  # [B, H, D]
    k: Tensor,  # [T, D]
    v: Tensor,  # [T, D]
    cu_seqlens: Tensor,  # [B*G+1]
    lengths: Tensor | None = None,  # [B*G]; None: every row of a head is valid
    scale: float | None = None,  # default 1/sqrt(D)
) -> Tensor:
    """Attention of one query per head over the rows that its KV head kept: `[B, H, D]` in q's dtype.

    Key-value head g of sequence b is head n = b*G + g and owns the rows from cu_seqlens[n] to cu_seqlens[n+1], of which
    the first lengths[n] are valid. For each of the H/G query heads h that share it,

        out[b, h] = sum_i softmax_i(scale * <q[b, h], k[i]>) v[i]

    over the valid rows i; zeros where there is none. Offsets are clamped: start = min(max(cu_seqlens[n], 0), T),
    stop = min(max(cu_seqlens[n+1], start), T).
    """
    compute = accumulation_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = scale * q.to(compute).reshape(len(cu_seqlens) - 1, -1, q.shape[-1])  # [B*G, H/G, D]
    offsets = cu_seqlens.tolist()
    valid = [len(k)] * len(queries) if lengths is None else lengths.tolist()
    out = torch.empty_like(queries)
    for n in range(len(queries)):
        start = min(max(offsets[n], 0), len(k))
        stop = min(max(offsets[n + 1], start), len(k), start + max(valid[n], 0))
        logits = queries[n] @ k[start:stop].to(compute).t()  # [H/G, rows]
        out[n] = logits.softmax(-1) @ v[start:stop].to(compute)  # an empty sum, zeros, without a row
    return out.view(q.shape).to(q.dtype)
