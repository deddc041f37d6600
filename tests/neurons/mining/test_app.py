"""A miner over HTTP: who may ask, what is answered, and what is refused, with real signatures."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
import httpx
from bittensor import http_auth
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.chain.base import Metagraph, Neuron
from condense_core.neurons.mining.app import Miner, create_miner_app
from condense_core.neurons.mining.backends import EngineBackend, own_backend
from condense_core.neurons.mining.gate import Gate, GateSettings
from condense_core.neurons.protocol.identity import read_identity
from condense_core.neurons.protocol.messages import COMPRESS, IDENTITY, Ask
from condense_core.neurons.protocol.nonces import SqliteNonceStore
from condense_core.neurons.protocol.sealing import seal
from condense_core.neurons.protocol.signing import verify_response
from condense_core.neurons.tiers import Tiers, read_tiers
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.errors import ServingError
from condense_testing.chains import key

MINER, VALIDATOR, STRANGER = key("miner"), key("validator"), key("stranger")
TEXT = "The keeper of the north archive counts the lamps at dusk. " * 30
SEALING = X25519PrivateKey.generate()


def tiers(model: str, **changes: Any) -> Tiers:
    known = read_tiers()
    one = known.tiers["research"].model_copy(update={"model": model, **changes})
    return known.model_copy(update={"tiers": {**known.tiers, "research": one}})


@pytest.fixture
def served(tiny_model_path: Path, tmp_path: Path) -> Miner:
    """A miner whose tier `research` is the random tiny model's; it knows one validator."""
    backend = EngineBackend(CompressionEngine.from_pretrained(tiny_model_path, prunes=False, answers=False))
    gate = Gate(GateSettings(requests_per_minute=6000.0))
    row = Neuron(0, VALIDATOR.ss58_address, "cold", None, True, 1000.0, 0.0, True, 0, 0, 0.0, 0.0, 0.0)
    gate.update(Metagraph(1, 0, (row,), 360, 0, None))
    own = tiers(str(backend.engine.facts()["id"]), timeout=30.0)
    return Miner(MINER, own, backend, gate, SqliteNonceStore(tmp_path / "nonces.db"), sealing_key=SEALING)


@asynccontextmanager
async def client(miner: Miner) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the miner's application, which has been started."""
    app = create_miner_app(miner)
    await miner.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://miner") as made:
            yield made
    finally:
        await miner.backend.stop()


async def send(http: httpx.AsyncClient, sent: bytes, by: Any = VALIDATOR, **changes: Any) -> httpx.Response:
    """A signed request; changes: what is signed instead of what is sent, and headers."""
    headers = changes.pop("headers", {})
    fields = {"method": "POST", "path": COMPRESS, "body": sent, "receiver_ss58": MINER.ss58_address, **changes}
    signed = http_auth.sign(by, **fields)
    return await http.post(COMPRESS, content=sent, headers={"content-type": "application/json", **signed, **headers})


def ask(**changes: Any) -> bytes:
    return Ask(**{"tier": "research", "text": TEXT, "ratio": 4.0, **changes}).to_bytes()


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_an_answer_is_the_engines_own_and_signed(served: Miner) -> None:
    async def use() -> None:
        async with client(served) as http:
            nonce = time.time_ns()
            response = await send(http, ask(), nonce_ns=nonce)
            assert response.status_code == 200, response.text
            soft = SoftTokens.from_bytes(response.content)
            own = await served.backend.engine.compress(TEXT, ratio=4)  # type: ignore[attr-defined]
            assert soft.embeds.equal(own.embeds)
            assert soft.text == ""
            verify_response(
                response.headers,
                response.content,
                nonce_ns=nonce,
                caller=VALIDATOR.ss58_address,
                responder=MINER.ss58_address,
                status=200,
            )

    asyncio.run(use())


def test_a_sealed_request_gets_a_sealed_answer(served: Miner) -> None:
    async def use() -> None:
        async with client(served) as http:
            told = await http.get(IDENTITY)
            identity = read_identity(told.content, told.headers, hotkey=MINER.ss58_address)
            assert identity.tiers == ("research",)
            who = {"sender_ss58": VALIDATOR.ss58_address, "receiver_ss58": MINER.ss58_address}
            sealed, secret = seal(ask(), bytes.fromhex(identity.sealing_key), **who)
            envelope = json.dumps({"sealed": base64.b64encode(sealed).decode()}).encode()
            assert b"keeper" not in envelope
            response = await send(http, envelope)
            assert response.status_code == 200, response.text
            assert len(SoftTokens.from_bytes(secret.open_answer(response.content))) > 10
            others = await send(http, envelope, headers={"x-other": "1"}, by=STRANGER)
            assert code(others) == (403, "forbidden")

    asyncio.run(use())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", (422, "invalid_request")),
        (b"\xff\xfe", (422, "invalid_request")),
        (ask(tier="gold"), (404, "unknown_tier")),
        (ask(tier="inference_0", text="x" * 2000), (404, "unknown_tier")),  # another model's
        (ask(text="short"), (422, "invalid_request")),
        (ask(text="x" * 2501), (413, "too_large")),
        (ask(ratio=64.0), (422, "invalid_request")),
        (b'{"sealed":"AAAA"}', (422, "invalid_request")),
        (b'{"sealed":7}', (422, "invalid_request")),
        (b'{"sealed":' + b"[" * 5000, (422, "invalid_request")),
        (b'{"text":"' + b"x" * 10**6 + b'"}', (413, "too_large")),
    ],
    ids=[
        *("no fields", "no UTF-8", "no such tier", "a tier of another model", "too short", "too long", "another ratio"),
        *("sealed, too short", "sealed, no text", "sealed, no JSON", "a body too large"),
    ],
)
def test_what_is_no_request_is_refused(served: Miner, body: bytes, expected: tuple[int, str]) -> None:
    async def use() -> None:
        async with client(served) as http:
            assert code(await send(http, body)) == expected

    asyncio.run(use())


