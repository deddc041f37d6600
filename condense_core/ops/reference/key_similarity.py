"""Specification of `key_similarity`: keys that point elsewhere than the rest are distinctive.

Public function: `condense_core.ops.key_similarity`. Kernels: kernels/key_similarity.py,
csrc/cpu/kernels/key_similarity.h.

Shapes: B sequences, G key-value heads, N cached tokens, D head_dim.
"""

from torch import Tensor
from torch.nn import functional as F

from condense_core.ops.reference.padding import accumulation_dtype, force_scores, token_places


def key_similarity(
    k: Tensor,  # [B, G, N, D]
    sink: int = 0,
    window: int = 0,
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """`-cos(k_i, mean_j k_j / ||k_j||)` over the real tokens j of the sequence and head, `[B, G, N]` fp32.

    Norms are clamped from below as torch clamps them: to 1e-12 in the mean, to 1e-8 in the cosine. The first `sink` and
    the last `window` real tokens of a sequence score +inf, padding -inf. KeyDiff, arXiv 2504.15364.
    """
    place, length = token_places(k, bounds)  # [B, 1, N], [B, 1, 1]
    real = (place >= 0) & (place < length)
    x = k.to(accumulation_dtype(k)).masked_fill(~real.unsqueeze(-1), 0.0)
    mean = F.normalize(x, dim=-1).sum(2, keepdim=True) / length.clamp_min(1).unsqueeze(-1)  # [B, G, 1, D]
    return force_scores(-F.cosine_similarity(x, mean, dim=-1), sink, window, bounds)
