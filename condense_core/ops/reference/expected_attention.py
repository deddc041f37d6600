"""Expected attention: a normal model of the queries to come, and what attention a key may expect of them.

Shapes: B sequences, H query heads, G KV heads, N tokens, D head_dim. Query head h reads KV head h // (H/G). Of sequence
b the tokens `bounds[b, 0] <= i < bounds[b, 1]` are real, the others padding.
"""

import torch
from torch import Tensor

from condense_core.ops.reference.padding import accumulation_dtype, real_tokens


def query_moments(
    q: Tensor,  # [B, H, N, D]
    cos: Tensor | None = None,  # [B or 1, N, D], the rotation that q has been through; None: none
    sin: Tensor | None = None,  # [B or 1, N, D]
    sink: int = 4,
    bounds: Tensor | None = None,  # [B, 2]; None: every token is real
) -> tuple[Tensor, Tensor]:
    """Mean `[B, H, D]` and covariance `[B, H, D, D]`, in fp32, of each head's queries before their rotation.

    RoPE made `q = p * cos + rotate_half(p) * sin`, with both halves of cos and of sin alike. Its inverse is taken
    exactly, also where cos and sin are rounded or carry a factor, as YaRN's do: `p = (q * cos - rotate_half(q) * sin) /
    (cos^2 + sin^2)`. Over the n real tokens after the first `sink` real ones: `mu = sum p_i / n`, `cov = sum (p_i -
    mu)(p_i - mu)^T / n`; zeros where n is 0. Devoto et al., Expected Attention, arXiv 2510.00636, eq. 6; the first
    tokens are outliers and left out.
    """
    p = q.to(accumulation_dtype(q))
    if cos is not None and sin is not None:
        cos, sin = cos.to(p.dtype).unsqueeze(1), sin.to(p.dtype).unsqueeze(1)  # [B or 1, 1, N, D]
        p = (p * cos - rotate_half(p) * sin) / (cos.square() + sin.square())
    scored = _scored(q, sink, bounds)[:, None, :, None]  # [B, 1, N, 1]
    count = scored.sum(2).clamp(min=1)  # [B, 1, 1]
    mu = p.masked_fill(~scored, 0.0).sum(2) / count
    centred = (p - mu.unsqueeze(2)).masked_fill(~scored, 0.0)
    return mu, centred.mT @ centred / count.unsqueeze(-1)


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

        logits[h, i] = scale * k_i^T R mu_h + 0.5 * scale^2 * k_i^T R cov_h R^T k_i,

    and `score_i = (mean_h softmax_i(logits[h]) + epsilon) * ||v_i||_2`, the mean over the query heads h of the KV head
    and the softmax over the real tokens after the first `sink`. Those first tokens score +inf, padding -inf. Without v
    the score is the mean of the softmax. Devoto et al., Expected Attention, arXiv 2510.00636, eq. 8 and 9; kvpress
    0.5.5.
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

    scored = _scored(k, sink, bounds).unsqueeze(1)  # [B, 1, N]
    scores = logits.masked_fill(~scored.unsqueeze(2), float("-inf")).softmax(-1).mean(2)  # [B, G, N]
    if v is not None:
        scores = (scores + epsilon) * v.to(compute).norm(dim=-1)
    forced = _scored(k, 0, bounds).unsqueeze(1) & ~scored
    padding = ~(forced | scored)
    return scores.masked_fill(forced, float("inf")).masked_fill(padding, float("-inf"))


def rotate_half(x: Tensor) -> Tensor:
    """`P x` of the rotary embedding whose pairs are the two halves: `(x1, x2) -> (-x2, x1)` over the last dimension."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


def _scored(x: Tensor, sink: int, bounds: Tensor | None) -> Tensor:
    """Which tokens of `x [B, _, N, _]` are real and not among the first `sink` real ones: `[B, N]`."""
    start, stop = real_tokens(bounds, x.shape[0], x.shape[2], x.device)
    token = torch.arange(x.shape[2], device=x.device)
    return (token >= start + sink) & (token < stop)
