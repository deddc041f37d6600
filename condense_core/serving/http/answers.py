"""Answers to requests for compression, in the form that was asked for; the service behind them may be any."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from condense_core.decoder.identity import same_name
from condense_core.serving.errors import DeadlineExceeded, InvalidRequest, ServingError, UnknownModel
from condense_core.serving.http.guard import while_connected
from condense_core.serving.http.hosting import NotAcceptable, request_id
from condense_core.serving.http.schemas import CompressBody, SoftTokensItem
from condense_core.serving.keys import Key
from condense_core.serving.requests import MIN_TIMEOUT, CompressRequest
from condense_core.serving.requests import Request as EngineRequest
from condense_core.serving.service import Hosted
from condense_core.serving.wire import (
    END,
    FRAMES,
    JSON,
    LINES,
    OCTETS,
    Compressed,
    error_body,
    frame,
)

R = TypeVar("R", bound=EngineRequest)
C = TypeVar("C", bound=CompressRequest)
Accept = Annotated[str, Header(max_length=1000)]
Compress = Callable[[C], Awaitable[Compressed]]

BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
SOFT_TOKENS: dict[str, Any] = {
    "model": SoftTokensItem,
    "description": "Soft tokens, in the form that Accept asks for",
    "content": {OCTETS: BINARY, FRAMES: BINARY, LINES: BINARY},
}
"""The answer of ``compressed``, for OpenAPI."""


async def compressed(
    http: Request, body: CompressBody, accept: str, request: Callable[..., C], compress: Compress[C]
) -> Response:
    """Soft tokens of what a body holds: a text, several, or the long messages of a chat.

    Args:
        request: makes the request for one text (``text=...``). compress: answers it.
    """
    if body.text is not None:
        form = _form(accept, OCTETS, JSON)
        [one] = admitted(http, [request(text=body.text)])
        made = await while_connected(http.receive, compress(one))
        headers = made.headers()
        if form == JSON:
            return JSONResponse(made.item(), headers=headers)
        return Response(made.payload, media_type=OCTETS, headers=headers)
    chat = body.messages or []
    texts = dict(enumerate(body.texts or ()))  # one of the two is there
    texts |= {i: m.content for i, m in enumerate(chat) if len(m.content) >= body.min_chars}
    form = _form(accept, FRAMES, JSON, LINES)
    requests = dict(zip(texts, admitted(http, [request(text=text) for text in texts.values()]), strict=True))
    if form == FRAMES:
        return StreamingResponse(_frames(compress, requests, request_id(http)), media_type=FRAMES)
    if form == LINES:
        return StreamingResponse(_lines(compress, requests, request_id(http)), media_type=LINES)
    items = await while_connected(http.receive, _items(compress, requests, request_id(http)))
    if body.texts is not None:
        return JSONResponse({"data": [items[i] for i in texts]})
    messages = [
        {"role": m.role, "soft_tokens": items[i]} if i in items else {"role": m.role, "content": m.content}
        for i, m in enumerate(chat)
    ]
    return JSONResponse({"messages": messages})


def check_model(name: str | None, service: Hosted) -> None:
    """``UnknownModel`` where a request names one that is not offered."""
    offered = [str(model["id"]) for model in service.models()]
    if name is not None and not any(same_name(name, each) for each in offered):
        raise UnknownModel(f"model: got {name!r:.80}, this server has {' and '.join(map(repr, offered))}")


def _form(accept: str, *offered: str) -> str:
    """The first of ``offered`` that an ``Accept`` header takes, in the header's order."""
    for part in accept.split(","):
        wanted = part.split(";")[0].strip().lower()
        for form in offered:
            if wanted in (form, "*/*", form.split("/")[0] + "/*"):
                return form
    raise NotAcceptable(f"accept: got {accept!r:.80}, expected one of {', '.join(offered)}")


def admitted(http: Request, requests: Sequence[R]) -> list[R]:
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


async def _each(compress: Compress[C], requests: dict[int, C]) -> AsyncIterator[tuple[int, Compressed | ServingError]]:
    """Each request's result or error, as it is done; all end with the iterator."""

    async def one(index: int, request: C) -> tuple[int, Compressed | ServingError]:
        try:
            return index, await compress(request)
        except ServingError as error:
            return index, error

    tasks = [asyncio.ensure_future(one(index, request)) for index, request in requests.items()]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()


async def _frames(compress: Compress[C], requests: dict[int, C], told_as: str) -> AsyncIterator[bytes]:
    async for index, made in _each(compress, requests):
        if isinstance(made, ServingError):
            yield frame(index, made.status, json.dumps(error_body(made, told_as)).encode())
        else:
            yield frame(index, 200, made.payload)
    yield frame(END, 200, b"")


def _item(index: int, made: Compressed | ServingError, told_as: str) -> dict[str, Any]:
    return {"index": index} | (error_body(made, told_as) if isinstance(made, ServingError) else made.item())


async def _lines(compress: Compress[C], requests: dict[int, C], told_as: str) -> AsyncIterator[bytes]:
    async for index, made in _each(compress, requests):
        yield json.dumps(_item(index, made, told_as)).encode() + b"\n"


async def _items(compress: Compress[C], requests: dict[int, C], told_as: str) -> dict[int, dict[str, Any]]:
    return {index: _item(index, made, told_as) async for index, made in _each(compress, requests)}
