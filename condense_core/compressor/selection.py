"""``select``: which tokens of a text to keep, as an LLM ranks them that was not trained for it.

With a question, a token's score is the attention that the question behind the text pays to it, less the attention that
a question about nothing in particular pays to it: the strongest weight of any head and any token of the question, a
mean over layers in the middle of the model. Without a question it is the token's squared surprise, and whether it is a
part of a name or a number, each in units of its mean over the text. Sentences are kept or dropped as a whole, by the
mean score of their tokens, since half a sentence answers nothing.

Reading a text with the question behind it to find what to keep is what FINCH (arXiv 2408.00167) and GemFilter (arXiv
2409.17422) do; ranking by self-information is Selective Context's (arXiv 2310.06201).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.compressor.encoder import Encoder
from condense_core.compressor.packed import LayerAttention, Packing, strongest_attention
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.logits import decoder_logits
from condense_core.decoder.partial import check_whole

RUN = 16
"""Tokens that are kept or dropped together where it is not known where sentences are."""

_FIRST_OBSERVED = 0.4  # of the encoder's layers; those before look at what is near
_LOGIT_ROWS = 256  # rows of logits that exist at once

_Text = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Passage:
    """A text of n tokens to select from, as the model reads it.

    Attributes:
        ids: its tokens.
        sentences: for each token the number of its sentence, ascending from 0 without gaps.
        before: what stands before the text in a prompt.
        question: what stands behind it, with the question; empty: there is no question.
        neutral: the same with a question about nothing in particular; empty: nothing is subtracted.
        marks: for each token 1 where it is a part of a name or a number, else 0; empty: not known.
    """

    ids: Sequence[int]
    sentences: Sequence[int]
    before: Sequence[int] = ()
    question: Sequence[int] = ()
    neutral: Sequence[int] = ()
    marks: Sequence[float] = ()

    @property
    def text(self) -> _Text:
        """What is read, whatever is asked."""
        return tuple(self.before), tuple(self.ids)


@dataclass(frozen=True)
class _Segment:
    """Tokens ``start`` to ``stop`` of a text, which are read as a sequence of a pack.

    sequence: the pack's. skipped: tokens before the text in it. continuations: the sequence that each of what stands
    behind the text is read as.
    """

    start: int
    stop: int
    sequence: int
    skipped: int
    continuations: dict[tuple[int, ...], int] = field(default_factory=dict)


class _Pack:
    """Sequences to be read together."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cu_seqlens = [0]
        self.parents: list[int | None] = []

    def add(self, ids: Sequence[int], parent: int | None = None) -> int:
        """The number of a new sequence."""
        self.ids += ids
        self.cu_seqlens.append(len(self.ids))
        self.parents.append(parent)
        return len(self.parents) - 1


