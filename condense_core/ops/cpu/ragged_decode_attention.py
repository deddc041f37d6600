"""`ragged_decode_attention` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import RaggedDecodeAttentionArgs


def ragged_decode_attention(args: RaggedDecodeAttentionArgs) -> Tensor:
    """Attention of one query per head, `[B, H, D]`; the kernel is csrc/cpu/kernels/ragged_decode_attention.h."""
    out = torch.empty(args.q.shape, dtype=args.q.dtype)
    rows = [native.rows_contiguous(x) for x in (args.q, args.k, args.v)]
    native.call("ragged_decode_attention", *rows, args.cu_seqlens, args.lengths, args.scale, out)
    return out
