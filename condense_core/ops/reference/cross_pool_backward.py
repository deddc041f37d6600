"""Specification of `cross_pool_backward`: the gradients of `cross_pool`.

Registered in condense_core/ops/cross_pool.py. Kernels: kernels/cross_pool_backward.py.

Written out rather than left to autograd, which a dispatch mode around the call (a profiler, a tracer) switches off. The
tests hold it against autograd of the forward function.
"""

import torch
from torch import Tensor

from condense_core.ops.reference.norm import rms_norm, rms_norm_backward


def cross_pool_backward(
    grad: Tensor,  # [K, d]
    x: Tensor,  # [T, d]
    q: Tensor,  # [K, H, d/H]
    out: Tensor,  # [K, d]; kernels need it, this function does not
    lse: Tensor,  # [K, H], likewise
    cu_seqlens: Tensor | None,
    cu_queries: Tensor | None,
    scale: float,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, q and norm_weight; an empty tensor where norm_weight is None.

    With r = rms_norm(x), p as in `cross_pool` and g the gradient of out:

        dp = <g, r>,  ds = p * (dp - sum(p * dp)),  dr = p g + scale ds q,  dq = scale ds r

    summed over the queries of a sequence for dr, over its tokens for dq.
    """
    heads, head_dim = q.shape[-2:]
    r = rms_norm(x.float(), norm_weight, eps).unflatten(-1, (heads, head_dim))  # [T, H, d/H]
    g = grad.float().unflatten(-1, (heads, head_dim))  # [K, H, d/H]
    token_ends = [0, len(x)] if cu_seqlens is None else cu_seqlens.tolist()
    query_ends = [0, len(q)] if cu_queries is None else cu_queries.tolist()
    dr, dq = torch.zeros_like(r), torch.zeros_like(q, dtype=torch.float32)
    for s in range(len(token_ends) - 1):
        tokens, queries = slice(*token_ends[s : s + 2]), slice(*query_ends[s : s + 2])
        q_s = scale * q[queries].float()
        p = torch.einsum("khd,nhd->khn", q_s, r[tokens]).softmax(-1)
        dp = torch.einsum("khd,nhd->khn", g[queries], r[tokens])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dr[tokens] = torch.einsum("khn,khd->nhd", p, g[queries]) + torch.einsum("khn,khd->nhd", ds, q_s)
        dq[queries] = scale * torch.einsum("khn,nhd->khd", ds, r[tokens])
    dx, dw = rms_norm_backward(dr.flatten(1), x, norm_weight, eps)
    return dx, dq.to(q.dtype), dw
