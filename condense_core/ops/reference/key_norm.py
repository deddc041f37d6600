"""Specification of `key_norm`: keys of small norm draw attention.

Public function: `condense_core.ops.key_norm`. Kernels: kernels/key_norm.py, csrc/cpu/kernels/key_norm.h.

Shapes: B sequences, G key-value heads, N cached tokens, D head_dim.
"""

from torch import Tensor

from condense_core.ops.reference.padding import accumulation_dtype, force_scores


def key_norm(
    k: Tensor,  # [B, G, N, D]
    sink: int = 0,
    window: int = 0,
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """`-||k_i||_2`, `[B, G, N]` fp32. Devoto et al., arXiv 2406.11430.

    The first `sink` and the last `window` real tokens of a sequence score +inf, padding -inf.
    """
    scores = -k.to(accumulation_dtype(k)).norm(dim=-1)
    return force_scores(scores, sink, window, bounds)
