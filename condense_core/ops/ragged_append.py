"""`ragged_append`: new rows behind the valid ones of a ragged cache.

Specification: condense_core/ops/reference/ragged_append.py. Kernels: csrc/cpu/kernels/ragged_append.h,
csrc/cuda/ragged_append.cu.
"""

from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import RaggedAppendArgs
from condense_core.ops.library import define


def ragged_append(k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Tensor, k_new: Tensor, v_new: Tensor) -> None:
    """Add the keys and values of new tokens to a ragged cache, in place, without moving what it holds.

    The cache is that of `ragged_decode_attention`: head n = b*G + g has room for the rows `cu_seqlens[n]` to
    `cu_seqlens[n + 1]`, of which the first `lengths[n]` are valid. Row j of the new ones goes behind them, and
    `lengths[n]` grows by t. Rows that find no room are not written. An error would need the lengths on the host, so
    that a GPU would be waited for; instead, a length above the room shows it when it is next read.

    Args:
        k: `[T, D]` float32, bfloat16 or float16, the keys; rows may be strided. Written.
        v: `[T, D]`, the values, likewise. Written.
        cu_seqlens: `[B*G+1]` int32 or int64 on k's device, ascending, clamped to [0, T].
        lengths: `[B*G]` int32 or int64 on k's device. Written.
        k_new: `[B, G, t, D]` of k's dtype and device, the keys of t new tokens.
        v_new: `[B, G, t, D]`, likewise.

    Raises:
        TypeError, ValueError: an argument is not as described, or buffers overlap; the message names it.
    """
    checks.check_rows("k", k)
    checks.check_rows("v", v, like=("k", k))
    checks.check_cache("k_new", k_new)
    checks.check_cache("v_new", v_new, like=("k_new", k_new))
    checks.check_alike("k_new", k_new, ("k", k))
    heads = k_new.shape[0] * k_new.shape[1]
    if k_new.shape[3] != k.shape[1]:
        raise ValueError(f"k_new has shape {list(k_new.shape)}, expected [B, G, t, D] with D = {k.shape[1]}")
    checks.check_integers("cu_seqlens", cu_seqlens, ("k", k), "[B*G+1]", length=heads + 1)
    checks.check_integers("lengths", lengths, ("k", k), "[B*G]", length=heads)
    _ragged_append(k, v, cu_seqlens, lengths, k_new, v_new)


def _check_buffers(args: RaggedAppendArgs) -> RaggedAppendArgs:
    checks.check_apart(
        written={"k": args.k, "v": args.v, "lengths": args.lengths},
        read={"cu_seqlens": args.cu_seqlens, "k_new": args.k_new, "v_new": args.v_new},
    )
    return args


def _fake(args: RaggedAppendArgs) -> None:
    pass


_ragged_append = define(
    "ragged_append", RaggedAppendArgs, "()", fake=_fake, check=_check_buffers, mutates=("k", "v", "lengths")
)
