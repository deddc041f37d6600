"""Specification of `ragged_append`: new rows behind the valid ones of a ragged cache.

Public function: `condense_core.ops.ragged_append`. Kernels: csrc/cpu/kernels/ragged_append.h,
csrc/cuda/ragged_append.cu.

Shapes: T rows of all heads, head n = b*G + g of B sequences with G key-value heads in `cu_seqlens[n]` to `cu_seqlens[n
+ 1]`; D head_dim, t new tokens.
"""

from torch import Tensor


def ragged_append(
    k: Tensor,  # [T, D]
    v: Tensor,  # [T, D]
    cu_seqlens: Tensor,  # [B*G+1], the room of each head
    lengths: Tensor,  # [B*G], valid rows of each head
    k_new: Tensor,  # [B, G, t, D]
    v_new: Tensor,  # [B, G, t, D]
) -> None:
    """Write t new rows of each head behind its valid ones, and add t to its length.

    Rows that find no room are not written; a length above the room shows it.
    """
    room = cu_seqlens.clamp(0, len(k)).tolist()
    rows = k_new.shape[2]
    for n, length in enumerate(lengths.tolist()):
        start = room[n] + max(length, 0)
        count = max(min(rows, room[n + 1] - start), 0)
        k[start : start + count] = k_new.flatten(0, 1)[n, :count]
        v[start : start + count] = v_new.flatten(0, 1)[n, :count]
    lengths += rows
