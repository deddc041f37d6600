"""`ragged_append` on the CPU."""

from condense_core.ops import native
from condense_core.ops.arguments import RaggedAppendArgs


def ragged_append(args: RaggedAppendArgs) -> None:
    """New rows behind the valid ones of each head; the kernel is csrc/cpu/kernels/ragged_append.h."""
    k, v = native.rows_contiguous(args.k), native.rows_contiguous(args.v)
    native.call(
        "ragged_append",
        k=k,
        v=v,
        cu_seqlens=args.cu_seqlens,
        lengths=args.lengths,
        k_new=native.rows_contiguous(args.k_new),
        v_new=native.rows_contiguous(args.v_new),
    )
    native.copy_back((args.k, args.v), (k, v))
