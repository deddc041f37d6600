"""`ragged_decode_attention`: one decode step over heads that kept different numbers of tokens.

Specification: condense_core/ops/reference/ragged_decode_attention.py. Kernels: kernels/ragged_decode_attention.py,
csrc/cpu/kernels/ragged_decode_attention.h.
"""

from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import RaggedDecodeAttentionArgs
from condense_core.ops.library import define


def ragged_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one decode step over a cache in which every KV head kept its own number of tokens.

    The rows of all heads stand one after another, without padding: key-value head g of sequence b is head n = b*G + g,
    and its keys and values are the rows `cu_seqlens[n]` to `cu_seqlens[n + 1]` of k and v, of which the first
    `lengths[n]` are valid. Query head h belongs to key-value head h // (H/G), and

        out[b, h] = sum_i softmax_i(scale * <q[b, h], k[i]>) v[i]

    over its valid rows i. Positions are in the keys, so any rows may have been dropped. Not differentiable.

    Offsets and lengths stay on the device: they may change between replays of a captured CUDA graph, and no call waits
    for them. They are clamped instead of checked: no offset makes the op read outside k and v.

    The layout is the flattened one of AdaKV (Feng et al. 2024, arXiv 2407.11550), and kernels split the keys among
    programs as Flash-Decoding does (Dao et al. 2023).

    Args:
        q: `[B, H, D]` float32, bfloat16 or float16, the queries of one token per sequence, after rotation.
        k: `[T, D]` of q's dtype and device, the keys, after rotation; rows may be strided.
        v: `[T, D]`, likewise, the values.
        cu_seqlens: `[B*G+1]` int32 or int64 on q's device, ascending within [0, T]; G must divide H.
        lengths: `[B*G]` int32 or int64 on q's device, valid rows of every head, cut to the room it has; None for all.
            The rows beyond are never read: room to append to.
        scale: factor on the logits; None for `1 / sqrt(D)`.

    Returns:
        `[B, H, D]` in q's dtype, accumulated in float32; zeros for the query heads of a head without valid rows.
        The same call gives the same bits.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    _check_queries(q)
    checks.check_rows("k", k)
    checks.check_alike("k", k, ("q", q))
    if k.shape[1] != q.shape[2]:
        raise ValueError(f"k has shape {list(k.shape)}, expected [T, D] with D = {q.shape[2]}")
    checks.check_rows("v", v, like=("k", k))
    checks.check_integers("cu_seqlens", cu_seqlens, ("q", q), "[B*G+1]")
    batch, heads, head_dim = q.shape
    caches = len(cu_seqlens) - 1
    if caches < batch or caches % batch or heads % (caches // batch):
        raise ValueError(
            f"cu_seqlens has {len(cu_seqlens)} entries, expected B*G + 1 with B = {batch} and G dividing H = {heads}"
        )
    if lengths is not None:
        checks.check_integers("lengths", lengths, ("q", q), "[B*G]", length=caches)
    checks.check_scale(scale)
    out: Tensor = _ragged_decode_attention(
        q, k, v, cu_seqlens, lengths, head_dim**-0.5 if scale is None else float(scale)
    )
    return out


def _check_queries(q: Tensor) -> None:
    checks.check_float_tensor("q", q)
    if q.dim() != 3 or min(q.shape) < 1:
        raise ValueError(f"q has shape {list(q.shape)}, expected [B, H, D] with B, H and D >= 1")


def _fake(args: RaggedDecodeAttentionArgs) -> Tensor:
    return args.q.new_empty(args.q.shape)


_ragged_decode_attention = define("ragged_decode_attention", RaggedDecodeAttentionArgs, "Tensor", fake=_fake)