def test_only_a_fresh_signature_of_this_request_to_this_miner_counts(served: Miner) -> None:
    async def use() -> None:
        async with client(served) as http:
            forged = [
                {"body": b"other"},
                {"path": "/v1/other"},
                {"method": "GET"},
                {"receiver_ss58": STRANGER.ss58_address},
                {"receiver_ss58": None},
                {"nonce_ns": time.time_ns() - 20 * 10**9},
                {"nonce_ns": time.time_ns() + 20 * 10**9},
                {"headers": {http_auth.HEADER_SIGNATURE: "0x" + "00" * 64}},
                {"headers": {http_auth.HEADER_HOTKEY: STRANGER.ss58_address}},
                {"headers": {http_auth.HEADER_HOTKEY: "x" * 40}},
                {"headers": {http_auth.HEADER_NONCE: "soon"}},
            ]
            for changes in forged:
                assert code(await send(http, ask(), **changes)) == (401, "unauthorized"), changes
            unsigned = await http.post(COMPRESS, content=ask(), headers={"content-type": "application/json"})
            assert code(unsigned) == (401, "unauthorized")

    asyncio.run(use())


def test_a_replay_is_refused_also_after_a_restart(served: Miner, tmp_path: Path) -> None:
    async def use() -> None:
        nonce = time.time_ns()
        async with client(served) as http:
            assert (await send(http, ask(), nonce_ns=nonce)).status_code == 200
            assert code(await send(http, ask(), nonce_ns=nonce)) == (401, "unauthorized")
        served.nonces.close()
        served.nonces = SqliteNonceStore(tmp_path / "nonces.db")
        served.backend = EngineBackend(CompressionEngine(served.backend.engine.backend))  # type: ignore[attr-defined]
        async with client(served) as http:
            assert code(await send(http, ask(), nonce_ns=nonce)) == (401, "unauthorized")
            assert (await send(http, ask())).status_code == 200

    asyncio.run(use())


def test_where_nonces_cannot_be_written_down_nobody_is_answered_and_everybody_hears_why(served: Miner) -> None:
    async def use() -> None:
        async with client(served) as http:
            served.nonces.close()
            refused = await send(http, ask())
            assert code(refused) == (503, "not_ready")
            assert refused.headers["retry-after"] == "60"
            assert "nonces.db" not in refused.text

    asyncio.run(use())


def test_whoever_may_not_ask_costs_no_compression(served: Miner) -> None:
    async def use() -> None:
        async with client(served) as http:
            served.backend.compress = None  # type: ignore[assignment]
            assert code(await send(http, ask(), by=STRANGER)) == (403, "forbidden")

    asyncio.run(use())


def test_a_quota_ends_with_429_and_when_to_come_again(served: Miner) -> None:
    async def use() -> None:
        rows = [Neuron(0, VALIDATOR.ss58_address, "cold", None, True, 1.0, 0.0, True, 0, 0, 0.0, 0.0, 0.0)]
        served.gate = Gate(GateSettings(requests_per_minute=6.0, burst_seconds=10.0))
        served.gate.update(Metagraph(1, 0, tuple(rows), 360, 0, None))
        async with client(served) as http:
            assert (await send(http, ask())).status_code == 200
            refused = await send(http, ask())
            assert code(refused) == (429, "rate_limited")
            assert 1 <= int(refused.headers["retry-after"]) <= 10
            assert code(await send(http, b"{}")) == (422, "invalid_request")
            assert code(await send(http, b"{}")) == (429, "rate_limited")  # what makes no sense has a quota, too

    asyncio.run(use())


def test_the_operators_routes_answer_everybody(served: Miner) -> None:
    async def use() -> None:
        async with client(served) as http:
            assert (await http.get("/health")).json() == {"status": "ok"}
            assert (await http.get("/ready")).json() == {"status": "ready"}
            assert (await http.get("/metrics")).status_code == 200
            assert code(await http.get("/nothing")) == (404, "not_found")
            assert (await http.get(COMPRESS)).status_code == 404
        assert not served.backend.is_ready

    asyncio.run(use())


def test_a_miner_that_serves_no_tier_does_not_start(served: Miner) -> None:
    async def use() -> None:
        served.tiers = read_tiers()
        with pytest.raises(
            ValueError, match=r"it serves no tier, expected the model mistralai/Mistral-7B-Instruct-v0\.2"
        ):
            await served.start()
        await served.backend.stop()

    asyncio.run(use())


class Fixed:
    """A backend of one's own: always the same soft tokens."""

    is_ready = is_healthy = True

    def __init__(self, rows: int = 1) -> None:
        self.rows = rows

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def serves(self, tier: Any) -> bool:
        return True

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        raise ServingError(f"{self.rows} rows, priority {priority}, at most {timeout > 7} seconds")


def test_a_backend_of_ones_own_is_used(served: Miner) -> None:
    async def use() -> None:
        served.backend = own_backend(f"{__name__}:Fixed", rows=3)
        served.tiers = read_tiers()
        async with client(served) as http:
            response = await send(http, ask())
            assert code(response) == (500, "internal")
            assert "3 rows, priority 9, at most True seconds" in response.text

    asyncio.run(use())


@pytest.mark.parametrize("name", ["nowhere:Thing", "json:Nothing", "json", "collections:Counter", f"{__name__}:ask"])
def test_a_backend_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="backend: "):
        own_backend(name)
