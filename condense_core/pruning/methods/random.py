"""Random: the floor that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, ScoringMethod, check_count
from condense_core.pruning.methods.common import token_positions

_WORD = (1 << 32) - 1
Word = TypeVar("Word", int, Tensor)


@dataclass(frozen=True, kw_only=True, repr=False)
class Random(ScoringMethod):
    """``score_i`` uniform in [0, 1): a hash of seed, layer, head and the token's position in its sequence.

    No generator is involved: the scores are the same on every device, in every batch, whatever the padding, and however
    the prefill was cut into chunks.

    Attributes:
        seed: >= 0; another one gives other scores.
    """

    name = "random"
    summary = "random tokens: the baseline that a method has to beat"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Random: seed", self.seed, minimum=0)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        start = _mixed(_mixed(self.seed & _WORD) ^ (self.seed >> 32 & _WORD)) + ctx.layer_idx & _WORD
        head = _mixed(torch.arange(k.shape[1], device=k.device) + _mixed(start) & _WORD)
        bits = _mixed(token_positions(k, ctx) + head.view(1, -1, 1) & _WORD)
        # 24 bits are what float32 holds exactly.
        return ctx.protect((bits >> 8).float().mul(2.0**-24).expand(k.shape[:3]))


def _mixed(word: Word) -> Word:
    """A bijection of 32-bit words that spreads every bit; both factors are below 2**31, so int64 never overflows.

    Chris Wellons' "lowest bias" constants for the multiply-xorshift scheme.
    """
    word = word ^ (word >> 16)
    word = word * 0x21F0AAAD & _WORD
    word = word ^ (word >> 15)
    word = word * 0x735A2D97 & _WORD
    return word ^ (word >> 15)
