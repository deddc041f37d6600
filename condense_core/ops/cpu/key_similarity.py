"""`key_similarity` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import KeySimilarityArgs


def key_similarity(args: KeySimilarityArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/key_similarity.h."""
    out = torch.empty(args.k.shape[:3])
    native.call(
        "key_similarity",
        k=native.rows_contiguous(args.k),
        sink=args.sink,
        window=args.window,
        bounds=args.bounds,
        out=out,
    )
    return out
