"""Pooling hidden states into rows, on the CPU. Queries, norm weights and biases are small and go there in fp32."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.reference import window_offsets


def attention_pool(
    x: Tensor,
    q: Tensor,
    ratio: int,
    cu_seqlens: Tensor | None,
    halo: int,
    scale: float,
    norm_weight: Tensor | None,
    window_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Rows `[K, d]` and log-sum-exp `[K, heads]`; the kernel is csrc/cpu/kernels/attention_pool.h."""
    row_offsets = None if cu_seqlens is None else window_offsets(cu_seqlens, ratio)
    rows = -(-len(x) // ratio) if row_offsets is None else int(row_offsets[-1])
    out, lse = x.new_empty(rows, x.shape[1]), torch.empty(rows, q.shape[-2])
    small = (_floats(q), ratio, cu_seqlens, row_offsets, halo, scale, _floats(norm_weight), _floats(window_bias), eps)
    native.call("attention_pool", native.rows_contiguous(x), *small, out, lse)
    return out, lse


def attention_pool_backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    ratio: int,
    cu_seqlens: Tensor | None,
    halo: int,
    scale: float,
    norm_weight: Tensor | None,
    window_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, q, norm_weight and window_bias, empty for None; csrc/cpu/kernels/attention_pool_backward.h."""
    row_offsets = None if cu_seqlens is None else window_offsets(cu_seqlens, ratio)
    small = (ratio, cu_seqlens, row_offsets, halo, scale, _floats(norm_weight), _floats(window_bias), eps)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Of a reduction, so in fp32 until it is complete.
    sums = [None if t is None else t.new_empty(t.shape, dtype=torch.float32) for t in (q, norm_weight, window_bias)]
    rows = native.rows_contiguous(x)
    native.call("attention_pool_backward", _floats(grad), rows, _floats(q), lse, *small, dx, *sums)
    pairs = zip(sums, (q, norm_weight, window_bias), strict=True)
    dq, dw, db = (x.new_empty(0) if g is None or t is None else g.to(t.dtype) for g, t in pairs)
    return dx, dq, dw, db


def cross_pool(
    x: Tensor,
    q: Tensor,
    cu_seqlens: Tensor | None,
    cu_queries: Tensor | None,
    scale: float,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Rows `[K, d]` and log-sum-exp `[K, heads]`; the kernel is csrc/cpu/kernels/cross_pool.h."""
    tokens = [0, len(x)] if cu_seqlens is None else cu_seqlens.tolist()
    queries = [0, len(q)] if cu_queries is None else cu_queries.tolist()
    blocks = [
        (first, min(_QUERIES, queries[s + 1] - first), tokens[s], tokens[s + 1])
        for s in range(len(tokens) - 1)
        for first in range(queries[s], queries[s + 1], _QUERIES)
    ]
    out, lse = x.new_empty(len(q), x.shape[1]), torch.empty(q.shape[:2])
    shared = torch.tensor(blocks, dtype=torch.int64).view(-1, 4)
    rows = native.rows_contiguous(x)
    native.call("cross_pool", rows, _floats(q), shared, scale, _floats(norm_weight), eps, out, lse)
    return out, lse


_QUERIES = 64  # of a task, as in the kernel


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
