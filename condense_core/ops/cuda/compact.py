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
    launch("compact", k[0].device, k=k, v=v, k_out=k_out, v_out=v_out, **_places(args))
    return k_out, v_out


def compact_(args: CompactArgs) -> None:
    """The same in place."""
    k, v = _rows(args)
    launch("compact_", k[0].device, k=k, v=v, **_places(args))
    native.copy_back([*args.k, *args.v], [*k, *v])


def _rows(args: CompactArgs) -> tuple[list[Tensor], list[Tensor]]:
    return [native.rows_contiguous(x) for x in args.k], [native.rows_contiguous(x) for x in args.v]


def _places(args: CompactArgs) -> dict[str, Any]:
    """The arguments that say where rows come from and go to, and how keys turn on the way."""
    return {
        "cu_seqlens": _integers(args.cu_seqlens),
        "indices": _integers(args.indices),
        "cu_indices": _integers(args.cu_indices),
        "cos": None if args.cos is None else args.cos.contiguous(),
        "sin": None if args.sin is None else args.sin.contiguous(),
        "first": None if args.first is None else args.first.contiguous(),
    }


def _integers(layers: list[Tensor]) -> list[Tensor]:
    """Contiguous and of one dtype: the kernel takes it from the first layer."""
    mixed = len({x.dtype for x in layers}) > 1
    return [(x.long() if mixed else x).contiguous() for x in layers]
