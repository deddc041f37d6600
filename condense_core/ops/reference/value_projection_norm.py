"""Specification of `value_projection_norm`: what a value can add to the output.

Public function: `condense_core.ops.value_projection_norm`. Kernels: kernels/value_projection_norm.py,
csrc/cpu/kernels/value_projection_norm.h.

Shapes: B sequences, G key-value heads, N cached tokens, D head_dim, H query heads, d_model the width of the model.
"""

import torch
from torch import Tensor

from condense_core.ops.reference.padding import accumulation_dtype, force_scores


def value_projection_norm(
    v: Tensor,  # [B, G, N, D]
    w_o: Tensor,  # [d_model, H*D], the weight of the output projection
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """The mean over the query heads h of a group of `||W_h v_i||_1`, `[B, G, N]` fp32. CriticalKV, arXiv 2502.03805.

    `W_h = w_o[:, h*D:(h+1)*D]` is the part of the output projection that reads query head h, and the query heads
    g*H/G to (g+1)*H/G - 1 share the values of head g. Padding scores -inf.
    """
    batch, heads, tokens, head_dim = v.shape
    compute = accumulation_dtype(v)
    norms = v.new_zeros(batch, heads, tokens, dtype=compute)
    per_head = w_o.to(compute).unflatten(1, (heads, -1, head_dim))  # [d_model, G, H/G, D]
    for w in per_head.unbind(2):  # one head of every group at a time: [B, G, N, d_model] is large enough
        norms += torch.einsum("bgnd,mgd->bgnm", v.to(compute), w).abs().sum(-1)
    return force_scores(norms / per_head.shape[2], 0, 0, bounds)
