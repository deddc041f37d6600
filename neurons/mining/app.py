"""A miner's HTTP application: who asks is checked, then how much, then what; the answer is signed."""

from __future__ import annotations

import base64
import binascii
import json
import time
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from condense_core.neurons.extra import bittensor_module
from condense_core.neurons.mining.backends import Backend, answer_of
from condense_core.neurons.mining.gate import Gate, NotReady
from condense_core.neurons.protocol.identity import Identity
from condense_core.neurons.protocol.messages import (
    COMPRESS,
    IDENTITY,
    VERSION,
    Ask,
    MessageError,
    most_ask_bytes,
    read_ask,
)
from condense_core.neurons.protocol.nonces import NotWritten, SqliteNonceStore
from condense_core.neurons.protocol.sealing import SealError, Secret, unseal
from condense_core.neurons.protocol.signing import Hotkey, sign_response
from condense_core.neurons.tiers import Tier, Tiers
from condense_core.serving.errors import InvalidRequest, NotFound, ServingError, TooLarge, Unauthorized
from condense_core.serving.http.guard import Guard, HttpLimits, while_connected
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.wire import OCTETS, error_body, error_headers

_SEALED_OVERHEAD = 4 / 3  # of base64
_NO_TIER = "none"  # whose quota requests count into that ask for nothing that there is


class UnknownTier(ServingError):
    """This miner does not serve the tier."""

    code, status = "unknown_tier", 404


@dataclass(frozen=True)
class Caller:
    """Who signed a request, and its nonce, which its answer is bound to."""

    hotkey: str
    nonce_ns: int


class Miner:
    """What a miner does with a request, whatever carries it."""

    def __init__(
        self,
        hotkey: Hotkey,
        tiers: Tiers,
        backend: Backend,
        gate: Gate,
        nonces: SqliteNonceStore,
        *,
        sealing_key: X25519PrivateKey | None = None,
    ) -> None:
        self.hotkey, self.tiers, self.backend, self.gate, self.nonces = hotkey, tiers, backend, gate, nonces
        self.sealing_key = sealing_key or X25519PrivateKey.generate()
        self.served: list[str] = []  # until it has started

    async def start(self) -> None:
        """Get ready; ``ValueError`` where no tier's model is served."""
        await self.backend.start()
        self.served = sorted(name for name, tier in self.tiers.tiers.items() if self.backend.serves(tier))
        if not self.served:
            models = sorted({tier.model for tier in self.tiers.tiers.values()})
            raise ValueError(f"backend: it serves no tier, expected the model {' or '.join(models)}")

    def caller(self, headers: dict[str, str], body: bytes, method: str, path: str) -> Caller:
        """Who signed a request.

        Raises:
            Unauthorized: nobody did, or to somebody else, too long ago, or twice.
            NotReady: whether it came before cannot be written down.
        """
        http_auth: Any = bittensor_module("bittensor.http_auth")
        own = self.hotkey.ss58_address
        try:
            found = http_auth.verify(
                headers, body, method=method, path=path, self_hotkey_ss58=own, nonce_store=self.nonces
            )
        except http_auth.AuthError as error:
            raise Unauthorized(f"signature: {error}") from None
        except NotWritten as error:
            raise NotReady(str(error), retry_after=60.0) from None
        return Caller(found.hotkey_ss58, found.nonce_ns)

    def opened(self, body: bytes, caller: Caller) -> tuple[Ask, Tier, Secret | None]:
        """What a request asks for, and what seals its answer, where it came sealed."""
        secret = None
        try:
            if body.startswith(b'{"sealed":'):
                sealed = _sealed(body)
                body, secret = unseal(
                    sealed, self.sealing_key, sender_ss58=caller.hotkey, receiver_ss58=self.hotkey.ss58_address
                )
            ask, tier = read_ask(body, self.tiers)
        except SealError as error:
            raise InvalidRequest(str(error)) from None
        except MessageError as error:
            if error.code == "unknown_tier":
                raise UnknownTier(str(error)) from None
            kind = TooLarge if error.code == "too_large" else InvalidRequest
            raise kind(str(error)) from None
        if ask.tier not in self.served:
            raise UnknownTier(f"tier: got {ask.tier!r}, this miner serves {', '.join(self.served)}")
        return ask, tier, secret

    async def answer(self, body: bytes, caller: Caller) -> tuple[bytes, dict[str, str]]:
        """The body and the headers of an answer; ``ServingError`` says why there is none."""
        started = time.monotonic()
        priority = self.gate.check(caller.hotkey)
        try:
            ask, tier, secret = self.opened(body, caller)
        except ServingError:
            self.gate.spend(caller.hotkey, _NO_TIER)  # what makes no sense costs as well
            raise
        self.gate.spend(caller.hotkey, ask.tier)
        left = max(tier.timeout - (time.monotonic() - started), 0.001)

        def finished(payload: bytes) -> tuple[bytes, dict[str, str]]:
            if secret is not None:
                payload = secret.seal_answer(payload)
            return payload, sign_response(
                self.hotkey, nonce_ns=caller.nonce_ns, caller=caller.hotkey, status=200, body=payload
            )

        return await answer_of(self.backend, ask, finished, priority=priority, timeout=left)

    def identity(self) -> tuple[bytes, dict[str, str]]:
        """Who this is, which tiers it serves and with which key it can be sealed for, signed."""
        return Identity.of(self.hotkey.ss58_address, self.served, self.sealing_key, VERSION).signed(self.hotkey)


