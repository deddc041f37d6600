"""Sentences: whole sentences stay or go, the same ones in every head of every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, Method, Traits, Wrapper, check_count
from condense_core.pruning.methods.common import token_positions
from condense_core.pruning.prompt import Prompt
from condense_core.pruning.wrappers.nesting import refuse_decoding, refuse_unbounded


@dataclass(frozen=True, repr=False)
class Sentences(Wrapper):
    """``score_i = mean over the tokens of i's sentence of (mean over layers of max over heads of the method's score)``.

    Heads that keep tokens of their own choice keep a number's digits in one layer and lose them in the next; a model
    that copies digits one by one then answers with another number. Here a token stays everywhere or nowhere, and with
    it its sentence: what stays can be read. The layers are those in the middle of the model, where attention looks
    facts up; the first and last ones look at the neighbourhood and at sinks. Selection by sentences is that of
    extractive prompt compression (arXiv 2407.08892); ChunkKV (arXiv 2502.00299) keeps chunks of a fixed length, in each
    head others.

    Sentences are known where a text is read (``text.prefill``); elsewhere runs of ``width`` tokens stand for them. What
    the chat template writes before the text stays. The tokens of a sentence tie, and the earlier of equal tokens ranks
    higher, so that of the sentence at the edge of the budget the first tokens stay.

    Nothing is evicted before all layers have read the context (in a prefill in chunks, the chunk).

    Attributes:
        layers: which layers score, as shares of the model's depth, ``0 <= first < last <= 1``.
        width: tokens of a run, where sentences are not known, >= 1.
        starts: the tokens at which sentences begin, ascending, of one text; what stands before is kept.
    """

    name = "sentences"
    summary = "keeps or evicts whole sentences, the same ones in every layer"
    paper = "2407.08892"
    layers: tuple[float, float] = (0.4, 0.67)
    width: int = 24
    starts: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Sentences: width", self.width, minimum=1)
        if len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1] <= 1:
            raise ValueError(f"Sentences: layers is {self.layers!r}, expected two shares 0 <= first < last <= 1")
        refuse_unbounded(self)
        refuse_decoding(self)
        if self.method.traits.layers_differ or self.method.traits.ragged:
            raise ValueError(
                f"Sentences: method is {self.method!r}, whose heads or layers keep different numbers of tokens; "
                "expected a method with one budget for all, such as SnapKV(keep=0.25)"
            )

    @property
    def traits(self) -> Traits:
        return replace(self.method.traits, whole_model=True)

    def for_prompt(self, prompt: Prompt) -> Method:
        starts = prompt.sentence_starts()
        return replace(self, method=self.method.for_prompt(prompt), starts=starts or self.starts)

    def across(self, scores: Sequence[Tensor], contexts: Sequence[LayerContext]) -> list[Tensor]:
        scores = self.method.across(scores, contexts)
        first = math.floor(self.layers[0] * contexts[0].num_layers)
        last = max(math.ceil(self.layers[1] * contexts[0].num_layers), first + 1)
        chosen = [i for i, ctx in enumerate(contexts) if first <= ctx.layer_idx < last] or range(len(contexts))
        positions = [token_positions(own, ctx).expand(own.shape) for own, ctx in zip(scores, contexts, strict=True)]
        length = max(
            int(ctx.positions.max()) + 1 if ctx.positions is not None else own.shape[2]
            for own, ctx in zip(scores, contexts, strict=True)
        )
        batch = scores[0].shape[0]
        total = scores[0].new_zeros(batch, length)
        count = torch.zeros_like(total)
        for i in chosen:
            finite = scores[i].isfinite()
            place = positions[i].clamp(0, length - 1).flatten(1)
            # Attention is never negative; where scores are, their least stands for "not held".
            best = total.new_full((batch, length), -math.inf)
            best.scatter_reduce_(1, place, scores[i].where(finite, -math.inf).flatten(1), "amax")
            held = best != -math.inf
            total += best.where(held, 0)
            count += held
        token = total / count.clamp(min=1)
        sentence = self._sentences(length, token.device)
        size = int(sentence[-1]) + 1
        known = count > 0
        sums = token.new_zeros(batch, size).index_add_(1, sentence, token.where(known, 0))
        sizes = token.new_zeros(batch, size).index_add_(1, sentence, known.to(token))
        means = (sums / sizes.clamp(min=1))[:, sentence]
        if self.starts:
            means[:, : self.starts[0]] = math.inf
        return [
            means[:, None].expand(-1, own.shape[1], -1).gather(2, place.clamp(0, length - 1)).where(own.isfinite(), own)
            for own, place in zip(scores, positions, strict=True)
        ]

    def _sentences(self, length: int, device: torch.device) -> Tensor:
        """``[length]`` the number of the sentence at each position."""
        position = torch.arange(length, device=device)
        if not self.starts:
            return position // self.width
        return torch.searchsorted(torch.tensor(self.starts, device=device), position, right=True)
