"""`window_scores` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import WindowScoresArgs


def window_scores(args: WindowScoresArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/window_scores.h."""
    out = torch.empty(args.k.shape[:3])
    native.call(
        "window_scores",
        q_win=native.rows_contiguous(args.q_win),
        k=native.rows_contiguous(args.k),
        scale=args.scale,
        kernel_size=args.kernel_size,
        bounds=args.bounds,
        out=out,
    )
    return out
