"""`ragged_decode_attention` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import RaggedDecodeAttentionArgs


def ragged_decode_attention(args: RaggedDecodeAttentionArgs) -> Tensor:
    """Attention of one query per head, `[B, H, D]`; the kernel is csrc/cpu/kernels/ragged_decode_attention.h."""
    out = torch.empty(args.q.shape, dtype=args.q.dtype)
    native.call(
        "ragged_decode_attention",
        q=native.rows_contiguous(args.q),
        k=native.rows_contiguous(args.k),
        v=native.rows_contiguous(args.v),
        cu_seqlens=args.cu_seqlens,
        lengths=args.lengths,
        scale=args.scale,
        out=out,
    )
    return out
