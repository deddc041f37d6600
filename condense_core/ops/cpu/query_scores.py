"""Scores by the attention that queries give to keys, on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native


def window_scores(q_win: Tensor, k: Tensor, scale: float, kernel_size: int, bounds: Tensor | None) -> Tensor:
    """Attention of the last queries, smoothed, `[B, G, N]`; the kernel is csrc/cpu/kernels/window_scores.h."""
    out = torch.empty(k.shape[:3])
    rows = native.rows_contiguous(q_win), native.rows_contiguous(k)
    native.call("window_scores", *rows, scale, kernel_size, bounds, out)
    return out


def non_causal_chunks(q: Tensor, k: Tensor, chunk_size: int, scale: float, bounds: Tensor | None) -> Tensor:
    """Attention inside chunks, `[B, G, N]`; the kernel is csrc/cpu/kernels/non_causal_chunks.h."""
    out = torch.empty(k.shape[:3])
    rows = native.rows_contiguous(q), native.rows_contiguous(k)
    native.call("non_causal_chunks", *rows, chunk_size, scale, bounds, out)
    return out
