"""`attention_pool_backward` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import AttentionPoolBackwardArgs
from condense_core.ops.reference import window_offsets


def attention_pool_backward(args: AttentionPoolBackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, q, norm_weight and window_bias, empty for None; csrc/cpu/kernels/attention_pool_backward.h.

    Queries, norm weights and biases are small and go there in fp32.
    """
    x, q = args.x, args.q
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Of a reduction, so in fp32 until it is complete.
    summed = (q, args.norm_weight, args.window_bias)
    sums = [None if t is None else t.new_empty(t.shape, dtype=torch.float32) for t in summed]
    native.call(
        "attention_pool_backward",
        native.contiguous_floats(args.grad),
        native.rows_contiguous(x),
        native.contiguous_floats(q),
        args.lse,
        args.ratio,
        args.cu_seqlens,
        None if args.cu_seqlens is None else window_offsets(args.cu_seqlens, args.ratio),
        args.halo,
        args.scale,
        native.contiguous_floats(args.norm_weight),
        native.contiguous_floats(args.window_bias),
        args.eps,
        dx,
        *sums,
    )
    pairs = zip(sums, summed, strict=True)
    dq, dw, db = (x.new_empty(0) if g is None or t is None else g.to(t.dtype) for g, t in pairs)
    return dx, dq, dw, db
