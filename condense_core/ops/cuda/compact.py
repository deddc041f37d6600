"""`compact` and `compact_` on a GPU; the kernels are in csrc/cuda/compact.cu."""

from typing import Any

from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import CompactArgs
from condense_core.ops.cuda import launch


def compact(args: CompactArgs) -> tuple[list[Tensor], list[Tensor]]:
    """The kept rows of all layers, in one launch (32 layers at a time)."""
    k, v = _rows(args)
    k_out, v_out = (
        [x.new_empty(*index.shape, x.shape[-1]) for x, index in zip(xs, args.indices, strict=True)] for xs in (k, v)
    )
    launch("compact", k[0].device, k, v, *_tables(args), k_out, v_out)
    return k_out, v_out


def compact_(args: CompactArgs) -> None:
    """The same in place."""
    k, v = _rows(args)
    launch("compact_", k[0].device, k, v, *_tables(args))
    native.copy_back([*args.k, *args.v], [*k, *v])


def _rows(args: CompactArgs) -> tuple[list[Tensor], list[Tensor]]:
    return [native.rows_contiguous(x) for x in args.k], [native.rows_contiguous(x) for x in args.v]


def _tables(args: CompactArgs) -> tuple[Any, ...]:
    """What follows k and v."""
    rotation = (None if t is None else t.contiguous() for t in (args.cos, args.sin, args.first))
    return _integers(args.cu_seqlens), _integers(args.indices), _integers(args.cu_indices), *rotation


def _integers(layers: list[Tensor]) -> list[Tensor]:
    """Contiguous and of one dtype: the kernel takes it from the first layer."""
    mixed = len({x.dtype for x in layers}) > 1
    return [(x.long() if mixed else x).contiguous() for x in layers]
