"""`non_causal_chunks`: the attention that a key gets from all queries of its chunk.

Specification: condense_core/ops/reference/non_causal_chunks.py. Kernels: kernels/non_causal_chunks.py,
csrc/cpu/kernels/non_causal_chunks.h.
"""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import NonCausalChunksArgs
from condense_core.ops.library import define


def non_causal_chunks(
    q: Tensor, k: Tensor, *, chunk_size: int = 256, scale: float | None = None, bounds: Tensor | None = None
) -> Tensor:
    """Score every key by the attention that it gets from all queries of its chunk, later ones too: Compactor.

    The tokens of a sequence are cut into chunks of chunk_size from its first one on; the last may be short. The score
    of a key is the softmax of `scale * <q, k>` of every query over the keys of its chunk, without a causal mask, summed
    over the queries of the chunk and averaged over the query heads of a group. What Compactor does with it (times the
    norm of the value, smoothed, normalised) belongs to the method. Not differentiable.

    Args:
        q: `[B, H, N, D]` float32, bfloat16 or float16: the query of every token after RoPE; H a multiple of G.
        k: `[B, G, N, D]` keys as the cache holds them, of q's dtype and device; N may be 0.
        chunk_size: tokens per chunk, >= 1.
        scale: factor on the logits; None for `1 / sqrt(D)`. kvpress takes 1.
        bounds: `[B, 2]` int32 or int64 on k's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others score -inf. None: all are real.

    Returns:
        `[B, G, N]` float32, higher for keys to keep; a chunk's scores add up to its length. -inf for padding.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Compactor, arXiv 2507.08143.
    """
    checks.check_cache("k", k)
    if isinstance(q, Tensor) and q.dim() == 4 and k.shape[2] == 0:
        # A query per token is none of an empty cache; the check wants at least one.
        checks.check_cache_queries("q", q if q.shape[2] else q.new_empty(*q.shape[:2], 1, q.shape[3]), k)
    else:
        checks.check_cache_queries("q", q, k)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} queries (shape {list(q.shape)}), expected {k.shape[2]}, one for each of k's tokens"
        )
    checks.check_int("chunk_size", chunk_size, minimum=1)
    checks.check_scale(scale)
    checks.check_bounds(bounds, k)
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    chunk_size = min(chunk_size, max(k.shape[2], 1))  # a wider chunk sees no more, and might not fit 64 bits
    scores: Tensor = _non_causal_chunks(q, k, chunk_size, scale, bounds)
    return scores


def _fake(args: NonCausalChunksArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


_non_causal_chunks = define("non_causal_chunks", NonCausalChunksArgs, "Tensor", fake=_fake)
