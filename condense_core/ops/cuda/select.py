"""`select` on a GPU."""

import torch
from torch import Tensor

from condense_core.ops.arguments import SelectArgs
from condense_core.ops.cuda import launch


def select(args: SelectArgs) -> tuple[Tensor, Tensor]:
    """Indices of the kept tokens and how many each head keeps; the kernel is csrc/cuda/select.cu."""
    scores = args.scores
    batch, heads, _ = scores.shape
    shape = (batch, heads * args.budget) if args.across_heads else (batch, heads, args.budget)
    indices = torch.empty(shape, dtype=torch.int64, device=scores.device)
    counts = torch.empty(batch, heads, dtype=torch.int64, device=scores.device)
    launch(
        "select",
        scores.device,
        scores=scores,
        budget=args.budget,
        across_heads=args.across_heads,
        protect=args.protect,
        indices=indices,
        counts=counts,
    )
    return indices, counts
