"""Choosing the tokens to keep, on a GPU."""

import torch
from torch import Tensor

from condense_core.ops.cuda import launch


def select(scores: Tensor, budget: int, across_heads: bool, protect: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices and counts; the kernel is csrc/cuda/select.cu."""
    batch, heads, _ = scores.shape
    shape = (batch, heads * budget) if across_heads else (batch, heads, budget)
    indices = torch.empty(shape, dtype=torch.int64, device=scores.device)
    counts = torch.empty(batch, heads, dtype=torch.int64, device=scores.device)
    launch("select", scores.device, scores, budget, across_heads, protect, indices, counts)
    return indices, counts
