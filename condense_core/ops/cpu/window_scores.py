"""`window_scores` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import WindowScoresArgs


def window_scores(args: WindowScoresArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/window_scores.h."""
    out = torch.empty(args.k.shape[:3])
    q, k = native.rows_contiguous(args.q_win), native.rows_contiguous(args.k)
    native.call("window_scores", q, k, args.scale, args.kernel_size, args.bounds, out)
    return out
