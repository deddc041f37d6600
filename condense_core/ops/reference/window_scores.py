"""Specification of `window_scores`: the attention that the last queries give to earlier keys.

Public function: `condense_core.ops.window_scores`. Kernels: kernels/window_scores.py, csrc/cpu/kernels/window_scores.h.

Shapes: B sequences, G key-value heads, N cached tokens, D head_dim, H query heads, w queries of the window.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from condense_core.ops.reference.padding import accumulation_dtype, real_tokens


def window_scores(
    q_win: Tensor,  # [B, H, w, D], row t stands at position stop - w + t
    k: Tensor,  # [B, G, N, D]
    scale: float | None = None,  # default 1/sqrt(D)
    kernel_size: int = 5,  # odd
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """Attention that the last w queries of each sequence give to earlier keys, averaged and smoothed: `[B, G, N]`.

    With p[h, t] the softmax over the keys i, start <= i <= stop - w + t, of `scale * <q_win[h, t], k[i]>`:

        a[h, i] = mean_t p[h, t, i] for start <= i < stop - w, and zero elsewhere
        b[h, i] = sum over |j - i| <= kernel_size // 2 of a[h, j] / kernel_size

    The score is the mean of b over the query heads of the group. The last w tokens score +inf, padding -inf. Rows that
    stand before `start` do not exist; then the sequence has no more than w tokens, and all of them score +inf.

    SnapKV, arXiv 2404.14469, with the mean over the group of query heads.
    """
    compute = accumulation_dtype(k)
    (batch, heads, window, head_dim), (kv_heads, num_tokens) = q_win.shape, k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    start, stop = real_tokens(bounds, batch, num_tokens, k.device)  # [B, 1] each
    i = torch.arange(num_tokens, device=k.device)
    position = stop - window + torch.arange(window, device=k.device)  # [B, w]
    real = (i >= start) & (i < stop)  # [B, N]
    forced = real & (i >= stop - window)
    scored = real & ~forced
    seen = (i >= start.unsqueeze(-1)) & (i <= position.unsqueeze(-1))  # [B, w, N]

    q = q_win.to(compute).view(batch, kv_heads, heads // kv_heads, window, head_dim)
    logits = scale * torch.einsum("bghtd,bgnd->bghtn", q, k.to(compute))
    p = logits.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    a = p.mean(-2).masked_fill(~scored[:, None, None], 0.0)  # [B, G, H/G, N]
    b = F.avg_pool1d(a.flatten(1, 2), kernel_size, stride=1, padding=kernel_size // 2).view(a.shape)
    scores = b.mean(2).masked_fill(forced.unsqueeze(1), float("inf"))
    return scores.masked_fill(~real.unsqueeze(1), float("-inf"))
