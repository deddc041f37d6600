"""The JSON bodies of requests, as OpenAPI documents them. Values are checked again by ``serving.requests``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, model_validator

from condense_core.serving.wire import MAX_TEXTS

MAX_MESSAGES = 1024
_NAME = 200

Name = Annotated[StrictStr, Field(max_length=_NAME)]
Number = StrictInt | StrictFloat

_TEXT = "The keeper of the north archive is Hugo Quinmark. He counts the lamps at dusk, and writes their number down."


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Name | None = Field(None, description="Must name the model that this server has.")
    priority: StrictInt = Field(0, description="-10 to 10; higher goes first, as far as the key allows it.")
    timeout: Number | None = Field(None, description="Seconds until an answer is of no more use.")


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Annotated[StrictStr, Field(min_length=1, max_length=40)]
    content: StrictStr


class CompressBody(_Body):
    """One of text, texts and messages."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"text": _TEXT, "ratio": 4},
                {
                    "texts": [_TEXT, _TEXT[:49]],
                    "max_soft_tokens": 8,
                    "method": "select",
                    "question": "Who is the keeper?",
                },
                {
                    "messages": [
                        {"role": "system", "content": "You answer briefly."},
                        {"role": "user", "content": _TEXT},
                        {"role": "user", "content": "Who is the keeper?"},
                    ],
                    "min_chars": 60,
                },
            ]
        }
    )

    text: StrictStr | None = None
    texts: Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_TEXTS)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    min_chars: Annotated[StrictInt, Field(ge=1)] = Field(
        1000, description="Messages with fewer characters stay as they are."
    )
    method: Name | None = Field(None, description="One that /v1/models lists.")
    ratio: Number | None = Field(None, description="Tokens per soft token; 4 by default.")
    max_soft_tokens: StrictInt | None = Field(None, description="At most so many, instead of a ratio.")
    question: StrictStr | None = Field(None, description="What will be asked, for the method select.")

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if sum(given is not None for given in (self.text, self.texts, self.messages)) != 1:
            raise ValueError("expected one of text, texts and messages")
        return self


class PruneBody(_Body):
    """A text to be read into a pruned KV cache."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": _TEXT, "keep": 0.5}]})

    text: StrictStr
    method: Name | None = Field(None, description="Such as snapkv, or adakv(snapkv).")
    keep: Number | None = Field(None, description="Share of the tokens that stays.")
    budget: StrictInt | None = Field(None, description="Instead, how many stay.")
    question: StrictStr | None = Field(None, description="What will be asked later.")
    storage: Literal["int8", "fp8"] | None = None


class AnswerBody(_Body):
    """A question about a text, for the model itself."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": _TEXT, "question": "Who is the keeper?", "way": "soft", "ratio": 2}]}
    )

    text: StrictStr
    question: StrictStr
    way: Literal["full", "soft", "pruned", "nothing"] = "full"
    method: Name | None = Field(None, description="For the way soft: one that /v1/models lists.")
    ratio: Number = 4
    max_new_tokens: StrictInt = 48


class ErrorDetail(BaseModel):
    """What went wrong; programs branch on the code."""

    code: str
    message: str
    request_id: str
    retry_after: float | None = None


class ErrorReply(BaseModel):
    """An answer with any status but 200."""

    error: ErrorDetail


class SoftTokensItem(BaseModel):
    """Soft tokens as JSON; data: their bytes in base64."""

    num_context_tokens: int
    num_soft_tokens: int
    ratio: float
    method: str
    model: str
    text: str
    data: str


def fields_of(body: _Body, *names: str) -> dict[str, Any]:
    """The values of a body that are handed on as they are."""
    return {name: getattr(body, name) for name in ("priority", "timeout", *names)}