class Selector:
    """Scores of tokens that ``model`` gives."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder, max_tokens: int) -> None:
        """A selector over a model and its first layers.

        Args:
            model: reads texts without a question, with all of its layers.
            encoder: its first layers, which read texts with a question.
            max_tokens: how many tokens are read in one piece, what stands around a text among them.

        Raises:
            ValueError: the encoder has no layers.
        """
        if not len(encoder.layers):
            raise ValueError(
                "encoder_layers: got 0, expected at least 1 for the method 'select', which ranks by what layers compute"
            )
        self.model, self.encoder, self.max_tokens = model, encoder, max_tokens
        parts = decoder_parts(model)
        self.embed_tokens, self.norm = parts.embed_tokens, parts.norm
        self.whole = Encoder(model, len(parts.layers))
        self.first = min(len(encoder.layers) - 1, int(_FIRST_OBSERVED * len(encoder.layers)))
        self.max_asked_tokens = min(max_tokens, self._reach() or max_tokens)

    @torch.no_grad()
    def _reach(self) -> int | None:
        """How far back the attention that counts looks, where all of it has a window, as one token tells; else None."""
        windows: list[int | None] = []

        def observe(layer: int, seen: LayerAttention) -> None:
            if layer >= self.first:
                windows.append(seen.window)

        embeds = self.embed_tokens(torch.zeros(1, dtype=torch.long, device=self.embed_tokens.weight.device))
        self.encoder.read(embeds, Packing([0, 1], self.encoder.causal, observe=observe))
        return None if None in windows else max((w for w in windows if w), default=None)

    @torch.no_grad()
    def scores(self, passages: Sequence[Passage]) -> list[Tensor]:
        """For each passage fp32 scores ``[n]``, higher for tokens to keep.

        Passages of one text are read once, whatever their questions. A text beyond the positions is read in segments,
        each with what stands before the text and with the question.

        Raises:
            ValueError: a question leaves too few positions, or there is none and the model was loaded in part.
        """
        if not all(passage.question for passage in passages):
            check_whole(self.model, "select without a question")
        found: dict[int, Tensor] = {}
        for asked, score in ((True, self._attention), (False, self._surprise)):
            some = {i: passage for i, passage in enumerate(passages) if bool(passage.question) == asked}
            if some:
                found |= zip(some, score(list(some.values())), strict=True)
        return [found[i] for i in range(len(passages))]

    def _attention(self, passages: list[Passage]) -> list[Tensor]:
        """The scores of passages with a question."""
        pack, segments = self._packed(passages)
        strongest: dict[int, list[Tensor]] = {i: [] for i, parent in enumerate(pack.parents) if parent is not None}

        def observe(layer: int, seen: LayerAttention) -> None:
            if layer >= self.first:
                for sequence, found in strongest.items():
                    found.append(strongest_attention(seen, packing, sequence))

        packing = Packing(pack.cu_seqlens, self.encoder.causal, pack.parents, observe)
        self.encoder.read(self.embed_tokens(self._ids(pack)), packing)

        def score(passage: Passage, segment: _Segment) -> Tensor:
            question, neutral = (
                torch.stack(strongest[segment.continuations[tuple(ids)]]) if ids else torch.zeros(())
                for ids in (passage.question, passage.neutral)
            )
            return (question - neutral.to(question)).clamp_min(0).mean(0)[segment.skipped :]

        return [torch.cat([score(p, segment) for segment in segments[p.text]]) for p in passages]

    def _surprise(self, passages: list[Passage]) -> list[Tensor]:
        """The scores of passages without one."""
        pack, segments = self._packed(passages)
        ids = self._ids(pack)
        hidden = self.whole.read(self.embed_tokens(ids), Packing(pack.cu_seqlens, parents=pack.parents))
        scores: dict[int, Tensor] = {}
        for sequence, (start, stop) in enumerate(pairwise(pack.cu_seqlens)):
            scores[sequence] = self._losses(hidden[start:stop], ids[start:stop]).square()
        found = []
        for passage in passages:
            score = torch.cat([scores[segment.sequence][segment.skipped :] for segment in segments[passage.text]])
            found.append(_relative(score) + _relative(torch.tensor(passage.marks or [0.0] * len(score)).to(score)))
        return found

    def _ids(self, pack: _Pack) -> Tensor:
        return torch.tensor(pack.ids, dtype=torch.long, device=self.embed_tokens.weight.device)

    def _packed(self, passages: list[Passage]) -> tuple[_Pack, dict[_Text, list[_Segment]]]:
        """The pack that passages are read in, and where in it each of their texts is."""
        pack = _Pack()
        groups: dict[_Text, list[Passage]] = {}
        for passage in passages:
            groups.setdefault(passage.text, []).append(passage)
        return pack, {text: self._segments(group, pack) for text, group in groups.items()}

    def _segments(self, group: Sequence[Passage], pack: _Pack) -> list[_Segment]:
        """The segments of the text of all passages of ``group``, which are added to ``pack``."""
        text = group[0]
        behind = list(dict.fromkeys(tuple(b) for p in group for b in (p.question, p.neutral) if b))
        around = len(text.before) + max(map(len, behind), default=0)
        limit = self.max_asked_tokens if behind else self.max_tokens
        room = limit - around
        if around and room < limit // 2:
            what = f"question: {around:,} tokens with the prompt around it" if behind else f"prompt: {around:,} tokens"
            raise ValueError(f"{what}, expected at most {limit // 2:,}, half of what the model reads at once")
        found = []
        for start, stop in pairwise(cut(text.sentences, room)):
            sequence = pack.add([*text.before, *text.ids[start:stop]])
            children = {ids: pack.add(ids, sequence) for ids in behind}
            found.append(_Segment(start, stop, sequence, len(text.before), children))
        return found

    def _losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """``[m]`` fp32: nats of each of ``ids [m]`` behind those before it; of the first the mean of the others."""
        losses = [
            F.cross_entropy(decoder_logits(self.model, self.norm(rows)).float(), targets, reduction="none")
            for rows, targets in zip(hidden[:-1].split(_LOGIT_ROWS), ids[1:].split(_LOGIT_ROWS), strict=True)
        ]
        found = torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)
        return torch.cat([found.mean(0, keepdim=True).nan_to_num(), found])


def _relative(scores: Tensor) -> Tensor:
    """``scores`` in units of their mean; zeros stay."""
    return scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)


def cut(sentences: Sequence[int], room: int) -> list[int]:
    """Offsets ``[0, ..., n]`` of segments of at most ``room`` tokens, of about one length, cut between sentences.

    A cut falls inside a sentence where none begins within the last quarter of a segment.
    """
    n, room = len(sentences), max(room, 1)
    ends = [0]
    while n - ends[-1] > room:
        start = ends[-1]
        size = -(-(n - start) // -(-(n - start) // room))
        stop = start + size
        begins = (i for i in range(stop, stop - size // 4, -1) if sentences[i] != sentences[i - 1])
        ends.append(next(begins, stop))
    return [*ends, n] if n else ends


def keep_sentences(scores: Tensor, sentences: Tensor, budget: int) -> Tensor:
    """Ascending indices of exactly ``budget`` tokens: sentences of the highest mean score, the last of them in part.

    Args:
        scores: ``[n]``; NaN counts as 0.
        sentences: ``[n]``, the number of each token's sentence, ascending from 0 without gaps.
        budget: at most n.
    """
    scores, sentences = scores.detach().double().cpu().nan_to_num(), sentences.cpu()
    sizes = sentences.bincount()
    means = torch.zeros(len(sizes), dtype=torch.float64).scatter_add(0, sentences, scores) / sizes
    starts = F.pad(sizes.cumsum(0), (1, 0)).tolist()
    kept, left = [], budget
    for sentence in means.argsort(descending=True, stable=True).tolist():
        start, stop = starts[sentence], starts[sentence + 1]
        if stop - start > left:  # the part of it that scores most
            sums = scores[start:stop].unfold(0, left, 1).sum(1) if left else scores[:0]
            start += int(sums.argmax()) if left else 0
            stop = start + left
        kept.append(torch.arange(start, stop))
        left -= stop - start
        if not left:
            break
    return torch.cat(kept).sort().values if kept else sentences[:0]
