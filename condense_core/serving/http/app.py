"""The routes of ``condense serve``. docs/serving.md describes them, and ``GET /openapi.json`` does so for programs."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from condense_core.serving.http.answers import BINARY, SOFT_TOKENS, Accept, admitted, check_model, compressed
from condense_core.serving.http.guard import HttpLimits, while_connected
from condense_core.serving.http.hosting import error_replies, host
from condense_core.serving.http.page import add_page
from condense_core.serving.http.schemas import AnswerBody, CompressBody, PruneBody, fields_of
from condense_core.serving.keys import Keys
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.requests import AnswerRequest, CompressRequest, PruneRequest
from condense_core.serving.service import Service
from condense_core.serving.wire import OCTETS


def create_app(
    service: Service,
    *,
    observer: PrometheusObserver | None = None,
    keys: Keys | None = None,
    limits: HttpLimits | None = None,
    page: bool = True,
    stop_seconds: float = 30.0,
) -> FastAPI:
    """The application around ``service``, which it starts and stops.

    Args:
        observer: of the service, for ``/metrics``. keys: None: everybody may ask.
        page: whether ``/`` has a page for people. stop_seconds: for what was accepted, when it is told to end.
    """
    app = host(
        service,
        summary="Long contexts become a few soft tokens, or a pruned KV cache, that an unmodified LLM can use.",
        observer=observer,
        keys=keys,
        limits=limits,
        stop_seconds=stop_seconds,
    )
    _add_routes(app, service)
    if page:
        add_page(app)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    errors = error_replies()

    @app.post("/v1/compress", responses={**errors, 200: SOFT_TOKENS})
    async def compress(body: CompressBody, http: Request, accept: Accept = "*/*") -> Response:
        """Soft tokens of a text, of several, or of the long messages of a chat."""
        check_model(body.model, service)
        request = partial(CompressRequest, **fields_of(body, "method", "ratio", "max_soft_tokens", "question"))
        return await compressed(http, body, accept, request, service.compress)

    @app.post(
        "/v1/prune",
        response_class=StreamingResponse,
        responses={**errors, 200: {"description": "The file of a pruned cache", "content": {OCTETS: BINARY}}},
    )
    async def prune(body: PruneBody, http: Request) -> Response:
        """A pruned KV cache of a text."""
        check_model(body.model, service)
        how = fields_of(body, "text", "method", "keep", "budget", "question", "storage")
        [request] = admitted(http, [PruneRequest(**how)])
        stream = await while_connected(http.receive, service.prune(request))
        headers = {"content-length": str(stream.nbytes)}
        return StreamingResponse(stream.chunks, media_type=OCTETS, headers=headers)

    @app.post("/v1/answer", responses=errors)
    async def answer(body: AnswerBody, http: Request) -> dict[str, Any]:
        """What the model answers to a question about a text."""
        check_model(body.model, service)
        how = fields_of(body, "text", "question", "way", "method", "ratio", "max_new_tokens")
        [request] = admitted(http, [AnswerRequest(**how)])
        return await while_connected(http.receive, service.answer(request))
