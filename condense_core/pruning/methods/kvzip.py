"""KVzip: what is looked at when the context is read again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, ScoringMethod, ScoringPass, Traits, check_count
from condense_core.pruning.methods.common import attention_blocks
from condense_core.pruning.prompt import Prompt

_REPEAT = "Repeat the previous context exactly."
_GO_ON = "Repeat the part of the previous context exactly, starting with"
_OVERLAP = 8  # tokens before a chunk that say where it begins


@dataclass(frozen=True, kw_only=True, repr=False)
class KVzip(ScoringMethod):
    """``score_i = max over the appended queries and a group's query heads of softmax(q k / sqrt(D))_i``.

    Kim et al., arXiv 2505.23416: behind the context the model is asked to repeat it and given the repetition, ``chunk``
    tokens in a scoring pass; what these tokens attend to is kept. This costs a second prefill, and nothing can be
    evicted before the context is complete.

    The softmax is over all that a query sees: the context, and the appended tokens up to its own. The authors and
    kvpress take only the sinks, the chunk that is repeated and the appended tokens, which is the same for a context of
    one chunk. They also let the heads of all layers compete for one budget: ``AcrossLayers(KVzip(...))``.

    Where a text is read (``text.prefill``), the request is written in the model's chat template, in the authors' words:
    "Repeat the previous context exactly.", and from the second chunk on "Repeat the part of the previous context
    exactly, starting with" the last 8 tokens before the chunk. Token ids alone are repeated without a request.

    Attributes:
        prompt_ids: tokens of the request to repeat the context, between the context and its repetition; None: as above.
        chunk: tokens of the context that one scoring pass repeats, >= 1.
        sink: the first tokens, which are kept, >= 0.
        requests: the request for each chunk of one text, instead of prompt_ids, as ``for_prompt`` writes them.
        first: the first token to repeat, >= 0: what the chat template writes before the text is not.
    """

    name = "kvzip"
    summary = "tokens that are attended to when the model repeats the context"
    paper = "2505.23416"
    traits = Traits(prefills_only=True, any_budget=True)
    prompt_ids: tuple[int, ...] | None = None
    chunk: int = 2048
    sink: int = 4
    requests: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    first: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_ids is not None and not isinstance(self.prompt_ids, tuple):
            raise TypeError(f"KVzip: prompt_ids is {self.prompt_ids!r}, expected a tuple of token ids")
        for i, token in enumerate(self.prompt_ids or ()):
            check_count(f"KVzip: prompt_ids[{i}]", token, minimum=0)
        check_count("KVzip: chunk", self.chunk, minimum=1)
        check_count("KVzip: sink", self.sink, minimum=0)
        check_count("KVzip: first", self.first, minimum=0)

    @property
    def protected(self) -> int:
        return self.sink

    def for_prompt(self, prompt: Prompt) -> KVzip:
        if self.prompt_ids is not None:
            return self
        ids, first = prompt.input_ids, min(prompt.text_start, len(prompt.input_ids) - 1)
        requests = []
        for start in range(first, len(ids), self.chunk):
            before = prompt.tokenizer.decode(ids[max(start - _OVERLAP, first) : start])
            requests.append(prompt.behind(_REPEAT if start == first else f"{_GO_ON}{before}"))
        return replace(self, requests=tuple(requests), first=first)

    def scoring_passes(self, num_tokens: int) -> list[ScoringPass]:
        starts = range(self.first if self.first < num_tokens else 0, num_tokens, self.chunk)
        requests = self.requests or (self.prompt_ids or (),) * len(starts)
        return [
            ScoringPass(request, start, min(start + self.chunk, num_tokens))
            for request, start in zip(requests, starts, strict=False)
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
