"""Specification of `attention_pool`: attention of one query per head over the tokens of a window.

Public function: `condense_core.ops.attention_pool`. Kernels: kernels/attention_pool.py,
csrc/cpu/kernels/attention_pool.h, csrc/cuda/attention_pool.cu.

Shapes: T tokens of S sequences, packed without padding; K rows of the result; d the width of the model, H heads of d/H
columns.
"""

from typing import Any

from torch import Tensor

from condense_core.ops.reference.norm import rms_norm
from condense_core.ops.reference.padding import accumulation_dtype
from condense_core.ops.reference.windows import gather_windows, window_tokens


def attention_pool_with_lse(
    x: Tensor,  # [T, d]
    q: Tensor,  # [H, d/H] the same for every window, or [K, H, d/H]
    ratio: int,
    cu_seqlens: Tensor | None = None,  # [S+1]; None: one sequence
    halo: int = 0,
    scale: float | None = None,  # default 1/sqrt(d/H)
    norm_weight: Tensor | None = None,  # [d]; None: ones
    window_bias: Tensor | None = None,  # [H, ratio + 2*halo]; None: zeros
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Pool every window of `ratio` tokens into one row: `[T, d] -> [K, d]` in x's dtype.

    With r = rms_norm(x), and head h owning the columns r_h of width d/H, row j is for every head

        out[j, h] = sum_i p[j, h, i] r_h[i], where p[j, h] = softmax_i(scale * <q[j, h], r_h[i]> + window_bias[h, i])

    over the tokens i of window j. Window j of a sequence covers its tokens [j*ratio - halo, (j+1)*ratio + halo),
    clipped to the sequence; the bias counts places from j*ratio - halo, clipped or not. The second result is the
    log-sum-exp of the logits, `[K, H]`.
    """
    compute = accumulation_dtype(x)
    heads, head_dim = q.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    r = rms_norm(x.to(compute), norm_weight, eps)  # [T, d]

    index, places = window_tokens(len(x), ratio, cu_seqlens, halo)
    tokens = gather_windows(r, index).unflatten(-1, (heads, head_dim))  # [K, W, H, d/H]
    logits = window_logits(tokens, q.to(compute), scale, window_bias, index, places)  # [K, W, H]
    p = logits.softmax(dim=1)
    out = (p.unsqueeze(-1) * tokens).sum(1).flatten(-2).to(x.dtype)
    return out, logits.logsumexp(1)


def attention_pool(x: Tensor, q: Tensor, **options: Any) -> Tensor:
    """`attention_pool_with_lse` without the log-sum-exp."""
    return attention_pool_with_lse(x, q, **options)[0]


def window_logits(
    tokens: Tensor,  # [K, W, H, d/H]
    q: Tensor,  # [H, d/H] or [K, H, d/H]
    scale: float,
    window_bias: Tensor | None,  # [H, ratio + 2*halo]
    index: Tensor,  # [K, W], from window_tokens
    places: slice,
) -> Tensor:
    """The logits `[K, W, H]` of `attention_pool`, -inf outside the sequence."""
    logits = scale * (tokens * q.unsqueeze(-3)).sum(-1)
    if window_bias is not None:
        logits = logits + window_bias[:, places].to(q.dtype).t()
    return logits.masked_fill((index < 0).unsqueeze(-1).to(logits.device), float("-inf"))
