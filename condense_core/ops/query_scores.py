"""Scoring cached keys by the attention that queries give them: the public functions, and their registration."""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import NonCausalChunksArgs, WindowScoresArgs
from condense_core.ops.library import define


def window_scores(
    q_win: Tensor, k: Tensor, *, scale: float | None = None, kernel_size: int = 5, bounds: Tensor | None = None
) -> Tensor:
    """Score every key by the attention that the last w queries of its sequence give it: SnapKV.

    Softmax of `scale * <q, k>` over the keys of the sequence, causal inside the window; the columns of the window
    itself are dropped; mean over the w queries; sum over kernel_size neighbouring keys (zeros beyond either end),
    divided by kernel_size; mean over the query heads of a group. The keys of the window are kept in any case.

    TOVA is w = 1, kernel_size = 1 and a mean over the G heads of the result. PyramidKV scores as this does and varies
    the number of kept keys from layer to layer. Finch is kernel_size = 1 with the question's queries as the window, but
    for its optional weighting of every query by the number of keys before it, which this op does not do.

    Args:
        q_win: `[B, H, w, D]` float32, bfloat16 or float16: the queries of the last w real tokens of each sequence,
            positions applied (RoPE), row t that of token stop - w + t; H a multiple of G, 1 <= w <= N. Rows before the
            first token of a sequence shorter than w are not looked at.
        k: `[B, G, N, D]` keys as the cache holds them, of q_win's dtype and device.
        scale: factor on the logits; None for `1 / sqrt(D)`.
        kernel_size: width of the pooling, odd, >= 1.
        bounds: `[B, 2]` int32 or int64: tokens start <= i < stop of a sequence are real, on either side is padding;
            clamped to [0, N]. None when all are real.

    Returns:
        `[B, G, N]` float32, higher for keys to keep: +inf in the window, -inf for padding.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Source: SnapKV, https://arxiv.org/abs/2404.14469; TOVA, https://arxiv.org/abs/2401.06104.
    """
    checks.check_cache("k", k)
    checks.check_cache_queries("q_win", q_win, k)
    checks.check_scale(scale)
    checks.check_int("kernel_size", kernel_size, minimum=1)
    checks.check_bounds(bounds, k)
    window, num_tokens = q_win.shape[2], k.shape[2]
    if window > num_tokens:
        raise ValueError(
            f"q_win has {window} queries (shape {list(q_win.shape)}), expected at most k's {num_tokens} tokens"
        )
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, expected an odd int >= 1")
    scores: Tensor = _window_scores(q_win, k, _scale(scale, k), kernel_size, bounds)
    return scores


def non_causal_chunks(
    q: Tensor, k: Tensor, *, chunk_size: int = 256, scale: float | None = None, bounds: Tensor | None = None
) -> Tensor:
    """Score every key by the attention that it gets from all queries of its chunk, later ones too: Compactor.

    The tokens of a sequence are cut into chunks of chunk_size from its first one on; the last may be short. Softmax of
    `scale * <q, k>` of every query over the keys of its chunk, without a causal mask; sum over the queries; mean over
    the query heads of a group. What Compactor does with that, times the norm of the value, smoothed, normalised,
    belongs to the method.

    Args:
        q: `[B, H, N, D]` float32, bfloat16 or float16: the query of every token, positions applied (RoPE); H a multiple
            of G.
        k: `[B, G, N, D]` keys as the cache holds them, of q's dtype and device; N may be 0.
        chunk_size: tokens per chunk, >= 1.
        scale: factor on the logits; None for `1 / sqrt(D)`. kvpress takes 1.
        bounds: `[B, 2]` int32 or int64: tokens start <= i < stop of a sequence are real, on either side is padding;
            clamped to [0, N]. None when all are real.

    Returns:
        `[B, G, N]` float32, higher for keys to keep; a chunk's scores add up to its length. -inf for padding.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Source: Compactor, https://arxiv.org/abs/2507.08143.
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
    # A wider chunk sees no more; its width stays within 64 bits whatever is asked for.
    scores: Tensor = _non_causal_chunks(q, k, min(chunk_size, max(k.shape[2], 1)), _scale(scale, k), bounds)
    return scores


def _scale(scale: float | None, k: Tensor) -> float:
    return k.shape[-1] ** -0.5 if scale is None else float(scale)


def _fake(args: WindowScoresArgs | NonCausalChunksArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


_window_scores = define("window_scores", WindowScoresArgs, "Tensor", fake=_fake)
_non_causal_chunks = define("non_causal_chunks", NonCausalChunksArgs, "Tensor", fake=_fake)
