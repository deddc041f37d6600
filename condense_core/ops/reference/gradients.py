"""The pooling ops as a backend runs them, forward and backward apart: the specification of the gradients.

Written out rather than left to autograd, which a dispatch mode around the call (a profiler, a tracer) switches off. The
tests hold them against autograd of `pooling`.
"""

import torch
from torch import Tensor

from condense_core.ops.reference import pooling


def attention_pool(
    x: Tensor,
    q: Tensor,
    ratio: int,
    cu_seqlens: Tensor | None,
    halo: int,
    scale: float,
    norm_weight: Tensor | None,
    window_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output `[K, d]` and log-sum-exp `[K, heads]` fp32 of `pooling.attention_pool`."""
    return pooling.attention_pool_with_lse(
        x,
        q,
        ratio=ratio,
        cu_seqlens=cu_seqlens,
        halo=halo,
        scale=scale,
        norm_weight=norm_weight,
        window_bias=window_bias,
        eps=eps,
    )


def attention_pool_backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    ratio: int,
    cu_seqlens: Tensor | None,
    halo: int,
    scale: float,
    norm_weight: Tensor | None,
    window_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, q, norm_weight and window_bias; an empty tensor for one that is None.

    With r = rms_norm(x), p as in `pooling.attention_pool` and g the gradient of out: `dp = <g, r>`,
    `ds = p * (dp - sum(p * dp))`, `dr = p g + scale ds q`, `dq = scale ds r`, `dbias = ds`, summed over windows.
    """
    heads, head_dim = q.shape[-2:]
    r = pooling.rms_norm(x.float(), norm_weight, eps)  # [T, d]
    index, places = pooling.window_tokens(len(x), ratio, cu_seqlens, halo)
    tokens = pooling.gather_windows(r, index).unflatten(-1, (heads, head_dim))  # [K, W, H, d/H]
    logits = pooling.window_logits(tokens, q.float(), scale, window_bias, index, places)
    p = logits.softmax(1)  # [K, W, H]
    g = grad.float().unflatten(-1, (heads, head_dim)).unsqueeze(1)  # [K, 1, H, d/H]
    dp = (g * tokens).sum(-1)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))  # [K, W, H]
    dtokens = p.unsqueeze(-1) * g + scale * ds.unsqueeze(-1) * q.float().unsqueeze(-3)
    inside = index.flatten() >= 0
    dr = torch.zeros_like(r)
    dr.index_add_(0, index.flatten()[inside].to(x.device), dtokens.flatten(2).flatten(0, 1)[inside.to(x.device)])
    dq = scale * (ds.unsqueeze(-1) * tokens).sum(1)  # [K, H, d/H]
    dx, dw = _rms_norm_backward(dr, x, norm_weight, eps)
    dbias = grad.new_empty(0)
    if window_bias is not None:
        dbias = torch.zeros_like(window_bias)
        dbias[:, places] = ds.sum(0).t().to(dbias.dtype)
    return dx, (dq if q.dim() == 3 else dq.sum(0)).to(q.dtype), dw, dbias


def cross_pool(
    x: Tensor,
    q: Tensor,
    cu_seqlens: Tensor | None,
    cu_queries: Tensor | None,
    scale: float,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output `[K, d]` and log-sum-exp `[K, heads]` fp32 of `pooling.cross_pool`."""
    return pooling.cross_pool_with_lse(
        x, q, cu_seqlens=cu_seqlens, cu_queries=cu_queries, scale=scale, norm_weight=norm_weight, eps=eps
    )


def cross_pool_backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_queries: Tensor | None,
    scale: float,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, q and norm_weight; an empty tensor where norm_weight is None. As for `attention_pool`."""
    heads, head_dim = q.shape[-2:]
    r = pooling.rms_norm(x.float(), norm_weight, eps).unflatten(-1, (heads, head_dim))  # [T, H, d/H]
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
    dx, dw = _rms_norm_backward(dr.flatten(1), x, norm_weight, eps)
    return dx, dq.to(q.dtype), dw


def _rms_norm_backward(dr: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty if None) for `r = rms_norm(x)`, dr `[T, d]` in fp32."""
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    normed = x.float() * rstd
    da = dr if weight is None else dr * weight.float()
    dx = rstd * (da - normed * (da * normed).mean(-1, keepdim=True))
    dw = dr.new_empty(0) if weight is None else (dr * normed).sum(0).to(weight.dtype)
    return dx.to(x.dtype), dw
