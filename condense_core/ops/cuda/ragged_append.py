"""`ragged_append` on a GPU."""

from condense_core.ops import native
from condense_core.ops.arguments import RaggedAppendArgs
from condense_core.ops.cuda import launch


def ragged_append(args: RaggedAppendArgs) -> None:
    """New rows behind the valid ones of each head, in one launch; the kernel is csrc/cuda/ragged_append.cu."""
    k, v = native.rows_contiguous(args.k), native.rows_contiguous(args.v)
    launch(
        "ragged_append",
        args.k.device,
        k=k,
        v=v,
        cu_seqlens=args.cu_seqlens,
        lengths=args.lengths,
        k_new=native.rows_contiguous(args.k_new),
        v_new=native.rows_contiguous(args.v_new),
    )
    native.copy_back((args.k, args.v), (k, v))
