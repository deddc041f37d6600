"""`key_similarity`: how alike a key is to the mean direction of all keys.

Specification: condense_core/ops/reference/key_similarity.py. Kernels: kernels/key_similarity.py,
csrc/cpu/kernels/key_similarity.h.
"""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import KeySimilarityArgs
from condense_core.ops.library import define


def key_similarity(k: Tensor, *, sink: int = 0, window: int = 0, bounds: Tensor | None = None) -> Tensor:
    """Score keys by `-cos(k_i, mean_j k_j / ||k_j||)`: those that point elsewhere than the rest. arXiv 2504.15364.

    KeyDiff. The mean is over the real tokens j of the same sequence and head. Norms are clamped from below to 1e-12 in
    it and to 1e-8 in the cosine, as by `torch.nn.functional.normalize` and `cosine_similarity`. Not differentiable.

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
    checks.check_keys(k, sink, window, bounds)
    tokens = k.shape[2]
    scores: Tensor = _key_similarity(k, min(sink, tokens), min(window, tokens), bounds)
    return scores


def _fake(args: KeySimilarityArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


_key_similarity = define("key_similarity", KeySimilarityArgs, "Tensor", fake=_fake)
