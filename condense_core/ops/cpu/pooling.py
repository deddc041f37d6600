"""Pooling hidden states into rows, on the CPU. Queries, norm weights and biases are small and go to the kernels in fp32."""

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


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
