"""`ragged_append` on the CPU."""

from condense_core.ops import native
from condense_core.ops.arguments import RaggedAppendArgs


def ragged_append(args: RaggedAppendArgs) -> None:
    """New rows behind the valid ones of each head; the kernel is csrc/cpu/kernels/ragged_append.h."""
    rows = [native.rows_contiguous(x) for x in (args.k, args.v)]
    new = [native.rows_contiguous(x) for x in (args.k_new, args.v_new)]
    native.call("ragged_append", *rows, args.cu_seqlens, args.lengths, *new)
    native.copy_back((args.k, args.v), rows)
