"""Specification of `cross_pool`: attention of every query over all tokens of its sequence.

Public function: `condense_core.ops.cross_pool`. Kernels: kernels/cross_pool.py, csrc/cpu/kernels/cross_pool.h.

Shapes: T tokens of S sequences, packed without padding; K rows of the result; d the width of the model, H heads of d/H
columns.
"""

from typing import Any

import torch
from torch import Tensor

from condense_core.ops.reference.norm import rms_norm
from condense_core.ops.reference.padding import accumulation_dtype


def cross_pool_with_lse(
    x: Tensor,  # [T, d]
    q: Tensor,  # [K, H, d/H]
    cu_seqlens: Tensor | None = None,  # [S+1]; None: one sequence
    cu_queries: Tensor | None = None,  # [S+1]; None: all queries belong to the only sequence
    scale: float | None = None,  # default 1/sqrt(d/H)
    norm_weight: Tensor | None = None,  # [d]; None: ones
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Let every query attend over all tokens of its sequence: `[T, d]` and `[K, H, d/H]` -> `[K, d]`.

    With r = rms_norm(x), and head h owning the columns r_h of width d/H,

        out[j, h] = sum_i p[j, h, i] r_h[i], where p[j, h] = softmax_i(scale * <q[j, h], r_h[i]>)

    over the tokens i of the sequence that query j belongs to; zeros if that sequence is empty. The second result is the
    log-sum-exp of the logits, `[K, H]`, -inf for an empty sequence.
    """
    compute = accumulation_dtype(x)
    heads, head_dim = q.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    r = rms_norm(x.to(compute), norm_weight, eps).unflatten(-1, (heads, head_dim))  # [T, H, d/H]

    token_ends = [0, len(x)] if cu_seqlens is None else cu_seqlens.tolist()
    query_ends = [0, len(q)] if cu_queries is None else cu_queries.tolist()
    rows, lses = [r.new_zeros(0, heads, head_dim)], [r.new_zeros(0, heads)]
    for s in range(len(token_ends) - 1):
        r_s = r[token_ends[s] : token_ends[s + 1]]  # [N, H, d/H]
        q_s = q[query_ends[s] : query_ends[s + 1]].to(compute)
        logits = torch.einsum("khd,nhd->khn", scale * q_s, r_s)
        rows.append(torch.einsum("khn,nhd->khd", logits.softmax(-1), r_s))  # an empty sum, zeros, when N = 0
        lses.append(logits.logsumexp(-1))
    out = torch.cat(rows).flatten(-2).to(x.dtype)
    return out, torch.cat(lses)


def cross_pool(x: Tensor, q: Tensor, **options: Any) -> Tensor:
    """`cross_pool_with_lse` without the log-sum-exp."""
    return cross_pool_with_lse(x, q, **options)[0]
