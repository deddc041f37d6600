"""`select`: the tokens to keep, exact top-k by radix, without waiting for the device.

Specification: condense_core/ops/reference/select.py. Kernels: csrc/cpu/kernels/select.h, csrc/cuda/select.cu.
"""

from typing import Literal

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import SelectArgs
from condense_core.ops.library import define


def select(
    scores: Tensor, budget: int, *, scope: Literal["head", "layer"] = "head", protect: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens with the highest scores, in ascending order of position.

    Tokens rank by score. Those in a range of `protect`, and those that score +inf, rank above all others; NaN ranks
    below every number; a token that scores -inf is padding and never kept, protected or not. Of equal tokens the
    earlier ranks higher (-0.0 equals 0.0), across heads that of the earlier head. The result is exact, and the same
    every time it is computed.

    Args:
        scores: `[B, G, N]` float32, as the score ops give them; N may be 0.
        budget: tokens to keep per head, >= 0.
        scope: "head": each head keeps its own `budget` tokens. "layer": the G heads of a sequence share G*budget
            tokens, which go to the highest scores wherever they are (AdaKV, Feng et al. 2024, arXiv 2407.11550).
        protect: `[B, P, 2]` or `[1, P, 2]` int32 or int64 on scores' device: P ranges start <= i < stop of tokens to
            keep before all others, clamped to [0, N]; None for none. If they are more than the budget, the earlier
            ones are kept.

    Returns:
        indices: int64, -1 where fewer tokens than the budget can be kept. scope "head": `[B, G, min(budget, N)]`.
            "layer": `[B, min(G*budget, G*N)]`, the tokens of head 0, then those of head 1, and so on, without gaps.
        counts: `[B, G]` int64, how many tokens each head keeps.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores is a {type(scores).__name__}, expected a torch.Tensor")
    if scores.dtype != torch.float32 or scores.layout != torch.strided:
        raise TypeError(f"scores is {scores.dtype} ({scores.layout}), expected a dense torch.float32 tensor")
    if scores.dim() != 3 or min(scores.shape[:2]) < 1:
        raise ValueError(f"scores has shape {list(scores.shape)}, expected [B, G, N] with B and G >= 1")
    checks.check_int("budget", budget, minimum=0)
    if scope not in ("head", "layer"):
        raise ValueError(f"scope is {scope!r}, expected 'head' or 'layer'")
    batch, _, num_tokens = scores.shape
    if protect is not None:
        checks.check_integers("protect", protect, ("scores", scores), "[B or 1, P, 2]", rank=3)
        if protect.shape[0] not in (1, batch) or protect.shape[2] != 2:
            raise ValueError(f"protect has shape {list(protect.shape)}, expected [B or 1, P, 2] with B = {batch}")
    indices, counts = _select(scores, min(budget, num_tokens), scope == "layer", protect)
    return indices, counts


def _fake(args: SelectArgs) -> tuple[Tensor, Tensor]:
    batch, heads, _ = args.scores.shape
    shape = (batch, heads * args.budget) if args.across_heads else (batch, heads, args.budget)
    return args.scores.new_empty(shape, dtype=torch.int64), args.scores.new_empty(batch, heads, dtype=torch.int64)


_select = define("select", SelectArgs, "(Tensor indices, Tensor counts)", fake=_fake)
