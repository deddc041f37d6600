"""`non_causal_chunks` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import NonCausalChunksArgs


def non_causal_chunks(args: NonCausalChunksArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/non_causal_chunks.h."""
    out = torch.empty(args.k.shape[:3])
    native.call(
        "non_causal_chunks",
        q=native.rows_contiguous(args.q),
        k=native.rows_contiguous(args.k),
        chunk_size=args.chunk_size,
        scale=args.scale,
        bounds=args.bounds,
        out=out,
    )
    return out
