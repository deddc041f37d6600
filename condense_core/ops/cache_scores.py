"""Scores of cached tokens that need no queries: the public functions, and their registration.

All of them take keys or values of one layer, `[B, G, N, D]` with any strides, and give `[B, G, N]` in fp32; a higher
score is more worth keeping. The tokens of a padded batch that are real are given by `bounds`, which stays on the
device: no function here waits for it. Padding scores -inf, a token that must be kept +inf. Not differentiable.
"""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import KeyNormArgs, KeySimilarityArgs, LagScoresArgs, ValueProjectionNormArgs
from condense_core.ops.library import define


def key_norm(k: Tensor, *, sink: int = 0, window: int = 0, bounds: Tensor | None = None) -> Tensor:
    """Score keys by `-||k_i||_2`: keys of small norm draw attention. Devoto et al., arXiv 2406.11430.

    Args:
        k: `[B, G, N, D]` float32, bfloat16 or float16: keys of B sequences and G key-value heads; N may be 0.
        sink: how many of the first real tokens of every sequence score +inf, >= 0.
        window: how many of the last real tokens of every sequence score +inf, >= 0.
        bounds: `[B, 2]` int32 or int64 on k's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others score -inf. None: all are real.

    Returns:
        `[B, G, N]` float32.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    tokens = _check_keys(k, sink, window, bounds)
    scores: Tensor = _key_norm(k, min(sink, tokens), min(window, tokens), bounds)
    return scores


def key_similarity(k: Tensor, *, sink: int = 0, window: int = 0, bounds: Tensor | None = None) -> Tensor:
    """Score keys by `-cos(k_i, mean_j k_j / ||k_j||)`: those that point elsewhere than the rest. KeyDiff, arXiv
    2504.15364.

    The mean is over the real tokens j of the same sequence and head. Norms are clamped from below to 1e-12 in it and to
    1e-8 in the cosine, as by `torch.nn.functional.normalize` and `cosine_similarity`.

    Args:
        k: `[B, G, N, D]` float32, bfloat16 or float16: keys of B sequences and G key-value heads; N may be 0.
        sink: how many of the first real tokens of every sequence score +inf, >= 0.
        window: how many of the last real tokens of every sequence score +inf, >= 0.
        bounds: `[B, 2]` int32 or int64 on k's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others score -inf. None: all are real.

    Returns:
        `[B, G, N]` float32.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    tokens = _check_keys(k, sink, window, bounds)
    scores: Tensor = _key_similarity(k, min(sink, tokens), min(window, tokens), bounds)
    return scores


def lag_scores(k: Tensor, v: Tensor, *, lag_size: int = 128, sink: int = 4, bounds: Tensor | None = None) -> Tensor:
    """Rank tokens in their chunk by how far they spread beyond the range of the next chunk. LagKV, arXiv 2504.04704.

    After its first `sink` tokens a sequence is cut into chunks of `lag_size`. Each full chunk but the last is scored
    against the next one: with low_c and high_c the minimum and maximum of channel c over that one,
    `z_ic = (x_ic - low_c) / (high_c - low_c)`, and the softmax over the chunk of the (unbiased) standard deviation of
    z_i over channels, averaged over keys and values. The score is the rank of that in the chunk / lag_size, from 0 for
    the lowest; of equal tokens the earlier ranks higher. The sinks, the last full chunk and what follows it score +inf.
    In a sequence of n < sink + 2*lag_size real tokens, token i after the sinks scores (i - sink) / (n - sink): the
    later, the higher.

    Departs from kvpress 0.5.5 where that divides by zero: a channel without a range in the next chunk (high - low <
    2^-126) contributes z = 0, and a token whose standard deviation is not finite ranks below the others of its chunk
    instead of making all of them NaN.

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


def value_projection_norm(v: Tensor, w_o: Tensor, *, bounds: Tensor | None = None) -> Tensor:
    """Score values by what they can add to the output: `||W_h v_i||_1`, averaged over the query heads h that share
    them.

    `W_h = w_o[:, h*D:(h+1)*D]` is the part of the output projection that reads head h; heads g*H/G to (g+1)*H/G - 1
    share the values of head g. CriticalKV, arXiv 2502.03805.

    Args:
        v: `[B, G, N, D]` float32, bfloat16 or float16: values of B sequences and G key-value heads; N may be 0.
        w_o: `[d_model, H*D]`, the weight of the output projection as `nn.Linear` has it, of v's dtype and device; H is
            a multiple of G.
        bounds: `[B, 2]` int32 or int64 on v's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others score -inf. None: all are real.

    Returns:
        `[B, G, N]` float32.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_cache("v", v)
    _check_projection(w_o, v)
    checks.check_bounds(bounds, v)
    scores: Tensor = _value_projection_norm(v, w_o, bounds)
    return scores


def _check_keys(k: Tensor, sink: int, window: int, bounds: Tensor | None) -> int:
    """The number of tokens, once all is as `key_norm` describes it."""
    checks.check_cache("k", k)
    checks.check_int("sink", sink, minimum=0)
    checks.check_int("window", window, minimum=0)
    checks.check_bounds(bounds, k)
    return k.shape[2]


def _check_projection(w_o: Tensor, v: Tensor) -> None:
    """w_o must be `[d_model, H*D]` of v's dtype and device, H a multiple of v's G heads."""
    if not isinstance(w_o, Tensor):
        raise TypeError(f"w_o is a {type(w_o).__name__}, expected a torch.Tensor")
    if w_o.dtype != v.dtype:
        raise TypeError(f"w_o has dtype {w_o.dtype}, expected {v.dtype}, as v has")
    if w_o.layout != torch.strided:
        raise TypeError(f"w_o has layout {w_o.layout}, expected a dense (torch.strided) tensor")
    if w_o.device != v.device:
        raise ValueError(f"w_o is on {w_o.device}, expected {v.device}, where v is")
    heads, head_dim = v.shape[1], v.shape[3]
    if w_o.dim() != 2 or w_o.shape[0] < 1 or w_o.shape[1] < 1 or w_o.shape[1] % (heads * head_dim):
        raise ValueError(
            f"w_o has shape {list(w_o.shape)}, expected [d_model, H*D] with d_model >= 1, D = {head_dim} "
            f"and H a multiple of v's {heads} heads"
        )


def _fake(args: KeyNormArgs | KeySimilarityArgs | LagScoresArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


def _fake_value_projection_norm(args: ValueProjectionNormArgs) -> Tensor:
    return args.v.new_empty(args.v.shape[:3], dtype=torch.float32)


_key_norm = define("key_norm", KeyNormArgs, "Tensor", fake=_fake)
_key_similarity = define("key_similarity", KeySimilarityArgs, "Tensor", fake=_fake)
_lag_scores = define("lag_scores", LagScoresArgs, "Tensor", fake=_fake)
_value_projection_norm = define(
    "value_projection_norm", ValueProjectionNormArgs, "Tensor", fake=_fake_value_projection_norm
)
