"""`expected_attention` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import ExpectedAttentionArgs


def expected_attention(args: ExpectedAttentionArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/expected_attention.h. Moments go there in fp32."""
    out = torch.empty(args.k.shape[:3])
    native.call(
        "expected_attention",
        k=native.rows_contiguous(args.k),
        v=None if args.v is None else native.rows_contiguous(args.v),
        mu=native.contiguous_floats(args.mu),
        cov=native.contiguous_floats(args.cov),
        mean_cos=native.contiguous_floats(args.mean_cos),
        mean_sin=native.contiguous_floats(args.mean_sin),
        scale=args.scale,
        epsilon=args.epsilon,
        sink=args.sink,
        bounds=args.bounds,
        out=out,
    )
    return out
