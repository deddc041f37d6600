"""`ragged_append` on a GPU."""

from condense_core.ops import native
from condense_core.ops.arguments import RaggedAppendArgs
from condense_core.ops.cuda import launch


def ragged_append(args: RaggedAppendArgs) -> None:
    """New rows behind the valid ones of each head, in one launch; the kernel is csrc/cuda/ragged_append.cu."""
    rows = [native.rows_contiguous(x) for x in (args.k, args.v)]
    new = [native.rows_contiguous(x) for x in (args.k_new, args.v_new)]
    launch("ragged_append", args.k.device, *rows, args.cu_seqlens, args.lengths, *new)
    native.copy_back((args.k, args.v), rows)
