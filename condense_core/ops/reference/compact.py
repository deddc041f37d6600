"""Specification of `compact` and `compact_`: the rows of a cache that are kept move next to each other.

Public function: `condense_core.ops.compact`. Kernels: csrc/cpu/kernels/compact.h, csrc/cuda/compact.cu.

Shapes: B sequences, G key-value heads, head n = b*G + g; D head_dim. A cache is `[B, G, N, D]`, or rows `[T, D]` of all
heads, one after another, head n in `cu_seqlens[n]` to `cu_seqlens[n + 1]`. Lists of indices are `[B, G, M]` or,
likewise, `[R]` with `cu_indices`. Every list of tensors has one entry per layer.
"""

from itertools import pairwise

import torch
from torch import Tensor


def compact(
    k: list[Tensor],  # each [B, G, N, D] or [T, D]
    v: list[Tensor],
    cu_seqlens: list[Tensor],  # each [B*G+1]; empty: caches are [B, G, N, D]
    indices: list[Tensor],  # each [B, G, M] or [R]
    cu_indices: list[Tensor],  # each [B*G+1]; empty: indices are [B, G, M]
    cos: Tensor | None = None,  # [P, D/2], row p the rotation by p positions
    sin: Tensor | None = None,
    first: Tensor | None = None,  # [B*G], the index of the token at position 0 of each head; None: zeros
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of k and of v at `indices`, in the layout of the indices; zeros where an index is -1.

    An index counts from the first row of its head. With cos and sin the kept keys move to the positions 0, 1, 2, ...
    of their head: the key at place j turns back by `indices[j] - first - j` positions.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer in range(len(k)):
        kept = _split(indices[layer], cu_indices[layer] if cu_indices else None)
        shape = (*indices[layer].shape, k[layer].shape[-1])
        for x, out in ((k, keys), (v, values)):
            rows = _split(x[layer], cu_seqlens[layer] if cu_seqlens else None)
            parts = [_gather(n, head, index) for n, (head, index) in enumerate(zip(rows, kept, strict=True))]
            if x is k and cos is not None and sin is not None:
                starts = [0] * len(parts) if first is None else first.tolist()
                parts = [
                    _turn_back(part, _shift(n, index, start, len(cos)), cos, sin)
                    for n, (part, index, start) in enumerate(zip(parts, kept, starts, strict=True))
                ]
            empty = x[layer].new_empty(0, shape[-1])
            gap = x[layer].new_zeros(indices[layer].numel() - sum(map(len, parts)), shape[-1])
            out.append(torch.cat([empty, *parts, gap]).view(shape))
    return keys, values


def compact_(
    k: list[Tensor],
    v: list[Tensor],
    cu_seqlens: list[Tensor],
    indices: list[Tensor],
    cu_indices: list[Tensor],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    """`compact` in place: row j of a head becomes its row indices[j]; what stands behind the last index stays.

    The indices of a head ascend; -1 stands only behind them.
    """
    for layer, index in enumerate(indices):
        for n, part in enumerate(_split(index, cu_indices[layer] if cu_indices else None)):
            _check_ascent(n, part)
    keys, values = compact(k, v, cu_seqlens, indices, cu_indices, cos, sin, first)
    for layer in range(len(k)):
        cu_kept = cu_indices[layer] if cu_indices else None
        kept = _split(indices[layer], cu_kept)
        for x, moved in ((k[layer], keys[layer]), (v[layer], values[layer])):
            targets = _split(x, cu_seqlens[layer] if cu_seqlens else None)
            for target, rows, index in zip(targets, _split(moved, cu_kept), kept, strict=True):
                count = int((index >= 0).sum())
                target[:count] = rows[:count]


def _split(x: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """The parts of each head, views into x."""
    if offsets is None:
        return [x[b, g] for b in range(x.shape[0]) for g in range(x.shape[1])]
    bounds: list[int] = offsets.clamp(0, len(x)).tolist()
    return [x[start : max(start, stop)] for start, stop in pairwise(bounds)]


def _gather(head: int, rows: Tensor, index: Tensor) -> Tensor:
    outside = (index < -1) | (index >= len(rows))
    if outside.any():
        place = int(outside.int().argmax())
        raise ValueError(
            f"indices holds {int(index[place])} at place {place} of head {head}, expected -1 or an index below the "
            f"head's {len(rows)} rows"
        )
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # -1 is the last row
    return padded[index.long()]


def _shift(head: int, index: Tensor, first: int, limit: int) -> Tensor:
    """How many positions each key moves towards the front; 0 for a row of zeros."""
    shift = (index - first - torch.arange(len(index), device=index.device)).masked_fill(index < 0, 0)
    outside = (shift < 0) | (shift >= limit)
    if outside.any():
        place = int(outside.int().argmax())
        raise ValueError(
            f"rotate has {limit} rows, but the key at place {place} of head {head} (index {int(index[place])}, first "
            f"{first}) moves by {int(shift[place])} positions"
        )
    return shift.long()


def _turn_back(x: Tensor, shift: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    c, s = cos[shift], sin[shift]
    return torch.cat([low * c + high * s, high * c - low * s], dim=-1).to(x.dtype)


def _check_ascent(head: int, index: Tensor) -> None:
    following = index[1:]
    falls = (following >= 0) & (following <= index[:-1]) | (following >= 0) & (index[:-1] < 0)
    if falls.any():
        place = int(falls.int().argmax()) + 1
        raise ValueError(
            f"indices holds {int(index[place])} at place {place} of head {head} after {int(index[place - 1])}, "
            "expected them ascending, -1 only at the end: in place, a row would be overwritten before it is read"
        )