class _Route(Route):
    """A route whose path stands in the log and in the metrics."""

    def matches(self, scope: Any) -> Any:
        match, child = super().matches(scope)
        return match, {**child, "route": self}


def _sealed(body: bytes) -> bytes:
    try:
        sealed = json.loads(body)["sealed"]
        return base64.b64decode(sealed, validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise SealError("sealed request: expected base64 in JSON") from None


def create_miner_app(
    miner: Miner,
    *,
    observer: PrometheusObserver | None = None,
    limits: HttpLimits | None = None,
) -> Guard:
    """The application around ``miner``, which somebody else starts and stops.

    Args:
        observer: for ``/metrics``. limits: of HTTP; by default ``miner_limits``.
    """

    async def compress(http: Request) -> Response:
        body = await http.body()
        raw = http.scope.get("raw_path", http.scope["path"].encode()).decode("latin-1")
        query = http.scope["query_string"].decode("latin-1")
        path = f"{raw}?{query}" if query else raw
        caller = miner.caller(dict(http.headers), body, http.method, path)
        payload, headers = await while_connected(http.receive, miner.answer(body, caller))
        return Response(payload, media_type=OCTETS, headers=headers)

    async def identity(_: Request) -> Response:
        payload, headers = miner.identity()
        return Response(payload, media_type="application/json", headers=headers)

    async def health(_: Request) -> Response:
        good = miner.backend.is_healthy
        return JSONResponse({"status": "ok" if good else "failed"}, 200 if good else 503)

    async def ready(_: Request) -> Response:
        good = miner.backend.is_ready and miner.gate.is_ready
        return JSONResponse({"status": "ready" if good else "not ready"}, 200 if good else 503)

    async def metrics(_: Request) -> Response:
        return Response(observer.exposition() if observer else b"", media_type="text/plain; version=0.0.4")

    async def refused(http: Request, error: Exception) -> Response:
        told = error if isinstance(error, ServingError) else NotFound("there is no such route")
        http.state.failed(told.code)
        return JSONResponse(error_body(told, str(http.state.request_id)), told.status, error_headers(told))

    app = Starlette(
        routes=[
            _Route(COMPRESS, compress, methods=["POST"]),
            _Route(IDENTITY, identity),
            _Route("/health", health),
            _Route("/ready", ready),
            _Route("/metrics", metrics),
        ],
        exception_handlers={ServingError: refused, 404: refused, 405: refused},
    )
    app.router.redirect_slashes = False  # a redirect would go where the request's own Host says
    return Guard(app, limits=limits or miner_limits(miner.tiers), observer=observer)


def miner_limits(tiers: Tiers) -> HttpLimits:
    """What HTTP allows a caller: bodies as long as the longest request of the tiers."""
    return HttpLimits(max_body_bytes=int(most_ask_bytes(tiers) * _SEALED_OVERHEAD) + 4096)
