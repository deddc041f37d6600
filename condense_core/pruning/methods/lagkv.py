"""LagKV: tokens that spread beyond the range of those that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringMethod, check_count


@dataclass(frozen=True, kw_only=True, repr=False)
class LagKV(ScoringMethod):
    """``score_i = rank of s_i in its chunk / lag``, ``s = (softmax std_c z(k) + softmax std_c z(v)) / 2``.

    Liang et al., arXiv 2504.04704. After the sinks the sequence is cut into chunks of ``lag`` tokens. ``z(x)_ic = (x_ic
    - min_c) / (max_c - min_c)``, extremes over the next chunk; the standard deviation is over channels c, the softmax
    over the chunk. The sinks, the last full chunk and what follows it are kept. A sequence of fewer than ``sink + 2 *
    lag`` tokens has nothing to compare: the later a token, the higher it scores. See ``ops.lag_scores`` for ties and
    channels without a range.

    Attributes:
        sink: the first tokens, which are kept, >= 0.
        lag: tokens of a chunk, >= 1.
    """

    name = "lagkv"
    summary = "tokens whose keys and values vary most, relative to the range of the next chunk"
    paper = "2504.04704"
    sink: int = 4
    lag: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("LagKV: sink", self.sink, minimum=0)
        check_count("LagKV: lag", self.lag, minimum=1)

    @property
    def protected(self) -> int:
        """The sinks and the last full chunk; up to ``lag - 1`` tokens behind it are kept as well."""
        return self.sink + self.lag

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return ops.lag_scores(k, v, lag_size=self.lag, sink=self.sink, bounds=ctx.bounds)
