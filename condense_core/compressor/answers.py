"""From contexts and a prompt to the model's answer: what goes around soft tokens, and generation from embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.generation import left_padded, streamed
from condense_core.decoder.prompt import check_text, prompt_spans, without_space
from condense_core.decoder.tokens import Span, encode_behind_text, encode_spans


def split_prompt(
    tokenizer: PreTrainedTokenizerBase,
    contexts: str | SoftTokens | Sequence[str | SoftTokens],
    prompt: str,
    template_args: dict[str, Any],
) -> list[list[int] | SoftTokens]:
    """A prompt in order: token ids, texts among the contexts included, and soft tokens as they are.

    ``ValueError`` for what is no text, an empty context beside others, or a template that cannot be split.
    """
    given = [contexts] if isinstance(contexts, str | SoftTokens) else list(contexts)
    for name, text in (("prompt", prompt), *(("context", c) for c in given if isinstance(c, str))):
        check_text(text, name)
    if all(isinstance(c, str) for c in given):
        given = [c for c in given if c]
    elif any(c == "" for c in given):
        raise ValueError("context: empty; expected a text of at least one token")
    parts: list[list[int] | SoftTokens] = []

    def encode(spans: list[Span]) -> list[int]:
        return (encode_behind_text if parts else encode_spans)(tokenizer, spans)

    spans, *following = prompt_spans(tokenizer, len(given), prompt, template_args)
    for context, behind in zip(given, following, strict=True):
        if isinstance(context, str):
            spans = [*spans, Span(context, False), *behind]
            continue
        parts += [encode(without_space(spans)), context]
        spans = behind
    parts.append(encode(spans))
    return parts


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Tensor]],
    settings: dict[str, Any],
) -> list[str]:
    """What the model says to each of several prompts, generated as one batch; prompts, settings: ``generate``'s."""
    with torch.inference_mode():
        tokens = model.generate(**left_padded(prompts), **settings)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def answer_pieces(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> Iterator[str]:
    """As ``answers`` of one prompt, piece by piece; closing the iterator ends the generation."""
    criteria = settings.pop("stopping_criteria", ())

    def generate(**more: Any) -> None:
        with torch.inference_mode():
            model.generate(**inputs, **settings, **more)

    return streamed(generate, tokenizer, criteria)
