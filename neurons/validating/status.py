"""What a validator says of itself over HTTP: leaderboard, health, and figures for Prometheus. It takes no orders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from condense_core.neurons.validating.page import page, page_headers
from condense_core.neurons.validating.rounds import Outcome, Round
from condense_core.serving.errors import NotFound
from condense_core.serving.http.guard import Guard, HttpLimits
from condense_core.serving.wire import error_body, error_headers

LIMITS = HttpLimits(max_body_bytes=1024, max_buffered_bytes=2**20, max_connections=64)
_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_KINDS = ("late", "not reached", "broken", "refused", "not signed", "not sealed", "not there", "answer")


class Figures:
    """Counts into a registry of its own."""

    def __init__(self, weights_set_at: Callable[[], float | None]) -> None:
        """weights_set_at: when the chain last took weights, in seconds since the epoch."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._rounds = Counter(
            "condense_rounds", "Rounds, and whether anybody scored", ["tier", "counts"], registry=registry
        )
        self._seconds = Histogram(
            "condense_round_seconds", "Of a round in asking and judging", ["part"], buckets=_SECONDS, registry=registry
        )
        self._outcomes = Counter("condense_outcomes", "What became of requests", ["tier", "outcome"], registry=registry)
        self._standing = Gauge("condense_standing", "Of a miner in a tier", ["tier", "uid"], registry=registry)
        self._last_round = Gauge("condense_last_round_timestamp_seconds", "When a round last ended", registry=registry)

        last_weights = Gauge("condense_last_weights_timestamp_seconds", "When weights were set", registry=registry)
        last_weights.set_function(lambda: weights_set_at() or 0.0)

    def played(self, played: Round, standing: Callable[[str, str], float]) -> None:
        """A round was written down."""
        self._rounds.labels(played.tier, str(played.counts).lower()).inc()
        self._seconds.labels("asking").observe(played.asking)
        self._seconds.labels("judging").observe(played.judging)
        for outcome in played.outcomes:
            self._outcomes.labels(played.tier, _kind(outcome)).inc()
            self._standing.labels(played.tier, str(outcome.uid)).set(standing(played.tier, outcome.hotkey))
        self._last_round.set(time.time())

    def exposition(self) -> bytes:
        """What ``GET /metrics`` answers with."""
        return generate_latest(self.registry)


def _kind(outcome: Outcome) -> str:
    """An outcome as a label, of which there are few."""
    if outcome.value > 0:
        return "scored"
    kind = outcome.score.why.partition(":")[0]
    if kind == "answer":
        return "invalid"
    return kind.replace(" ", "_") if kind in _KINDS else "worthless"


def create_status_app(board: Callable[[], dict[str, Any]], figures: Figures, *, is_ready: Callable[[], bool]) -> Guard:
    """The application.

    Args:
        board: what ``/leaderboard.json`` answers with, and the page at ``/`` shows.
        is_ready: whether rounds are played.
    """
    html = page()
    headers = page_headers(html)

    async def shown(_: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def leaderboard(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(board), headers={"cache-control": "no-store"})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        good = is_ready()
        return JSONResponse({"status": "ready" if good else "not ready"}, 200 if good else 503)

    async def metrics(_: Request) -> Response:
        return Response(figures.exposition(), media_type="text/plain; version=0.0.4")

    async def missing(http: Request, _: Exception) -> Response:
        told = NotFound("there is no such route")
        return JSONResponse(error_body(told, str(http.state.request_id)), told.status, error_headers(told))

    app = Starlette(
        routes=[
            Route("/", shown),
            Route("/leaderboard.json", leaderboard),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
        ],
        exception_handlers={404: missing, 405: missing},
    )
    app.router.redirect_slashes = False
    return Guard(app, limits=LIMITS)
