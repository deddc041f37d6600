"""StreamingLLM: the first tokens and the latest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, ScoringMethod, check_count


@dataclass(frozen=True, kw_only=True, repr=False)
class StreamingLLM(ScoringMethod):
    """``score_i = i``, the place among the cached tokens of the sequence: recency.

    Xiao et al., arXiv 2309.17453. The first ``sink`` tokens, on which attention rests, always stay. The paper gives the
    kept tokens new positions: ``Rerotate(StreamingLLM(...))``.

    Attributes:
        sink: the first tokens, which are kept, >= 0.
    """

    name = "streaming_llm"
    summary = "the first tokens and the latest ones"
    paper = "2309.17453"
    sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("StreamingLLM: sink", self.sink, minimum=0)

    @property
    def protected(self) -> int:
        return self.sink

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        # Columns are in the order of the sequence, also after tokens were evicted; float32 holds 2**24 of them exactly.
        place = torch.arange(k.shape[2], device=k.device, dtype=torch.float32).view(1, 1, -1)
        if ctx.bounds is not None:
            place = place - ctx.bounds[:, :1, None]
        return ctx.protect(place.expand(k.shape[:3]), sink=self.sink)
