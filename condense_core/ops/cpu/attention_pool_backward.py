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
    # Sums over all rows, so in fp32 until they are complete.
    dq, dw, dbias = (
        None if t is None else t.new_empty(t.shape, dtype=torch.float32)
        for t in (q, args.norm_weight, args.window_bias)
    )
    native.call(
        "attention_pool_backward",
        grad=native.contiguous_floats(args.grad),
        x=native.rows_contiguous(x),
        q=native.contiguous_floats(q),
        lse=args.lse,
        ratio=args.ratio,
        cu_seqlens=args.cu_seqlens,
        row_offsets=None if args.cu_seqlens is None else window_offsets(args.cu_seqlens, args.ratio),
        halo=args.halo,
        scale=args.scale,
        norm_weight=native.contiguous_floats(args.norm_weight),
        window_bias=native.contiguous_floats(args.window_bias),
        eps=args.eps,
        dx=dx,
        dq=dq,
        dw=dw,
        dbias=dbias,
    )

    def result(total: Tensor | None, like: Tensor | None) -> Tensor:
        return x.new_empty(0) if total is None or like is None else total.to(like.dtype)

    return dx, result(dq, q), result(dw, args.norm_weight), result(dbias, args.window_bias)
