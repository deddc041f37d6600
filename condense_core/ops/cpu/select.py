"""`select` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import SelectArgs


def select(args: SelectArgs) -> tuple[Tensor, Tensor]:
    """Indices of the kept tokens and how many each head keeps; the kernel is csrc/cpu/kernels/select.h."""
    batch, heads, num_tokens = args.scores.shape
    budget = min(args.budget, num_tokens)
    shape = (batch, heads * budget) if args.across_heads else (batch, heads, budget)
    indices = torch.empty(shape, dtype=torch.int64)
    counts = torch.empty(batch, heads, dtype=torch.int64)
    native.call(
        "select",
        scores=native.rows_contiguous(args.scores),
        budget=budget,
        across_heads=args.across_heads,
        protect=args.protect,
        indices=indices,
        counts=counts,
    )
    return indices, counts
