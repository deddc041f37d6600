"""From texts and questions to what compressors read, and from the tokens that ``select`` keeps back to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from condense_core.compressor.selection import Passage
from condense_core.decoder.prompt import TemplateArgs, check_text, encode_context, prompt_spans, without_space
from condense_core.decoder.sentences import sentence_numbers
from condense_core.decoder.tokens import Span, encode_behind_text, encode_spans, encode_with_offsets

Offsets = list[tuple[int, int]]
"""Characters ``[start, stop)`` of each token."""

GAP = " ... "
"""What stands in a kept text where tokens were left out."""

_NEUTRAL = "What is this text about?"


def check_questions(question: object, num_texts: int, method: str, *, several: bool) -> list[str | None]:
    """A question, or None, for each of ``num_texts`` texts.

    several: whether the texts came as a list; the questions must then be one too. ``TypeError`` or ``ValueError`` for
    what is no question, or not one for each text, or for a method that reads none.
    """
    if question is None:
        return [None] * num_texts
    if method != "select":
        raise ValueError(f"question: the method {method!r} reads none, expected the method 'select'")
    if not isinstance(question, list | tuple if several else str):
        expected = "a list with one for each text" if several else "str"
        raise TypeError(f"question: got {type(question).__name__}, expected {expected}")
    given: list[str | None] = [question] if isinstance(question, str) else [*question]
    if len(given) != num_texts:
        raise ValueError(f"question: got {len(given)} for {num_texts} texts, expected one for each")
    for i, each in enumerate(given):
        name = f"question[{i}]" if several else "question"
        if each is not None:
            check_text(each, name)
            if not each.strip():
                raise ValueError(f"{name}: empty; expected what will be asked, or None")
    return given


@dataclass(frozen=True)
class TokenizedText:
    """A text as a compressor of one method reads it.

    Attributes:
        text: as it was given. ids: its tokens, without special ones; at least one.
        ratio: context tokens per soft token.
        offsets: where each token is in the text (``select``).
        sentences: for each token the number of its sentence (``mixed``).
        passage: what ``select`` reads.
    """

    text: str
    ids: list[int]
    ratio: float = 1
    offsets: Offsets = field(default_factory=list)
    sentences: list[int] = field(default_factory=list)
    passage: Passage | None = None

    @property
    def num_read(self) -> int:
        """Tokens that a model reads to compress it, what ``select`` puts around a text among them."""
        around = self.passage
        return len(self.ids) + (
            0 if around is None else sum(map(len, (around.before, around.question, around.neutral)))
        )


def tokenized_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    method: str,
    question: str | None,
    template_args: TemplateArgs | None,
    name: str = "text",
) -> TokenizedText:
    """``text`` for a compressor of ``method``; ``ValueError``, which calls it ``name``, where it has no tokens."""
    if method not in ("select", "mixed"):
        return TokenizedText(text, encode_context(tokenizer, text, name))
    check_text(text, name)
    if method == "select":
        passage, offsets = make_passage(tokenizer, text, question, template_args)
        made = TokenizedText(text, list(passage.ids), offsets=offsets, passage=passage)
    else:
        ids, offsets = encode_with_offsets(tokenizer, text)
        made = TokenizedText(text, ids, sentences=sentence_numbers(text, offsets))
    if not made.ids:
        raise ValueError(f"{name}: empty; expected a text of at least one token")
    return made


def make_passage(
    tokenizer: PreTrainedTokenizerBase, text: str, question: str | None, template_args: TemplateArgs | None
) -> tuple[Passage, Offsets]:
    """``text`` as ``select`` reads it: in a prompt, with the question behind it; and where its tokens are in it."""
    ids, offsets = encode_with_offsets(tokenizer, text)
    before, behind, neutral = _around(tokenizer, question, template_args)
    passage = Passage(
        ids=ids,
        sentences=sentence_numbers(text, offsets),
        before=encode_spans(tokenizer, without_space(before)),
        question=encode_behind_text(tokenizer, behind),
        neutral=encode_behind_text(tokenizer, neutral),
        marks=[float(_is_name_or_number(text[start:stop])) for start, stop in offsets],
    )
    return passage, offsets


def _around(
    tokenizer: PreTrainedTokenizerBase, question: str | None, template_args: TemplateArgs | None
) -> tuple[list[Span], list[Span], list[Span]]:
    """What stands before a text, behind it with its question, and behind it with the neutral one."""
    if question is not None:
        before, behind = prompt_spans(tokenizer, 1, question, template_args)
        return before, behind, prompt_spans(tokenizer, 1, _NEUTRAL, template_args)[1]
    try:
        return prompt_spans(tokenizer, 1, "", template_args)[0], [], []
    except ValueError:  # a template that renders no message, such as one for tools alone: the text is read by itself
        return [Span("", True)], [], []


def kept_text(text: str, offsets: Offsets, kept: Sequence[int]) -> str:
    """The characters of the tokens ``kept``, which ascend: runs as they stand in ``text``, joined by ``GAP``."""
    runs: list[list[int]] = []
    for index in kept:
        if runs and index == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    spans: Offsets = []
    for first, behind in runs:
        start, stop = offsets[first][0], max(end for _, end in offsets[first:behind])
        if spans and start < spans[-1][1]:  # the tokens of one character, of which the middle was left out
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    pieces = (text[start:stop].strip() for start, stop in spans)
    return GAP.join(piece for piece in pieces if piece)


def _is_name_or_number(piece: str) -> bool:
    return any(character.isdigit() or character.isupper() for character in piece)
