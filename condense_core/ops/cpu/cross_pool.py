"""`cross_pool` on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import CrossPoolArgs

_QUERIES = 64  # of a task, as in the kernel


def cross_pool(args: CrossPoolArgs) -> tuple[Tensor, Tensor]:
    """Rows `[K, d]` and log-sum-exp `[K, H]`; the kernel is csrc/cpu/kernels/cross_pool.h.

    Queries and norm weights are small and go there in fp32.
    """
    x, q = args.x, args.q
    tokens = [0, len(x)] if args.cu_seqlens is None else args.cu_seqlens.tolist()
    queries = [0, len(q)] if args.cu_queries is None else args.cu_queries.tolist()
    blocks = [
        (first, min(_QUERIES, queries[s + 1] - first), tokens[s], tokens[s + 1])
        for s in range(len(tokens) - 1)
        for first in range(queries[s], queries[s + 1], _QUERIES)
    ]
    out, lse = x.new_empty(len(q), x.shape[1]), torch.empty(q.shape[:2])
    native.call(
        "cross_pool",
        x=native.rows_contiguous(x),
        q=native.contiguous_floats(q),
        blocks=torch.tensor(blocks, dtype=torch.int64).view(-1, 4),
        scale=args.scale,
        norm_weight=native.contiguous_floats(args.norm_weight),
        eps=args.eps,
        out=out,
        lse=lse,
    )
    return out, lse
