"""`compact` and `compact_` on the CPU; the kernel is csrc/cpu/kernels/compact.h."""

from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import CompactArgs


def compact(args: CompactArgs) -> tuple[list[Tensor], list[Tensor]]:
    """The rows at `indices`, in new tensors."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer, index in enumerate(args.indices):
        k, v = native.rows_contiguous(args.k[layer]), native.rows_contiguous(args.v[layer])
        k_out, v_out = (x.new_empty(*index.shape, x.shape[-1]) for x in (k, v))
        native.call("compact", k=k, v=v, k_out=k_out, v_out=v_out, **_places(args, layer))
        keys.append(k_out)
        values.append(v_out)
    return keys, values


def compact_(args: CompactArgs) -> None:
    """The rows at `indices` to the front of their heads."""
    # The indices of all layers are checked before a row of the first moves; the kernel checks those of a single one.
    for check_only in (True, False) if len(args.k) > 1 else (False,):
        for layer in range(len(args.k)):
            k, v = native.rows_contiguous(args.k[layer]), native.rows_contiguous(args.v[layer])
            native.call("compact_", k=k, v=v, check_only=check_only, **_places(args, layer))
            if not check_only:
                native.copy_back((args.k[layer], args.v[layer]), (k, v))


def _places(args: CompactArgs, layer: int) -> dict[str, Tensor | None]:
    """The arguments that say where the rows of a layer come from and go to, and how keys turn on the way."""
    return {
        "cu_seqlens": args.cu_seqlens[layer] if args.cu_seqlens else None,
        "indices": args.indices[layer],
        "cu_indices": args.cu_indices[layer] if args.cu_indices else None,
        "cos": None if args.cos is None else native.rows_contiguous(args.cos),
        "sin": None if args.sin is None else native.rows_contiguous(args.sin),
        "first": args.first,
    }
