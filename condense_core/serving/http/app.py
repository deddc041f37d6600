"""The routes of ``condense serve``. docs/serving.md describes them, and ``GET /openapi.json`` does so for programs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from condense_core._version import __version__
from condense_core.decoder.identity import same_name
from condense_core.serving.errors import (
    ERRORS,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    ServingError,
    UnknownModel,
)
from condense_core.serving.http.guard import Guard, HttpLimits, while_connected
from condense_core.serving.http.page import add_page
from condense_core.serving.http.schemas import (
    AnswerBody,
    CompressBody,
    ErrorReply,
    PruneBody,
    SoftTokensItem,
    fields_of,
)
from condense_core.serving.keys import Key, Keys
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.requests import MIN_TIMEOUT, AnswerRequest, CompressRequest, PruneRequest
from condense_core.serving.requests import Request as EngineRequest
from condense_core.serving.service import Service
from condense_core.serving.wire import (
    END,
    FRAMES,
    JSON,
    LINES,
    OCTETS,
    Compressed,
    error_body,
    error_headers,
    frame,
    server_timing,
)

R = TypeVar("R", bound=EngineRequest)
Accept = Annotated[str, Header(max_length=1000)]


class MethodNotAllowed(ServingError):
    """There is such a route, for other methods."""

    code, status = "method_not_allowed", 405


class NotAcceptable(ServingError):
    """An answer in a form that there is none of."""

    code, status = "not_acceptable", 406


_KINDS: tuple[type[ServingError], ...] = (*ERRORS.values(), NotAcceptable)
_STATUSES = sorted({kind.status for kind in _KINDS})
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorReply} for status in _STATUSES}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


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

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop(stop_seconds)

    app = FastAPI(
        title="condense_core",
        version=__version__,
        summary="Long contexts become a few soft tokens, or a pruned KV cache, that an unmodified LLM can use.",
        lifespan=lifespan,
        docs_url=None,  # these pages would fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Guard, limits=limits or HttpLimits(), keys=keys, observer=observer)
    _handle_errors(app)
    _add_routes(app, service, observer)
    if page:
        add_page(app)
    return app


def _add_routes(app: FastAPI, service: Service, observer: PrometheusObserver | None) -> None:
    @app.post(
        "/v1/compress",
        responses={
            **_ERRORS,
            200: {
                "model": SoftTokensItem,
                "description": "Soft tokens, in the form that Accept asks for",
                "content": {OCTETS: _BINARY, FRAMES: _BINARY, LINES: _BINARY},
            },
        },
    )
    async def compress(body: CompressBody, http: Request, accept: Accept = "*/*") -> Response:
        """Soft tokens of a text, of several, or of the long messages of a chat."""
        _check_model(body.model, service)
        how = fields_of(body, "method", "ratio", "max_soft_tokens", "question")
        if body.text is not None:
            form = _form(accept, OCTETS, JSON)
            [request] = _admitted(http, [CompressRequest(text=body.text, **how)])
            made = await while_connected(http.receive, service.compress(request))
            headers = {"server-timing": server_timing(made.timing)} if made.timing else {}
            if form == JSON:
                return JSONResponse(made.item(), headers=headers)
            return Response(made.payload, media_type=OCTETS, headers=headers)
        chat = body.messages or []
        texts = dict(enumerate(body.texts or ()))  # one of the two is there
        texts |= {i: m.content for i, m in enumerate(chat) if len(m.content) >= body.min_chars}
        form = _form(accept, FRAMES, JSON, LINES)
        requests = dict(
            zip(texts, _admitted(http, [CompressRequest(text=text, **how) for text in texts.values()]), strict=True)
        )
        if form == FRAMES:
            return StreamingResponse(_frames(service, requests, _id(http)), media_type=FRAMES)
        if form == LINES:
            return StreamingResponse(_lines(service, requests, _id(http)), media_type=LINES)
        items = await while_connected(http.receive, _items(service, requests, _id(http)))
        if body.texts is not None:
            return JSONResponse({"data": [items[i] for i in texts]})
        messages = [
            {"role": m.role, "soft_tokens": items[i]} if i in items else {"role": m.role, "content": m.content}
            for i, m in enumerate(chat)
        ]
        return JSONResponse({"messages": messages})

    @app.post(
        "/v1/prune",
        response_class=StreamingResponse,
        responses={**_ERRORS, 200: {"description": "The file of a pruned cache", "content": {OCTETS: _BINARY}}},
    )
    async def prune(body: PruneBody, http: Request) -> Response:
        """A pruned KV cache of a text."""
        _check_model(body.model, service)
        how = fields_of(body, "text", "method", "keep", "budget", "question", "storage")
        [request] = _admitted(http, [PruneRequest(**how)])
        stream = await while_connected(http.receive, service.prune(request))
        headers = {"content-length": str(stream.nbytes)}
        return StreamingResponse(stream.chunks, media_type=OCTETS, headers=headers)

    @app.post("/v1/answer", responses=_ERRORS)
    async def answer(body: AnswerBody, http: Request) -> dict[str, Any]:
        """What the model answers to a question about a text."""
        _check_model(body.model, service)
        how = fields_of(body, "text", "question", "way", "method", "ratio", "max_new_tokens")
        [request] = _admitted(http, [AnswerRequest(**how)])
        return await while_connected(http.receive, service.answer(request))

    @app.get("/v1/models", responses={401: _ERRORS[401], 429: _ERRORS[429]})
    async def models() -> dict[str, Any]:
        """What is offered."""
        return {"object": "list", "data": [service.facts()]}

    @app.get("/v1/load", responses={401: _ERRORS[401], 429: _ERRORS[429]})
    async def load() -> dict[str, Any]:
        """How much there is to do, and how long the latest requests took."""
        return {**service.load(), "latency_ms": observer.recent_ms() if observer else {}}

    @app.get("/health", responses={503: {"description": "The process must be restarted"}})
    async def health() -> JSONResponse:
        """Whether the process works."""
        good = service.is_healthy
        return JSONResponse({"status": "ok" if good else "failed"}, 200 if good else 503)

    @app.get("/ready", responses={503: {"description": "Not yet, or no more"}})
    async def ready() -> JSONResponse:
        """Whether requests are accepted."""
        good = service.is_ready
        return JSONResponse({"status": "ready" if good else "not ready"}, 200 if good else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(observer.exposition() if observer else b"", media_type="text/plain; version=0.0.4")


# -- errors ------------------------------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI) -> None:
    """Every error becomes the same JSON."""

    @app.exception_handler(ServingError)
    async def serving(http: Request, error: ServingError) -> JSONResponse:
        http.state.failed(error.code)
        return JSONResponse(error_body(error, _id(http)), error.status, error_headers(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str | int)) or "body"
        return await serving(http, InvalidRequest(f"{where[:100]}: {first['msg'].removeprefix('Value error, ')}"))

    @app.exception_handler(HTTPException)
    async def other(http: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return await serving(http, NotFound("there is no such route; GET /openapi.json lists them"))
        if error.status_code == 405:
            reply = await serving(
                http, MethodNotAllowed("this route takes other methods; GET /openapi.json lists them")
            )
            reply.headers.update(error.headers or {})
            return reply
        return await serving(http, InvalidRequest("body: expected JSON in UTF-8"))


# -- what routes share -------------------------------------------------------------------------------------------------


def _id(http: Request) -> str:
    return str(http.state.request_id)


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and not same_name(name, mine := service.facts()["id"]):
        raise UnknownModel(f"model: got {name!r:.80}, this server has {mine!r}")


def _form(accept: str, *offered: str) -> str:
    """The first of ``offered`` that an ``Accept`` header takes, in the header's order."""
    for part in accept.split(","):
        wanted = part.split(";")[0].strip().lower()
        for form in offered:
            if wanted in (form, "*/*", form.split("/")[0] + "/*"):
                return form
    raise NotAcceptable(f"accept: got {accept!r:.80}, expected one of {', '.join(offered)}")


