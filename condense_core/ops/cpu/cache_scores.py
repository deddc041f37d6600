"""Scores of cached tokens that need no queries, on the CPU."""

import torch
from torch import Tensor

from condense_core.ops import native


def key_norm(k: Tensor, sink: int, window: int, bounds: Tensor | None) -> Tensor:
    """`-||k_i||_2`, `[B, G, N]`; the kernel is csrc/cpu/kernels/key_norm.h."""
    out = torch.empty(k.shape[:3])
    native.call("key_norm", native.rows_contiguous(k), sink, window, bounds, out)
    return out
