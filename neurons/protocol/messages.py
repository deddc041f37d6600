"""A request for compression, its limits, and its answer: JSON there, the file of soft tokens back.

A validator's challenge and an application's context are the same message. It holds nothing that tells them apart.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from condense_core.compressor.soft_tokens import SoftTokens, SoftTokensError
from condense_core.neurons.tiers import Name, Tier, Tiers

VERSION: Literal[1] = 1
"""Of the protocol. A neuron answers requests of its own version only."""

COMPRESS = "/v1/neuron/compress"
IDENTITY = "/v1/neuron/identity"
LARGEST = 65504.0
"""Of the values of an answer: the most that float16 holds. One of 1e38 is a number to a model in float32 and none in 16
bits, where validators would disagree about it."""
_ENVELOPE_BYTES = 4096  # of JSON around text and question
_BYTES_PER_CHAR = 12  # of JSON: a character beyond the BMP is two escapes


class MessageError(ValueError):
    """A message is not what the protocol says; ``code`` for programs."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


class Ask(BaseModel):
    """A text to be compressed.

    Attributes:
        tier: under whose limits. text: the context. question: about it, or None where it is not known yet.
        ratio: context tokens for each soft token; an answer may have a higher one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    version: Literal[1] = VERSION
    tier: Name
    text: Annotated[str, Field(min_length=1)]
    ratio: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)]
    question: Annotated[str, Field(min_length=1)] | None = None

    def to_bytes(self) -> bytes:
        """As JSON, with every field, so that messages of one length look alike."""
        return self.model_dump_json().encode()

    def tier_of(self, tiers: Tiers) -> Tier:
        """Its tier, whose limits it keeps to; ``MessageError`` where there is none, or it does not."""
        tier = tiers.tiers.get(self.tier)
        if tier is None:
            raise MessageError(
                f"tier: got {self.tier!r}, expected one of {', '.join(sorted(tiers.tiers))}", "unknown_tier"
            )
        if not tier.min_chars <= len(self.text) <= tier.max_chars:
            raise MessageError(
                f"text: {len(self.text):,} characters, expected {tier.min_chars:,} to {tier.max_chars:,} in tier "
                f"{self.tier!r}",
                "too_large" if len(self.text) > tier.max_chars else "invalid_request",
            )
        if self.question is not None and len(self.question) > tier.max_question_chars:
            raise MessageError(
                f"question: {len(self.question):,} characters, expected at most {tier.max_question_chars:,}",
                "too_large",
            )
        if not tier.min_ratio <= self.ratio <= tier.max_ratio:
            raise MessageError(f"ratio: got {self.ratio:g}, expected {tier.min_ratio:g} to {tier.max_ratio:g}")
        return tier


def read_ask(body: bytes, tiers: Tiers) -> tuple[Ask, Tier]:
    """A request and its tier, from hostile bytes; ``MessageError`` names what is wrong and repeats no content."""
    if len(body) > (most := most_ask_bytes(tiers)):
        raise MessageError(f"body: {len(body):,} bytes, expected at most {most:,}", "too_large")
    try:
        ask = Ask.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise MessageError(f"{where[:100]}: {first['msg'][:200]}") from None
    return ask, ask.tier_of(tiers)


def most_ask_bytes(tiers: Tiers) -> int:
    """The most bytes that a request of any tier has."""
    chars = max(tier.max_chars + tier.max_question_chars for tier in tiers.tiers.values())
    return _ENVELOPE_BYTES + _BYTES_PER_CHAR * chars


def read_answer(
    body: bytes, ask: Ask, tier: Tier, *, context_tokens: int, model_id: str, width: int, model_digest: str = ""
) -> SoftTokens:
    """Soft tokens from hostile bytes, checked against what was asked for, before any of it reaches a device.

    Args:
        context_tokens: of the text, as counted here. model_id: of the tier's LLM. width: of its embeddings.
        model_digest: of its weights, "" where they are not known here.

    Raises:
        MessageError: it is no such file, too large, of another context, model, width or number of rows, or has values
            that are not finite or above ``LARGEST``.
    """
    if len(body) > tier.max_answer_bytes:
        raise MessageError(f"answer: {len(body):,} bytes, expected at most {tier.max_answer_bytes:,}", "too_large")
    try:
        soft = SoftTokens.from_bytes(body, max_bytes=tier.max_answer_bytes)
        soft.check_model(model_id, width, model_digest)
        soft.check_finite()
    except SoftTokensError as error:
        raise MessageError(f"answer: {error}", "invalid_answer") from None
    if (most := float(torch.stack(torch.aminmax(soft.embeds)).abs().max())) > LARGEST:
        raise MessageError(f"answer: a value of {most:.3g}, expected at most {LARGEST:,.0f}", "invalid_answer")
    if soft.context_sha256 != hashlib.sha256(ask.text.encode()).hexdigest():
        raise MessageError("answer: soft tokens of another context", "invalid_answer")
    if soft.num_context_tokens != context_tokens:
        raise MessageError(
            f"answer: it says that the context has {soft.num_context_tokens:,} tokens, expected {context_tokens:,}",
            "invalid_answer",
        )
    if soft.ratio < ask.ratio:  # its rows are those of its ratio: soft tokens of other shapes do not exist
        raise MessageError(
            f"answer: {len(soft):,} soft tokens for {context_tokens:,} tokens, a ratio of {soft.ratio:g}, expected at "
            f"least {ask.ratio:g}",
            "invalid_answer",
        )
    return soft
