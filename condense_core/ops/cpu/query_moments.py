"""`query_moments` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import QueryMomentsArgs


def query_moments(args: QueryMomentsArgs) -> tuple[Tensor, Tensor]:
    """Mean `[B, H, D]` and covariance `[B, H, D, D]`; the kernel is csrc/cpu/kernels/query_moments.h."""
    batch, heads, _, head_dim = args.q.shape
    mu, cov = torch.empty(batch, heads, head_dim), torch.empty(batch, heads, head_dim, head_dim)
    cos, sin = args.cos, args.sin
    if cos is not None and sin is not None:
        if cos.dtype != sin.dtype:
            cos, sin = cos.float(), sin.float()
        cos, sin = native.rows_contiguous(cos), native.rows_contiguous(sin)
    native.call(
        "query_moments",
        q=native.rows_contiguous(args.q),
        cos=cos,
        sin=sin,
        sink=args.sink,
        bounds=args.bounds,
        mu=mu,
        cov=cov,
    )
    return mu, cov
