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
    launch("compact", k[0].device, k, v, cu_seqlens, *_prepared(indices, *rest), k_out, v_out)
    return k_out, v_out


def compact_(k: list[Tensor], v: list[Tensor], cu_seqlens: list[Tensor], indices: list[Tensor], *rest: Any) -> None:
    """The same in place."""
    launch("compact_", k[0].device, k, v, cu_seqlens, *_prepared(indices, *rest))


def ragged_append(k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Tensor, k_new: Tensor, v_new: Tensor) -> None:
    """New rows behind the valid ones of each head, in one launch."""
    new = native.rows_contiguous(k_new), native.rows_contiguous(v_new)
    launch("ragged_append", k.device, k, v, cu_seqlens, lengths, *new)


def _prepared(
    indices: list[Tensor], cu_indices: list[Tensor], cos: Tensor | None, sin: Tensor | None, first: Tensor | None
) -> tuple[Any, ...]:
    """Integer arguments share a dtype and are contiguous: the kernel takes both from the first layer."""
    wide = {t.dtype for t in indices}
    indices = [i.contiguous() if len(wide) == 1 else i.long().contiguous() for i in indices]
    cu_indices = [c.long().contiguous() for c in cu_indices] if len({c.dtype for c in cu_indices}) > 1 else cu_indices
    tables = (None if t is None else t.contiguous() for t in (cos, sin, first))
    return indices, cu_indices, *tables
