"""`window_scores`: the attention that the last queries of a sequence give to a key.

Specification: condense_core/ops/reference/window_scores.py. Kernels: kernels/window_scores.py,
csrc/cpu/kernels/window_scores.h.
"""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import WindowScoresArgs
from condense_core.ops.library import define


def window_scores(
    q_win: Tensor, k: Tensor, *, scale: float | None = None, kernel_size: int = 5, bounds: Tensor | None = None
) -> Tensor:
    """Score every key by the attention that the last w queries of its sequence give it: SnapKV.

    The score of a key is computed in this order:

    1. softmax of `scale * <q, k>` over the keys of the sequence, causal inside the window, whose columns are dropped;
    2. the mean over the w queries;
    3. the sum over kernel_size neighbouring keys (zeros beyond either end), divided by kernel_size;
    4. the mean over the query heads of a group.

    The keys of the window itself are always kept. Not differentiable.

    TOVA is w = 1, kernel_size = 1 and a mean over the G heads of the result. PyramidKV has the same scores and varies
    the number of kept keys from layer to layer. Finch is kernel_size = 1 with the question's queries as the window;
    its optional weighting of every query by the number of keys before it is not part of this op.

    Args:
        q_win: `[B, H, w, D]` float32, bfloat16 or float16: the queries of the last w real tokens of each sequence after
            RoPE, row t that of token stop - w + t; H a multiple of G, 1 <= w <= N. Rows before the first token of a
            sequence shorter than w are not read.
        k: `[B, G, N, D]` keys as the cache holds them, of q_win's dtype and device.
        scale: factor on the logits; None for `1 / sqrt(D)`.
        kernel_size: width of the pooling, odd, >= 1.
        bounds: `[B, 2]` int32 or int64 on k's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others score -inf. None: all are real.

    Returns:
        `[B, G, N]` float32, higher for keys to keep: +inf in the window, -inf for padding.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    SnapKV, arXiv 2404.14469; TOVA, arXiv 2401.06104.
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
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    scores: Tensor = _window_scores(q_win, k, scale, kernel_size, bounds)
    return scores


def _fake(args: WindowScoresArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


_window_scores = define("window_scores", WindowScoresArgs, "Tensor", fake=_fake)
