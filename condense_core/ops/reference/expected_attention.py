"""Specification of `expected_attention`: the attention that a key may expect of the queries to come.

Public function: `condense_core.ops.expected_attention`. Kernels: kernels/expected_attention.py,
csrc/cpu/kernels/expected_attention.h.

Shapes: B sequences, G key-value heads, N cached tokens, D head_dim, H query heads; query head h reads key-value head h
// (H/G).
"""

from torch import Tensor

from condense_core.ops.reference.padding import accumulation_dtype, scored_tokens
from condense_core.ops.reference.rotation import rotate_half


def expected_attention(
    k: Tensor,  # [B, G, N, D], as cached, after RoPE
    v: Tensor | None,  # [B, G, N, D]; None: no rescaling
    mu: Tensor,  # [B, H, D]
    cov: Tensor | None = None,  # [B, H, D, D]; None: zeros
    mean_cos: Tensor | None = None,  # [D], mean of cos over the positions to come; None: no rotation
    mean_sin: Tensor | None = None,  # [D]
    scale: float | None = None,  # default 1/sqrt(D)
    epsilon: float = 0.0,
    sink: int = 4,
    bounds: Tensor | None = None,  # [B, 2]; None: every token is real
) -> Tensor:
    """Scores `[B, G, N]` in fp32: the attention that a token may expect, times the norm of its value.

    A query to come is normal with mean mu and covariance cov before its rotation, and the mean rotation of the
    positions to come is `R = diag(mean_cos) + diag(mean_sin) P`, where `P x = rotate_half(x)`. Then `E[exp(scale q.k)]`
    has the logarithm

        logits[h, i] = scale * k_i^T R mu_h + 0.5 * scale^2 * k_i^T R cov_h R^T k_i

    and the score is `(mean_h softmax_i(logits[h]) + epsilon) * ||v_i||_2`, the mean over the query heads h of the
    key-value head and the softmax over the real tokens after the first `sink`. Without v the score is the mean of the
    softmax. The first `sink` real tokens score +inf, padding -inf.

    Devoto et al., arXiv 2510.00636, eq. 8 and 9; kvpress 0.5.5.
    """
    compute = accumulation_dtype(k)
    kv_heads, head_dim = k.shape[1], k.shape[3]
    scale = head_dim**-0.5 if scale is None else scale
    turned = k.to(compute)  # R^T k: the rotation moves from mu and cov to the keys
    if mean_cos is not None and mean_sin is not None:
        # P is antisymmetric: R^T = diag(mean_cos) - P diag(mean_sin).
        turned = turned * mean_cos.to(compute) - rotate_half(turned * mean_sin.to(compute))
    turned = turned.unsqueeze(2)  # [B, G, 1, N, D]
    mu = mu.to(compute).unflatten(1, (kv_heads, -1))  # [B, G, H/G, D]
    logits = scale * (turned @ mu.unsqueeze(-1)).squeeze(-1)  # [B, G, H/G, N]
    if cov is not None:
        cov = cov.to(compute).unflatten(1, (kv_heads, -1))  # [B, G, H/G, D, D]
        logits = logits + 0.5 * scale**2 * (turned @ cov * turned).sum(-1)

    scored = scored_tokens(k, sink, bounds).unsqueeze(1)  # [B, 1, N]
    scores = logits.masked_fill(~scored.unsqueeze(2), float("-inf")).softmax(-1).mean(2)  # [B, G, N]
    if v is not None:
        scores = (scores + epsilon) * v.to(compute).norm(dim=-1)
    forced = scored_tokens(k, 0, bounds).unsqueeze(1) & ~scored
    padding = ~(forced | scored)
    return scores.masked_fill(forced, float("inf")).masked_fill(padding, float("-inf"))
