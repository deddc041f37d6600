"""Decoding over a ragged KV cache, on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native


def ragged_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Tensor | None, scale: float
) -> Tensor:
    """Attention of one query per head, `[B, H, D]`; the kernel is csrc/cpu/kernels/ragged_decode_attention.h."""
    out = torch.empty(q.shape, dtype=q.dtype)
    rows = [native.rows_contiguous(x) for x in (q, k, v)]
    native.call("ragged_decode_attention", *rows, cu_seqlens, lengths, scale, out)
    return out
