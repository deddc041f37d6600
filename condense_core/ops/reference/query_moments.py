"""Specification of `query_moments`: a normal model of the queries to come.

Public function: `condense_core.ops.query_moments`. Kernels: kernels/query_moments.py, csrc/cpu/kernels/query_moments.h.

Shapes: B sequences, H query heads, N tokens, D head_dim.
"""

from torch import Tensor

from condense_core.ops.reference.padding import accumulation_dtype, scored_tokens
from condense_core.ops.reference.rotation import rotate_half


def query_moments(
    q: Tensor,  # [B, H, N, D]
    cos: Tensor | None = None,  # [B or 1, N, D], the rotation that q has been through; None: none
    sin: Tensor | None = None,  # [B or 1, N, D]
    sink: int = 4,
    bounds: Tensor | None = None,  # [B, 2]; None: every token is real
) -> tuple[Tensor, Tensor]:
    """Mean `[B, H, D]` and covariance `[B, H, D, D]`, in fp32, of each head's queries before their rotation.

    RoPE made `q = p * cos + rotate_half(p) * sin`, with both halves of cos and of sin alike. Its inverse is taken
    exactly, also where cos and sin are rounded or carry a factor, as YaRN's do:

        p = (q * cos - rotate_half(q) * sin) / (cos^2 + sin^2)

    Over the n real tokens after the first `sink` real ones, which are outliers, `mu = sum p_i / n` and
    `cov = sum (p_i - mu)(p_i - mu)^T / n`; zeros where n is 0. Devoto et al., arXiv 2510.00636, eq. 6.
    """
    p = q.to(accumulation_dtype(q))
    if cos is not None and sin is not None:
        cos, sin = cos.to(p.dtype).unsqueeze(1), sin.to(p.dtype).unsqueeze(1)  # [B or 1, 1, N, D]
        p = (p * cos - rotate_half(p) * sin) / (cos.square() + sin.square())
    scored = scored_tokens(q, sink, bounds)[:, None, :, None]  # [B, 1, N, 1]
    count = scored.sum(2).clamp(min=1)  # [B, 1, 1]
    mu = p.masked_fill(~scored, 0.0).sum(2) / count
    centred = (p - mu.unsqueeze(2)).masked_fill(~scored, 0.0)
    return mu, centred.mT @ centred / count.unsqueeze(-1)
