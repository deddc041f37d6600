"""The specification of every op: its mathematics in plain PyTorch, differentiable, accumulated in fp32.

Kernels are tested against these functions, and the CPU trains with them. Arguments are taken as valid: the
checks stand in the public functions of `condense_core.ops`. fp64 input, which only tests have, is computed in
fp64.

Shapes: T tokens of all sequences, packed without padding, S sequences, K output rows, d model width, H heads
of width d/H.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def attention_pool(
    x: Tensor,  # [T, d]
    q: Tensor,  # [H, d/H] the same for every window, or [K, H, d/H]
    *,
    ratio: int,
    cu_seqlens: Tensor | None = None,  # [S+1], on x's device; None: one sequence
    halo: int = 0,
    heads: int | None = None,
    scale: float | None = None,  # default 1/sqrt(d/H)
    norm_weight: Tensor | None = None,  # [d]; None: ones
    window_bias: Tensor | None = None,  # [H, ratio + 2*halo]; None: zeros
    eps: float = 1e-6,
) -> Tensor:
    """Pool every window of `ratio` tokens into one row: `[T, d] -> [K, d]` in x's dtype.

    With r = rms_norm(x), and head h owning the columns r_h of width d/H, row j of the output is, for every
    head, `out[j, h] = sum_i p[j, h, i] r_h[i]` over window j, where
    `p[j, h] = softmax_i(scale * <q[j, h], r_h[i]> + window_bias[h, i])`. Window j of a sequence covers its
    tokens [j*ratio - halo, (j+1)*ratio + halo), clipped to the sequence; the bias counts places from
    j*ratio - halo, clipped or not.
    """
    compute = _accumulation_dtype(x)
    heads, head_dim = q.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    r = rms_norm(x.to(compute), norm_weight, eps)  # [T, d]

    tokens, inside = _windows(r, ratio, cu_seqlens, halo)  # [K, W, d], [K, W] or None
    tokens = tokens.unflatten(-1, (heads, head_dim))  # [K, W, H, d/H]
    logits = scale * (tokens * q.to(compute).unsqueeze(-3)).sum(-1)  # [K, W, H]
    if window_bias is not None:
        logits = logits + window_bias.to(compute).t()  # [W, H]
    if inside is not None:
        logits = logits.masked_fill(~inside.unsqueeze(-1), float("-inf"))
    p = logits.softmax(dim=1)
    return (p.unsqueeze(-1) * tokens).sum(1).flatten(-2).to(x.dtype)


def cross_pool(
    x: Tensor,  # [T, d]
    q: Tensor,  # [K, H, d/H]
    *,
    cu_seqlens: Tensor | None = None,  # [S+1]; None: one sequence
    cu_queries: Tensor | None = None,  # [S+1]; None: all queries belong to the only sequence
    heads: int | None = None,
    scale: float | None = None,  # default 1/sqrt(d/H)
    norm_weight: Tensor | None = None,  # [d]; None: ones
    eps: float = 1e-6,
) -> Tensor:
    """Let every query attend over all tokens of its sequence: `[T, d]` and `[K, H, d/H]` -> `[K, d]`.

    With r = rms_norm(x): `out[j, h] = sum_i p[j, h, i] r_h[i]`, `p[j, h] = softmax_i(scale * <q[j, h],
    r_h[i]>)` over the tokens i of the sequence that query j belongs to. A query over an empty sequence gives
    zeros.
    """
    compute = _accumulation_dtype(x)
    heads, head_dim = q.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    r = rms_norm(x.to(compute), norm_weight, eps).unflatten(-1, (heads, head_dim))  # [T, H, d/H]

    token_ends = [0, len(x)] if cu_seqlens is None else cu_seqlens.tolist()
    query_ends = [0, len(q)] if cu_queries is None else cu_queries.tolist()
    rows = [r.new_zeros(0, heads, head_dim)]
    for s in range(len(token_ends) - 1):
        r_s = r[token_ends[s] : token_ends[s + 1]]  # [N, H, d/H]
        q_s = q[query_ends[s] : query_ends[s + 1]].to(compute)
        p = torch.einsum("khd,nhd->khn", scale * q_s, r_s).softmax(-1)
        rows.append(torch.einsum("khn,nhd->khd", p, r_s))  # an empty sum, zeros, when N = 0
    return torch.cat(rows).flatten(-2).to(x.dtype)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _windows(r: Tensor, ratio: int, cu_seqlens: Tensor | None, halo: int) -> tuple[Tensor, Tensor | None]:
    """Cut tokens into windows: `[T, d] -> [K, W, d]`, W = ratio + 2*halo, and a mask `[K, W]`.

    The mask says which places lie inside the sequence. When every window is full and halo is 0, the tokens
    already stand in window order: a view is returned, and None for the mask.
    """
    if cu_seqlens is None:
        every_window_full = len(r) % ratio == 0
        cu_seqlens = torch.tensor([0, len(r)], device=r.device)
    else:
        every_window_full = not bool(((cu_seqlens[1:] - cu_seqlens[:-1]) % ratio).any())
    if every_window_full and (halo == 0 or len(r) == 0):
        return r.reshape(len(r) // ratio, ratio, r.shape[-1]), None

    offsets = window_offsets(cu_seqlens, ratio)  # [S+1]
    sequence = torch.repeat_interleave(offsets[1:] - offsets[:-1])  # [K], which sequence a window belongs to
    first, end = cu_seqlens[:-1][sequence], cu_seqlens[1:][sequence]  # [K]
    j = torch.arange(len(sequence), device=r.device) - offsets[:-1][sequence]  # [K], counted in its sequence
    reach = torch.arange(-halo, ratio + halo, device=r.device)  # [W]
    token = (first + j * ratio).unsqueeze(-1) + reach  # [K, W]
    inside = (token >= first.unsqueeze(-1)) & (token < end.unsqueeze(-1))
    # Zero, not only unattended: 0 * NaN is NaN, and one sequence's NaN must not reach another's rows.
    windows = r[token.clamp(0, len(r) - 1)].masked_fill(~inside.unsqueeze(-1), 0.0)
    return windows, inside
