"""Specification of `attention_pool_backward`: the gradients of `attention_pool`.

Registered in condense_core/ops/attention_pool.py. Kernels: kernels/attention_pool_backward.py,
csrc/cpu/kernels/attention_pool_backward.h.

Written out rather than left to autograd, which a dispatch mode around the call (a profiler, a tracer) switches off. The
tests hold it against autograd of the forward function.
"""

import torch
from torch import Tensor

from condense_core.ops.reference.attention_pool import window_logits
from condense_core.ops.reference.norm import rms_norm, rms_norm_backward
from condense_core.ops.reference.windows import gather_windows, window_tokens


def attention_pool_backward(
    grad: Tensor,  # [K, d]
    x: Tensor,  # [T, d]
    q: Tensor,  # [H, d/H] or [K, H, d/H]
    out: Tensor,  # [K, d]; kernels need it, this function does not
    lse: Tensor,  # [K, H], likewise
    ratio: int,
    cu_seqlens: Tensor | None,
    halo: int,
    scale: float,
    norm_weight: Tensor | None,
    window_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, q, norm_weight and window_bias; an empty tensor for one that is None.

    With r = rms_norm(x), p as in `attention_pool` and g the gradient of out:

        dp = <g, r>,  ds = p * (dp - sum(p * dp)),  dr = p g + scale ds q,  dq = scale ds r,  dbias = ds

    summed over the windows.
    """
    heads, head_dim = q.shape[-2:]
    r = rms_norm(x.float(), norm_weight, eps)  # [T, d]
    index, places = window_tokens(len(x), ratio, cu_seqlens, halo)
    tokens = gather_windows(r, index).unflatten(-1, (heads, head_dim))  # [K, W, H, d/H]
    logits = window_logits(tokens, q.float(), scale, window_bias, index, places)
    p = logits.softmax(1)  # [K, W, H]
    g = grad.float().unflatten(-1, (heads, head_dim)).unsqueeze(1)  # [K, 1, H, d/H]
    dp = (g * tokens).sum(-1)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))  # [K, W, H]
    dtokens = p.unsqueeze(-1) * g + scale * ds.unsqueeze(-1) * q.float().unsqueeze(-3)
    inside = index.flatten() >= 0
    dr = torch.zeros_like(r)
    dr.index_add_(0, index.flatten()[inside].to(x.device), dtokens.flatten(2).flatten(0, 1)[inside.to(x.device)])
    dq = scale * (ds.unsqueeze(-1) * tokens).sum(1)  # [K, H, d/H]
    dx, dw = rms_norm_backward(dr, x, norm_weight, eps)
    dbias = grad.new_empty(0)
    if window_bias is not None:
        dbias = torch.zeros_like(window_bias)
        dbias[:, places] = ds.sum(0).t().to(dbias.dtype)
    return dx, (dq if q.dim() == 3 else dq.sum(0)).to(q.dtype), dw, dbias
