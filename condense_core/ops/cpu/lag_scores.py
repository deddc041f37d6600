"""`lag_scores` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import LagScoresArgs


def lag_scores(args: LagScoresArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/lag_scores.h."""
    out = torch.empty(args.k.shape[:3])
    native.call(
        "lag_scores",
        k=native.rows_contiguous(args.k),
        v=native.rows_contiguous(args.v),
        lag_size=args.lag_size,
        sink=args.sink,
        bounds=args.bounds,
        out=out,
    )
    return out
