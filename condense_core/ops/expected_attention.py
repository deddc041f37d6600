"""`expected_attention`: the attention that a key may expect of the queries to come.

Specification: condense_core/ops/reference/expected_attention.py. Kernels: kernels/expected_attention.py,
csrc/cpu/kernels/expected_attention.h.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import ExpectedAttentionArgs
from condense_core.ops.library import define


def expected_attention(
    k: Tensor,
    v: Tensor | None,
    mu: Tensor,
    cov: Tensor | None = None,
    *,
    mean_cos: Tensor | None = None,
    mean_sin: Tensor | None = None,
    scale: float | None = None,
    sink: int = 4,
    epsilon: float = 0.0,
    bounds: Tensor | None = None,
) -> Tensor:
    """Score each token by the attention that queries to come will pay it, times the norm of its value.

    With `R = diag(mean_cos) + diag(mean_sin) P`, `P x = rotate_half(x)`, and h over the H/G query heads of a key-value
    head,

        logits[h, i] = scale * k_i^T R mu_h + 0.5 * scale^2 * k_i^T R cov_h R^T k_i
        score_i = (mean_h softmax_i(logits[h]) + epsilon) * ||v_i||_2

    with the softmax over the real tokens after the sinks. In kernels the products with cov round both operands to TF32
    where k has 16 bits; k itself is no more exact.

    Args:
        k: `[B, G, N, D]` float32, bfloat16 or float16, any strides: the keys as cached, after RoPE. N may be 0.
        v: of k's shape, dtype and device, or None: the score is then `mean_h softmax_i(logits[h])`.
        mu: `[B, H, D]` float32 on k's device, H a multiple of G: mean query before RoPE, as `query_moments` returns it.
        cov: `[B, H, D, D]` float32 likewise, or None for zeros.
        mean_cos: `[D]`, a float dtype: mean of the rotary embedding's cos over the positions to come (`cos.mean(0)`),
            not rounded to 16 bits if it can be avoided. None: queries are not rotated.
        mean_sin: likewise; given exactly when mean_cos is.
        scale: factor of attention's logits; None for `1 / sqrt(D)`.
        sink: real tokens at the start of each sequence that are always kept, >= 0.
        epsilon: added to the expected attention before the norm of v multiplies it, >= 0.
        bounds: `[B, 2]` int32 or int64 on k's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others score -inf. None: all are real.

    Returns:
        `[B, G, N]` float32, higher is to be kept: +inf for the sinks, -inf for padding.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Devoto, Jeblick and Jégou, Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution, arXiv 2510.00636; `ExpectedAttentionPress` of kvpress 0.5.5.
    """
    checks.check_cache("k", k)
    if v is not None:
        checks.check_cache("v", v, ("k", k))
    batch, kv_heads, num_tokens, head_dim = k.shape
    checks.check_floats("mu", mu, (torch.float32,), ("k", k))
    if mu.dim() != 3 or mu.shape[0] != batch or mu.shape[2] != head_dim:
        raise ValueError(f"mu has shape {list(mu.shape)}, expected [B, H, D] with B = {batch}, D = {head_dim}")
    heads = mu.shape[1]
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"mu has {heads} heads (shape {list(mu.shape)}), expected a multiple of k's {kv_heads}")
    if cov is not None:
        checks.check_floats("cov", cov, (torch.float32,), ("k", k))
        checks.check_shape("cov", cov, "[B, H, D, D]", (batch, heads, head_dim, head_dim))
    checks.check_rotation("mean_cos", mean_cos, "mean_sin", mean_sin, head_dim)
    for name, tensor in (("mean_cos", mean_cos), ("mean_sin", mean_sin)):
        if tensor is not None:
            checks.check_floats(name, tensor, checks.DTYPES, ("k", k))
            checks.check_shape(name, tensor, "[D]", (head_dim,))
    checks.check_scale(scale)
    checks.check_int("sink", sink, minimum=0)
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real):
        raise TypeError(f"epsilon is {epsilon!r} ({type(epsilon).__name__}), expected a number")
    if not 0 <= float(epsilon) < math.inf:
        raise ValueError(f"epsilon is {epsilon}, expected a finite number >= 0")
    checks.check_bounds(bounds, k)
    scale = head_dim**-0.5 if scale is None else float(scale)
    scores: Tensor = _expected_attention(
        k, v, mu, cov, mean_cos, mean_sin, scale, float(epsilon), min(sink, num_tokens), bounds
    )
    return scores


def _fake(args: ExpectedAttentionArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


_expected_attention = define("expected_attention", ExpectedAttentionArgs, "Tensor", fake=_fake)
