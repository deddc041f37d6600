"""What every application of this kind has: life, errors, and the routes that tell of it. ``app`` adds what it does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from condense_core._version import __version__
from condense_core.serving.errors import ERRORS, InvalidRequest, NotFound, ServingError
from condense_core.serving.http.guard import Guard, HttpLimits
from condense_core.serving.http.schemas import ErrorReply
from condense_core.serving.keys import Keys
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.service import Hosted
from condense_core.serving.wire import error_body, error_headers


class MethodNotAllowed(ServingError):
    """There is such a route, for other methods."""

    code, status = "method_not_allowed", 405


class NotAcceptable(ServingError):
    """An answer in a form that there is none of."""

    code, status = "not_acceptable", 406


_KINDS: tuple[type[ServingError], ...] = (*ERRORS.values(), NotAcceptable)


def error_replies(*more: type[ServingError]) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may end in, for its OpenAPI; more: beside those of every application."""
    return {status: {"model": ErrorReply} for status in sorted({kind.status for kind in (*_KINDS, *more)})}


def host(
    service: Hosted,
    *,
    summary: str,
    observer: PrometheusObserver | None = None,
    keys: Keys | None = None,
    limits: HttpLimits | None = None,
    stop_seconds: float = 30.0,
) -> FastAPI:
    """An application that starts and stops ``service``, guards it, and tells of it.

    Args:
        summary: of what it does. observer: of the service, for ``/metrics``. keys: None: everybody may ask.
        stop_seconds: for what was accepted, when it is told to end.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop(stop_seconds)

    app = FastAPI(
        title="condense_core",
        version=__version__,
        summary=summary,
        lifespan=lifespan,
        docs_url=None,  # these pages would fetch their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would go where the request's own Host says
    )
    app.add_middleware(Guard, limits=limits or HttpLimits(), keys=keys, observer=observer)
    _handle_errors(app)
    _tell(app, service, observer)
    return app


def request_id(http: Request) -> str:
    """The name under which the log has a request."""
    return str(http.state.request_id)


def _tell(app: FastAPI, service: Hosted, observer: PrometheusObserver | None) -> None:
    """Add the routes that say what there is and how it stands."""
    errors = error_replies()

    @app.get("/v1/models", responses={401: errors[401], 429: errors[429]})
    async def models() -> dict[str, Any]:
        """What is offered."""
        return {"object": "list", "data": service.models()}

    @app.get("/v1/load", responses={401: errors[401], 429: errors[429]})
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


def _handle_errors(app: FastAPI) -> None:
    """Every error becomes the same JSON."""

    @app.exception_handler(ServingError)
    async def serving(http: Request, error: ServingError) -> JSONResponse:
        http.state.failed(error.code)
        return JSONResponse(error_body(error, request_id(http)), error.status, error_headers(error))

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
