"""KVzip: what is looked at when the context is read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, ScoringMethod, ScoringPass, Traits, check_count
from condense_core.pruning.methods.common import attention_blocks


@dataclass(frozen=True, kw_only=True, repr=False)
class KVzip(ScoringMethod):
    """``score_i = max over the appended queries and a group's query heads of softmax(q k / sqrt(D))_i``.

    Kim et al., arXiv 2505.23416: behind the context the model is asked to repeat it and given the repetition, ``chunk``
    tokens in a scoring pass; what these tokens attend to is kept. This costs a second prefill, and nothing can be
    evicted before the context is complete.

    The softmax is over all that a query sees: the context, and the appended tokens up to its own. The authors and
    kvpress take only the sinks, the chunk that is repeated and the appended tokens, which is the same for a context of
    one chunk; from the second chunk on they also append the last 8 tokens of the chunk before, behind the prompt.

    Attributes:
        prompt_ids: tokens of the request to repeat the context, between the context and its repetition.
        chunk: tokens of the context that one scoring pass repeats, >= 1.
        sink: the first tokens, which are kept, >= 0.
    """

    name = "kvzip"
    summary = "tokens that are attended to when the model repeats the context"
    paper = "2505.23416"
    traits = Traits(prefills_only=True)
    prompt_ids: tuple[int, ...] = ()
    chunk: int = 2048
    sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prompt_ids, tuple):
            raise TypeError(f"KVzip: prompt_ids is {self.prompt_ids!r}, expected a tuple of token ids")
        for i, token in enumerate(self.prompt_ids):
            check_count(f"KVzip: prompt_ids[{i}]", token, minimum=0)
        check_count("KVzip: chunk", self.chunk, minimum=1)
        check_count("KVzip: sink", self.sink, minimum=0)

    @property
    def protected(self) -> int:
        return self.sink

    def scoring_passes(self, num_tokens: int) -> list[ScoringPass]:
        return [
            ScoringPass(self.prompt_ids, start, min(start + self.chunk, num_tokens))
            for start in range(0, num_tokens, self.chunk)
        ]

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        if ctx.scoring_pass is None:
            raise ValueError(
                "KVzip: ctx.scoring_pass is None, expected one of scoring_passes(); only the queries of a repetition "
                "of the context can score it, so nothing can be evicted before"
            )
        past = k.shape[2] - q.shape[2]
        best = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
        for _, weights in attention_blocks(q, k, scale=ctx.scale, bounds=ctx.bounds, appended=True):
            width = weights.shape[-1]
            best[:, :, :width] = torch.maximum(best[:, :, :width], weights.amax(dim=(2, 3)))
        column = torch.arange(k.shape[2], device=k.device)
        offset = 0 if ctx.bounds is None else ctx.bounds[:, 0, None, None]
        repeated = (
            (column >= offset + ctx.scoring_pass.start) & (column < offset + ctx.scoring_pass.stop) & (column < past)
        )
        return ctx.protect(best.masked_fill(~repeated, 0.0), sink=self.sink)
