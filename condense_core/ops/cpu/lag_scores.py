"""`lag_scores` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import LagScoresArgs


def lag_scores(args: LagScoresArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/lag_scores.h."""
    out = torch.empty(args.k.shape[:3])
    k, v = native.rows_contiguous(args.k), native.rows_contiguous(args.v)
    native.call("lag_scores", k, v, args.lag_size, args.sink, args.bounds, out)
    return out
