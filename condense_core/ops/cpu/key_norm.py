"""`key_norm` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import KeyNormArgs


def key_norm(args: KeyNormArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/key_norm.h."""
    out = torch.empty(args.k.shape[:3])
    native.call(
        "key_norm",
        k=native.rows_contiguous(args.k),
        sink=args.sink,
        window=args.window,
        bounds=args.bounds,
        out=out,
    )
    return out
