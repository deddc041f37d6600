"""`attention_pool` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import AttentionPoolArgs
from condense_core.ops.reference import window_offsets


def attention_pool(args: AttentionPoolArgs) -> tuple[Tensor, Tensor]:
    """Rows `[K, d]` and log-sum-exp `[K, H]`; the kernel is csrc/cpu/kernels/attention_pool.h.

    Queries, norm weights and biases are small and go there in fp32.
    """
    x, q, ratio, cu_seqlens = args.x, args.q, args.ratio, args.cu_seqlens
    row_offsets = None if cu_seqlens is None else window_offsets(cu_seqlens, ratio)
    rows = -(-len(x) // ratio) if row_offsets is None else int(row_offsets[-1])
    out, lse = x.new_empty(rows, x.shape[1]), torch.empty(rows, q.shape[-2])
    native.call(
        "attention_pool",
        x=native.rows_contiguous(x),
        q=native.contiguous_floats(q),
        ratio=ratio,
        cu_seqlens=cu_seqlens,
        row_offsets=row_offsets,
        halo=args.halo,
        scale=args.scale,
        norm_weight=native.contiguous_floats(args.norm_weight),
        window_bias=native.contiguous_floats(args.window_bias),
        eps=args.eps,
        out=out,
        lse=lse,
    )
    return out, lse
