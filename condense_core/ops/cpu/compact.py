"""`compact` and `compact_` on the CPU; the kernel is csrc/cpu/kernels/compact.h."""

from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import CompactArgs


def compact(args: CompactArgs) -> tuple[list[Tensor], list[Tensor]]:
    """The rows at `indices`, in new tensors."""
    cos, sin = _tables(args)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer, index in enumerate(args.indices):
        source = [native.rows_contiguous(x[layer]) for x in (args.k, args.v)]
        out = [x.new_empty(*index.shape, x.shape[-1]) for x in source]
        offsets, starts = _layer(args.cu_seqlens, layer), _layer(args.cu_indices, layer)
        native.call("compact", *source, offsets, index, starts, cos, sin, args.first, *out)
        keys.append(out[0])
        values.append(out[1])
    return keys, values


def compact_(args: CompactArgs) -> None:
    """The rows at `indices` to the front of their heads."""
    cos, sin = _tables(args)
    # The indices of all layers are checked before a row of the first moves; the kernel checks those of a single one.
    for check_only in (True, False) if len(args.k) > 1 else (False,):
        for layer, index in enumerate(args.indices):
            rows = [native.rows_contiguous(x[layer]) for x in (args.k, args.v)]
            offsets, starts = _layer(args.cu_seqlens, layer), _layer(args.cu_indices, layer)
            native.call("compact_", *rows, offsets, index, starts, cos, sin, args.first, check_only)
            if not check_only:
                native.copy_back((args.k[layer], args.v[layer]), rows)


def _tables(args: CompactArgs) -> tuple[Tensor | None, Tensor | None]:
    if args.cos is None or args.sin is None:
        return None, None
    return native.rows_contiguous(args.cos), native.rows_contiguous(args.sin)


def _layer(offsets: list[Tensor], layer: int) -> Tensor | None:
    return offsets[layer] if offsets else None
