"""`lag_scores`: how far a token spreads beyond the range of those that follow it.

Specification: condense_core/ops/reference/lag_scores.py. Kernels: kernels/lag_scores.py, csrc/cpu/kernels/lag_scores.h.
"""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import LagScoresArgs
from condense_core.ops.library import define


def lag_scores(k: Tensor, v: Tensor, *, lag_size: int = 128, sink: int = 4, bounds: Tensor | None = None) -> Tensor:
    """Rank tokens in their chunk by how far they spread beyond the range of the next chunk. LagKV, arXiv 2504.04704.

    After its first `sink` tokens a sequence is cut into chunks of `lag_size`. Each full chunk but the last is scored
    against the next one. With low_c and high_c the minimum and maximum of channel c over that next chunk,

        z_ic = (x_ic - low_c) / (high_c - low_c)
        info_i = softmax over the chunk of the unbiased standard deviation of z_i over channels

    and the score is the rank of info, averaged over keys and values, in the chunk / lag_size, from 0 for the lowest; of
    equal tokens the earlier ranks higher. The sinks, the last full chunk and what follows it score +inf. In a sequence
    of n < sink + 2*lag_size real tokens, token i after the sinks scores (i - sink) / (n - sink). Not differentiable.

    kvpress 0.5.5 divides by zero in two cases that are defined here: a channel without a range in the next chunk (high
    - low < 2^-126) contributes z = 0, and a token whose standard deviation is not finite ranks below the others of its
    chunk instead of making all of them NaN.

    Args:
        k: `[B, G, N, D]` float32, bfloat16 or float16: keys of B sequences and G key-value heads; N may be 0.
        v: values, of k's shape, dtype and device.
        lag_size: tokens of a chunk, >= 1.
        sink: how many of the first real tokens of every sequence score +inf, >= 0.
        bounds: `[B, 2]` int32 or int64 on k's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others score -inf. None: all are real.

    Returns:
        `[B, G, N]` float32.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_cache("k", k)
    checks.check_cache("v", v, like=("k", k))
    checks.check_int("lag_size", lag_size, minimum=1)
    checks.check_int("sink", sink, minimum=0)
    checks.check_bounds(bounds, k)
    # A chunk larger than the cache compares as little as one of its size: every sequence is too short.
    tokens = k.shape[2]
    scores: Tensor = _lag_scores(k, v, min(lag_size, max(tokens, 1)), min(sink, tokens), bounds)
    return scores


def _fake(args: LagScoresArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


_lag_scores = define("lag_scores", LagScoresArgs, "Tensor", fake=_fake)
