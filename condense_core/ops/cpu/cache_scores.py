"""Scores of cached tokens that need no queries, on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native


def key_norm(k: Tensor, sink: int, window: int, bounds: Tensor | None) -> Tensor:
    """`-||k_i||_2`, `[B, G, N]`; the kernel is csrc/cpu/kernels/key_norm.h."""
    out = torch.empty(k.shape[:3])
    native.call("key_norm", native.rows_contiguous(k), sink, window, bounds, out)
    return out


def key_similarity(k: Tensor, sink: int, window: int, bounds: Tensor | None) -> Tensor:
    """`-cos(k_i, mean_j k_j / ||k_j||)`, `[B, G, N]`; the kernel is csrc/cpu/kernels/key_similarity.h."""
    out = torch.empty(k.shape[:3])
    native.call("key_similarity", native.rows_contiguous(k), sink, window, bounds, out)
    return out


def lag_scores(k: Tensor, v: Tensor, lag_size: int, sink: int, bounds: Tensor | None) -> Tensor:
    """Ranks by the spread relative to the next chunk, `[B, G, N]`; the kernel is csrc/cpu/kernels/lag_scores.h."""
    out = torch.empty(k.shape[:3])
    native.call("lag_scores", native.rows_contiguous(k), native.rows_contiguous(v), lag_size, sink, bounds, out)
    return out


def value_projection_norm(v: Tensor, w_o: Tensor, bounds: Tensor | None) -> Tensor:
    """`||W_h v_i||_1`, `[B, G, N]`; the kernel is csrc/cpu/kernels/value_projection_norm.h."""
    out = torch.empty(v.shape[:3])
    native.call("value_projection_norm", native.rows_contiguous(v), native.rows_contiguous(w_o), bounds, out)
    return out
