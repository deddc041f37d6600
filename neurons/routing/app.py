"""The routes of a gateway: those of ``condense serve`` that compress, with fields that say who is to answer."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, NoReturn

from fastapi import FastAPI, Request, Response
from pydantic import ConfigDict, Field, StrictInt

from condense_core.neurons.routing.choosing import UnknownTier
from condense_core.neurons.routing.gateway import Gateway, NoAnswer, NoMiners, UnknownMiner
from condense_core.neurons.routing.requests import MAX_K, RoutedRequest
from condense_core.serving.errors import NotFound
from condense_core.serving.http.answers import SOFT_TOKENS, Accept, check_model, compressed
from condense_core.serving.http.guard import HttpLimits
from condense_core.serving.http.hosting import error_replies, host
from condense_core.serving.http.schemas import CompressBody, Name, fields_of
from condense_core.serving.keys import Keys

_TEXT = "The keeper of the north archive is Hugo Quinmark. He counts the lamps at dusk, and writes their number down. "
_FIELDS = ("method", "ratio", "max_soft_tokens", "question", "tier", "model", "routing", "miner", "k")


class RoutedBody(CompressBody):
    """One of text, texts and messages, and who is to answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"text": _TEXT * 10, "ratio": 4},
                {"texts": [_TEXT * 10, _TEXT * 20], "tier": "research", "routing": "fastest"},
                {"messages": [{"role": "user", "content": _TEXT * 10}], "routing": "k_of_n", "k": 3},
                {"text": _TEXT * 10, "routing": "one", "miner": 7},
            ]
        }
    )

    method: Name | None = Field(None, description="None: each miner has its own.")
    model: Name | None = Field(None, description="One that /v1/models lists.")
    tier: Name | None = Field(None, description="One that /v1/models lists; by default the first that the text fits.")
    routing: Literal["best", "fastest", "one", "k_of_n"] | None = Field(
        None, description="Who answers: the best paid, the fastest, one miner, or the best of k that are compared."
    )
    miner: StrictInt | Name | None = Field(None, description="Its hotkey or uid, for the routing one.")
    k: Annotated[StrictInt, Field(ge=1, le=MAX_K)] | None = Field(
        None, description="Valid answers that are waited for, for the routing k_of_n."
    )


def create_gateway_app(
    gateway: Gateway, *, keys: Keys | None = None, limits: HttpLimits | None = None, stop_seconds: float = 30.0
) -> FastAPI:
    """The application around ``gateway``, which it starts and stops; arguments as of ``serving.http.hosting.host``."""
    app = host(
        gateway,
        summary="Long contexts become a few soft tokens that an unmodified LLM can use; miners of a subnet make them.",
        observer=gateway.asker.observer,
        keys=keys,
        limits=limits,
        stop_seconds=stop_seconds,
    )
    errors = error_replies(NoAnswer, NoMiners, UnknownMiner, UnknownTier)

    @app.post("/v1/compress", responses={**errors, 200: SOFT_TOKENS})
    async def compress(body: RoutedBody, http: Request, accept: Accept = "*/*") -> Response:
        """Soft tokens of a text, of several, or of the long messages of a chat."""
        check_model(body.model, gateway)
        request = partial(RoutedRequest, **fields_of(body, *_FIELDS))
        return await compressed(http, body, accept, request, gateway.compress)

    @app.post("/v1/prune", response_model=None, include_in_schema=False)
    async def prune() -> NoReturn:
        raise NotFound("a gateway prunes no caches, expected POST /v1/compress; 'condense serve' does")

    @app.post("/v1/answer", response_model=None, include_in_schema=False)
    async def answer() -> NoReturn:
        raise NotFound("a gateway answers no questions, expected POST /v1/compress; 'condense serve' does")

    return app
