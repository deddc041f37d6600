"""The ops of the engine: tensors in, tensors out, one function per op over every backend.

The mathematics of an op is its function in `condense_core.ops.reference`; which backend runs it is decided
for every call by `condense_core.ops.registry` (`CONDENSE_BACKEND` overrides). The functions here check every
argument.
"""

from itertools import pairwise

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.reference import window_offsets as _window_offsets
from condense_core.ops.registry import REGISTRY

__all__ = ["attention_pool", "cross_pool", "num_windows", "window_offsets"]


def num_windows(num_tokens: int, ratio: int) -> int:
    """Windows, and so soft tokens, that `num_tokens` tokens make at `ratio`: ceil(num_tokens / ratio).

    Raises:
        TypeError, ValueError: `num_tokens` is not an int >= 0, or `ratio` not an int >= 1.
    """
    checks.check_int("num_tokens", num_tokens, minimum=0)
    checks.check_int("ratio", ratio, minimum=1)
    return -(-num_tokens // ratio)


def window_offsets(cu_seqlens: Tensor, ratio: int) -> Tensor:
    """Where the rows of each sequence stand in the output of `attention_pool`.

    Args:
        cu_seqlens: `[S+1]` int32 or int64, offsets of the packed sequences in tokens, ascending from 0.
        ratio: tokens per window, >= 1.

    Returns:
        `[S+1]` offsets in rows, of cu_seqlens' dtype and device: the rows of sequence s are
        `out[offsets[s]:offsets[s + 1]]`, none for an empty one, and `offsets[-1]` is K.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_int("ratio", ratio, minimum=1)
    num_tokens = checks.check_offsets("cu_seqlens", cu_seqlens)[-1]
    return _window_offsets(cu_seqlens, min(ratio, max(num_tokens, 1)))


def attention_pool(
    x: Tensor,
    q: Tensor,
    *,
    ratio: int,
    cu_seqlens: Tensor | None = None,
    halo: int = 0,
    heads: int | None = None,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    window_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Pool every window of `ratio` tokens into one row, by attention of one query per head over the window.

    Window j of a sequence covers its tokens `[j*ratio - halo, (j+1)*ratio + halo)`, clipped to the sequence;
    the last window may be short. With `r = x / sqrt(mean(x^2) + eps) * norm_weight` over the whole width, and
    head h owning its own d/heads columns r_h, `out[j, h] = sum_i p[j, h, i] r_h[i]`, where
    `p[j, h] = softmax_i(scale * <q[j, h], r_h[i]> + window_bias[h, i])`. `q = 0` without a bias is exactly
    mean pooling. Differentiable with respect to x, q, norm_weight and window_bias.

    Args:
        x: `[T, d]` float32, bfloat16 or float16: hidden states of S sequences, packed without padding.
        q: `[heads, d/heads]`, one query for all windows, or `[K, heads, d/heads]`, one each; on x's device.
        ratio: tokens per window, >= 1.
        cu_seqlens: `[S+1]` int32 or int64, ascending from 0 to T, on any device; None for a single sequence.
        halo: tokens that a window also sees on either side, >= 0.
        heads: None, or the number of heads that q must have.
        scale: factor on the logits; None for `1 / sqrt(d/heads)`.
        norm_weight: `[d]`, or None for ones.
        window_bias: `[heads, ratio + 2*halo]`, added to the logits by place in the window, counted from
            `j*ratio - halo` whether or not the sequence reaches there; None for zeros.
        eps: added to the mean square, > 0.

    Returns:
        `[K, d]` in x's dtype, K = sum over sequences of ceil(n_s / ratio); sums are accumulated in float32.
        `window_offsets(cu_seqlens, ratio)` tells which rows belong to which sequence.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_hidden_states(x)
    checks.check_queries(q, x, heads, ranks=(2, 3))
    checks.check_int("ratio", ratio, minimum=1)
    checks.check_int("halo", halo, minimum=0)
    checks.check_scale(scale)
    checks.check_norm_weight(norm_weight, x)
    checks.check_window_bias(window_bias, x, q.shape[-2], ratio + 2 * halo)
    checks.check_eps(eps)
    ends = [0, len(x)]
    if cu_seqlens is not None:
        ends = checks.check_offsets("cu_seqlens", cu_seqlens, len(x))
        cu_seqlens = cu_seqlens.to(device=x.device, dtype=torch.int64)
    if q.dim() == 3:
        rows = sum(-(-(stop - start) // ratio) for start, stop in pairwise(ends))
        checks.check_num_queries(q, rows, f"the windows of {len(ends) - 1} sequences, {len(x)} tokens")
    # Windows beyond the longest sequence say the same as windows of its length: no backend meets wider ones.
    longest = max([0, *(stop - start for start, stop in pairwise(ends))])
    width, reach = min(ratio, max(longest, 1)), min(halo, longest)
    if window_bias is not None:
        window_bias = window_bias[:, halo - reach : halo + width + reach]
    return REGISTRY.call(
        "attention_pool",
        x,
        q,
        ratio=width,
        halo=reach,
        cu_seqlens=cu_seqlens,
        heads=q.shape[-2],
        scale=scale,
        norm_weight=norm_weight,
        window_bias=window_bias,
        eps=eps,
    )


def cross_pool(
    x: Tensor,
    q: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    cu_queries: Tensor | None = None,
    heads: int | None = None,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Let every query attend over all tokens of its sequence, earlier and later: k queries in, k rows out.

    The queries of sequence s are `q[cu_queries[s]:cu_queries[s + 1]]`. With r and r_h as in `attention_pool`:
    `out[j, h] = sum_i p[j, h, i] r_h[i]`, where `p[j, h] = softmax_i(scale * <q[j, h], r_h[i]>)` over the
    tokens i of that sequence. Differentiable with respect to x, q and norm_weight.

    Args:
        x: `[T, d]` float32, bfloat16 or float16: hidden states of S sequences, packed without padding.
        q: `[K, heads, d/heads]`, on x's device.
        cu_seqlens: `[S+1]` int32 or int64, ascending from 0 to T, on any device; None for a single sequence.
        cu_queries: `[S+1]` likewise, ascending from 0 to K; None for a single sequence.
        heads: None, or the number of heads that q must have.
        scale: factor on the logits; None for `1 / sqrt(d/heads)`.
        norm_weight: `[d]`, or None for ones.
        eps: added to the mean square, > 0.

    Returns:
        `[K, d]` in x's dtype; zeros where the sequence of a query is empty. Sums are accumulated in float32.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_hidden_states(x)
    checks.check_queries(q, x, heads, ranks=(3,))
    checks.check_scale(scale)
    checks.check_norm_weight(norm_weight, x)
    checks.check_eps(eps)
    token_ends, query_ends = [0, len(x)], [0, len(q)]
    if cu_seqlens is not None:
        token_ends = checks.check_offsets("cu_seqlens", cu_seqlens, len(x))
        cu_seqlens = cu_seqlens.to(device=x.device, dtype=torch.int64)
    if cu_queries is not None:
        query_ends = checks.check_offsets("cu_queries", cu_queries, len(q))
        cu_queries = cu_queries.to(device=x.device, dtype=torch.int64)
    if len(token_ends) != len(query_ends):
        given = "None" if cu_queries is None else f"{len(query_ends) - 1} sequences"
        raise ValueError(f"cu_queries is {given}, expected {len(token_ends) - 1} sequences, as in cu_seqlens")
    return REGISTRY.call(
        "cross_pool",
        x,
        q,
        cu_seqlens=cu_seqlens,
        cu_queries=cu_queries,
        heads=q.shape[-2],
        scale=scale,
        norm_weight=norm_weight,
        eps=eps,
    )
