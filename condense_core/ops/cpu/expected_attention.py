"""`expected_attention` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import ExpectedAttentionArgs


def expected_attention(args: ExpectedAttentionArgs) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/expected_attention.h. Moments go there in fp32."""
    out = torch.empty(args.k.shape[:3])
    rows = native.rows_contiguous(args.k), None if args.v is None else native.rows_contiguous(args.v)
    moments = native.contiguous_floats(args.mu), native.contiguous_floats(args.cov)
    rotation = native.contiguous_floats(args.mean_cos), native.contiguous_floats(args.mean_sin)
    numbers = args.scale, args.epsilon, args.sink
    native.call("expected_attention", *rows, *moments, *rotation, *numbers, args.bounds, out)
    return out
