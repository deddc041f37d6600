"""Choosing the tokens to keep, on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native


def select(scores: Tensor, budget: int, across_heads: bool, protect: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices of the kept tokens and how many each head keeps; the kernel is csrc/cpu/kernels/select.h."""
    batch, heads, num_tokens = scores.shape
    budget = min(budget, num_tokens)
    shape = (batch, heads * budget) if across_heads else (batch, heads, budget)
    indices = torch.empty(shape, dtype=torch.int64)
    counts = torch.empty(batch, heads, dtype=torch.int64)
    native.call("select", native.rows_contiguous(scores), budget, across_heads, protect, indices, counts)
    return indices, counts
