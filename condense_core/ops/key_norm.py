"""`key_norm`: the norm of a key as its score.

Specification: condense_core/ops/reference/key_norm.py. Kernels: kernels/key_norm.py, csrc/cpu/kernels/key_norm.h.
"""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import KeyNormArgs
from condense_core.ops.library import define


def key_norm(k: Tensor, *, sink: int = 0, window: int = 0, bounds: Tensor | None = None) -> Tensor:
    """Score keys by `-||k_i||_2`: keys of small norm draw attention. Devoto et al., arXiv 2406.11430.

    Not differentiable.

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
    scores: Tensor = _key_norm(k, min(sink, tokens), min(window, tokens), bounds)
    return scores


def _fake(args: KeyNormArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


_key_norm = define("key_norm", KeyNormArgs, "Tensor", fake=_fake)
