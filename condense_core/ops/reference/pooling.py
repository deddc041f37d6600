"""Pooling hidden states into rows: attention inside windows, and over whole sequences. Differentiable.

Shapes: T tokens of all sequences, packed without padding, S sequences, K output rows, d model width, H heads
of width d/H.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from condense_core.ops.reference.padding import accumulation_dtype


def window_offsets(cu_seqlens: Tensor, ratio: int) -> Tensor:
    """Rows of each sequence in the output of `attention_pool`: offsets `[S+1]`, as `cu_seqlens` for tokens.

    Sequence s of n_s tokens has ceil(n_s / ratio) windows (none when it is empty), so its rows are
    `out[offsets[s]:offsets[s + 1]]`, and `offsets[-1]` is K. dtype and device are those of `cu_seqlens`.
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    windows = (lengths + ratio - 1) // ratio
    return F.pad(windows.cumsum(0, dtype=cu_seqlens.dtype), (1, 0))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension: `[T, d] -> [T, d]` in x's dtype."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight.to(x.dtype)


def attention_pool_with_lse(
    x: Tensor,  # [T, d]
    q: Tensor,  # [H, d/H] the same for every window, or [K, H, d/H]
    *,
    ratio: int,
    cu_seqlens: Tensor | None = None,  # [S+1]; None: one sequence
    halo: int = 0,
    heads: int | None = None,
    scale: float | None = None,  # default 1/sqrt(d/H)
    norm_weight: Tensor | None = None,  # [d]; None: ones
    window_bias: Tensor | None = None,  # [H, ratio + 2*halo]; None: zeros
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Pool every window of `ratio` tokens into one row: `[T, d] -> [K, d]` in x's dtype.

    With r = rms_norm(x), and head h owning the columns r_h of width d/H, row j of the output is, for every
    head, `out[j, h] = sum_i p[j, h, i] r_h[i]` over window j, where
    `p[j, h] = softmax_i(scale * <q[j, h], r_h[i]> + window_bias[h, i])`. Window j of a sequence covers its
    tokens [j*ratio - halo, (j+1)*ratio + halo), clipped to the sequence; the bias counts places from
    j*ratio - halo, clipped or not. Second comes the log-sum-exp of the logits, `[K, H]`.
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


def cross_pool_with_lse(
    x: Tensor,  # [T, d]
    q: Tensor,  # [K, H, d/H]
    *,
    cu_seqlens: Tensor | None = None,  # [S+1]; None: one sequence
    cu_queries: Tensor | None = None,  # [S+1]; None: all queries belong to the only sequence
    heads: int | None = None,
    scale: float | None = None,  # default 1/sqrt(d/H)
    norm_weight: Tensor | None = None,  # [d]; None: ones
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Let every query attend over all tokens of its sequence: `[T, d]` and `[K, H, d/H]` -> `[K, d]`.

    With r = rms_norm(x): `out[j, h] = sum_i p[j, h, i] r_h[i]`, `p[j, h] = softmax_i(scale * <q[j, h],
    r_h[i]>)` over the tokens i of the sequence that query j belongs to. A query over an empty sequence gives
    zeros. Second comes the log-sum-exp of the logits, `[K, H]`, -inf for an empty sequence.
    """
    compute = accumulation_dtype(x)
    heads, head_dim = q.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    r = rms_norm(x.to(compute), norm_weight, eps).unflatten(-1, (heads, head_dim))  # [T, H, d/H]

    token_ends = [0, len(x)] if cu_seqlens is None else cu_seqlens.tolist()
    query_ends = [0, len(q)] if cu_queries is None else cu_queries.tolist()
    rows, lses = [r.new_zeros(0, heads, head_dim)], [r.new_zeros(0, heads)]
    for s in range(len(token_ends) - 1):
        r_s = r[token_ends[s] : token_ends[s + 1]]  # [N, H, d/H]
        q_s = q[query_ends[s] : query_ends[s + 1]].to(compute)
        logits = torch.einsum("khd,nhd->khn", scale * q_s, r_s)
        rows.append(torch.einsum("khn,nhd->khd", logits.softmax(-1), r_s))  # an empty sum, zeros, when N = 0
        lses.append(logits.logsumexp(-1))
    out = torch.cat(rows).flatten(-2).to(x.dtype)
    return out, torch.cat(lses)


def cross_pool(x: Tensor, q: Tensor, **options: Any) -> Tensor:
    """`cross_pool_with_lse` without the log-sum-exp."""
    return cross_pool_with_lse(x, q, **options)[0]


def window_tokens(num_tokens: int, ratio: int, cu_seqlens: Tensor | None, halo: int) -> tuple[Tensor, slice]:
    """Which token stands at every place of every window: `[K, W]`, -1 where a window leaves its sequence.

    A window wider than the longest sequence sees no more than one of its length, so W may be smaller than
    ratio + 2*halo: the slice says which places of a window these are.
    """
    cu_seqlens = torch.tensor([0, num_tokens]) if cu_seqlens is None else cu_seqlens.cpu()
    longest = max([0, *cu_seqlens.diff().tolist()])
    width, reach = min(ratio, max(longest, 1)), min(halo, longest)
    offsets = window_offsets(cu_seqlens, width)  # [S+1]
    sequence = torch.repeat_interleave(offsets.diff())  # [K], which sequence a window belongs to
    first, end = cu_seqlens[:-1][sequence, None], cu_seqlens[1:][sequence, None]  # [K, 1]
    j = torch.arange(len(sequence)) - offsets[:-1][sequence]  # [K], counted in its sequence
    token = first + (j * width)[:, None] + torch.arange(-reach, width + reach)  # [K, W]
    token = token.masked_fill((token < first) | (token >= end), -1)
    return token, slice(halo - reach, halo + width + reach)


def gather_windows(r: Tensor, index: Tensor) -> Tensor:
    """`[T, d]` -> `[K, W, d]`, zeros where the index is -1; a view when every window is full and none overlap."""
    if index.numel() == len(r) and not bool((index < 0).any()):
        return r.reshape(*index.shape, r.shape[-1])
    index = index.to(r.device)
    # Zero, not only unattended: 0 * NaN is NaN, and one sequence's NaN must not reach another's rows.
    return r[index].masked_fill((index < 0).unsqueeze(-1), 0.0)
