"""Compacting caches and appending to them, on a GPU; the kernels are in csrc/cuda/compact.cu."""

from typing import Any

from torch import Tensor

from condense_core.ops import native
from condense_core.ops.cuda import launch


def compact(
    k: list[Tensor], v: list[Tensor], cu_seqlens: list[Tensor], indices: list[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The kept rows of all layers, in one launch (32 layers at a time)."""
    k, v = ([native.rows_contiguous(x) for x in xs] for xs in (k, v))
    k_out, v_out = ([x.new_empty(*i.shape, x.shape[-1]) for x, i in zip(xs, indices, strict=True)] for xs in (k, v))
    launch("compact", k[0].device, k, v, *_prepared(cu_seqlens, indices, *rest), k_out, v_out)
    return k_out, v_out


def compact_(k: list[Tensor], v: list[Tensor], cu_seqlens: list[Tensor], indices: list[Tensor], *rest: Any) -> None:
    """The same in place."""
    moved = [[native.rows_contiguous(x) for x in xs] for xs in (k, v)]
    launch("compact_", k[0].device, *moved, *_prepared(cu_seqlens, indices, *rest))
    _copy_back([*k, *v], [*moved[0], *moved[1]])


def ragged_append(k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Tensor, k_new: Tensor, v_new: Tensor) -> None:
    """New rows behind the valid ones of each head, in one launch."""
    rows = [native.rows_contiguous(x) for x in (k, v)]
    new = (native.rows_contiguous(x) for x in (k_new, v_new))
    launch("ragged_append", k.device, *rows, cu_seqlens, lengths, *new)
    _copy_back([k, v], rows)


def _copy_back(buffers: list[Tensor], written: list[Tensor]) -> None:
    for x, rows in zip(buffers, written, strict=True):
        if rows is not x:
            x.copy_(rows)


def _prepared(
    cu_seqlens: list[Tensor],
    indices: list[Tensor],
    cu_indices: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    first: Tensor | None,
) -> tuple[Any, ...]:
    tables = (None if t is None else t.contiguous() for t in (cos, sin, first))
    return _integers(cu_seqlens), _integers(indices), _integers(cu_indices), *tables


def _integers(layers: list[Tensor]) -> list[Tensor]:
    """Contiguous and of one dtype: the kernel takes it from the first layer."""
    mixed = len({x.dtype for x in layers}) > 1
    return [(x.long() if mixed else x).contiguous() for x in layers]
