"""`value_projection_norm` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import ValueProjectionNormArgs


def value_projection_norm(args: ValueProjectionNormArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/value_projection_norm.h."""
    out = torch.empty(args.v.shape[:3])
    native.call(
        "value_projection_norm",
        v=native.rows_contiguous(args.v),
        w_o=native.rows_contiguous(args.w_o),
        bounds=args.bounds,
        out=out,
    )
    return out