def _admitted(http: Request, requests: Sequence[R]) -> list[R]:
    """Requests as those of the key that came with them, once it allows them."""
    key: Key | None = http.state.key
    # Its time has run since it arrived, also while the event loop was busy with others.
    spent = time.monotonic() - http.state.arrived
    if any(request.timeout is not None and request.timeout - spent < MIN_TIMEOUT for request in requests):
        raise DeadlineExceeded("timeout: it is over before the request could be looked at, expected more of it")
    requests = [replace(r, timeout=r.timeout - spent) if r.timeout is not None else r for r in requests]
    http.state.chars = sum(request.num_chars for request in requests)
    most = key.max_priority if key else 0
    if requests and requests[0].priority > most:
        raise InvalidRequest(f"priority: got {requests[0].priority}, expected at most {most}")
    if key is None:
        return list(requests)
    key.spend(http.state.chars)
    return [replace(request, tenant=key.name) for request in requests]


async def _each(
    service: Service, requests: dict[int, CompressRequest]
) -> AsyncIterator[tuple[int, Compressed | ServingError]]:
    """Each request's result or error, as it is done; all end with the iterator."""

    async def one(index: int, request: CompressRequest) -> tuple[int, Compressed | ServingError]:
        try:
            return index, await service.compress(request)
        except ServingError as error:
            return index, error

    tasks = [asyncio.ensure_future(one(index, request)) for index, request in requests.items()]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()


async def _frames(service: Service, requests: dict[int, CompressRequest], request_id: str) -> AsyncIterator[bytes]:
    async for index, made in _each(service, requests):
        if isinstance(made, ServingError):
            yield frame(index, made.status, json.dumps(error_body(made, request_id)).encode())
        else:
            yield frame(index, 200, made.payload)
    yield frame(END, 200, b"")


def _item(index: int, made: Compressed | ServingError, request_id: str) -> dict[str, Any]:
    return {"index": index} | (error_body(made, request_id) if isinstance(made, ServingError) else made.item())


async def _lines(service: Service, requests: dict[int, CompressRequest], request_id: str) -> AsyncIterator[bytes]:
    async for index, made in _each(service, requests):
        yield json.dumps(_item(index, made, request_id)).encode() + b"\n"


async def _items(service: Service, requests: dict[int, CompressRequest], request_id: str) -> dict[int, dict[str, Any]]:
    return {index: _item(index, made, request_id) async for index, made in _each(service, requests)}
