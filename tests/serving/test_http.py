"""The routes: what a client sends, what it gets back in which form, and how each mistake of it is answered."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import Awaitable, Callable
from threading import Event
from typing import Any

import httpx
import pytest
import torch

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.serving.engine import CompressionEngine, EngineLimits
from condense_core.serving.http import logs
from condense_core.serving.http.app import create_app
from condense_core.serving.http.guard import HttpLimits
from condense_core.serving.keys import Key, Keys, new_key
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.service import LocalService
from condense_core.serving.wire import END, FRAME
from condense_testing.serving import FakeBackend

CPU = torch.device("cpu")


def run(
    use: Callable[[httpx.AsyncClient], Awaitable[Any]],
    backend: FakeBackend | None = None,
    *,
    keys: Keys | None = None,
    http: HttpLimits | None = None,
    **limits: Any,
) -> Any:
    """What ``use`` returns of a client of the application, which runs in this process."""

    async def main() -> Any:
        observer = PrometheusObserver(CPU)
        engine = CompressionEngine(
            backend or FakeBackend(), limits=EngineLimits(**{"cache_bytes": 0} | limits), observer=observer
        )
        app = create_app(LocalService(engine), observer=observer, keys=keys, limits=http, page=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            return await use(client)

    return asyncio.run(asyncio.wait_for(main(), 60))


def post(body: Any, path: str = "/v1/compress", **options: Any) -> httpx.Response:
    """The answer to one request."""
    some = {key: options.pop(key) for key in ("backend", "keys", "http") if key in options}
    limits = {key: options.pop(key) for key in list(options) if key not in ("headers", "content")}
    content = options.pop("content", None)
    content = json.dumps(body).encode() if content is None else content
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    reply: httpx.Response = run(lambda c: c.post(path, content=content, headers=headers), **some, **limits)
    return reply


def frames(data: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while data:
        index, status, length = FRAME.unpack(data[: FRAME.size])
        found.append((index, status, data[FRAME.size : FRAME.size + length]))
        data = data[FRAME.size + length :]
    return found


def error_of(reply: httpx.Response) -> dict[str, Any]:
    told: dict[str, Any] = reply.json()["error"]
    assert told["request_id"] == reply.headers["x-request-id"]
    return told


# -- forms -------------------------------------------------------------------------------------------------------------


def test_a_text_comes_back_as_soft_tokens_or_as_json() -> None:
    reply = post({"text": "seven.."})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/octet-stream")
    assert SoftTokens.from_bytes(reply.content).embeds[0, 0] == 7
    item = post({"text": "seven.."}, headers={"accept": "application/json"}).json()
    assert base64.b64decode(item.pop("data")) == reply.content
    assert item == {
        "num_context_tokens": 1, "num_soft_tokens": 1, "ratio": 1, "method": "pool", "model": "fake", "text": ""
    }  # fmt: skip


def test_texts_come_back_as_frames_as_lines_or_as_a_list_each_with_its_own_error() -> None:
    body = {"texts": ["a", "unreadable", "ccc"]}
    *items, last = frames(post(body).content)
    assert last == (END, 200, b"")
    assert sorted((index, status) for index, status, _ in items) == [(0, 200), (1, 422), (2, 200)]
    by_index = {index: payload for index, _, payload in items}
    assert SoftTokens.from_bytes(by_index[2]).embeds[0, 0] == 3
    assert json.loads(by_index[1])["error"]["code"] == "invalid_request"
    lines = post(body, headers={"accept": "application/x-ndjson"}).text.splitlines()
    assert {json.loads(line)["index"]: "error" in json.loads(line) for line in lines} == {0: False, 1: True, 2: False}
    data = post(body, headers={"accept": "application/json"}).json()["data"]
    assert [item["index"] for item in data] == [0, 1, 2]
    assert "error" in data[1]
    assert base64.b64decode(data[2]["data"]) == by_index[2]


def test_long_messages_are_compressed_and_short_ones_stay() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "x" * 1000},
        {"role": "assistant", "content": "y" * 999},
        {"role": "user", "content": "z" * 2000},
    ]
    messages = post({"messages": chat}, headers={"accept": "application/json"}).json()["messages"]
    assert [m["role"] for m in messages] == [m["role"] for m in chat]
    assert [m.get("content") for m in messages] == [chat[0]["content"], None, chat[2]["content"], None]
    made = SoftTokens.from_bytes(base64.b64decode(messages[3]["soft_tokens"]["data"]))
    assert made.embeds[0, 0] == 2000
    assert [index for index, *_ in frames(post({"messages": chat, "min_chars": 1500}).content)] == [3, END]
    assert frames(post({"messages": chat[:1]}).content) == [(END, 200, b"")]


@pytest.mark.parametrize(
    ("body", "accept", "status"),
    [
        ({"text": "a"}, "text/html", 406),
        ({"texts": ["a"]}, "application/octet-stream", 406),
        ({"text": "a"}, "text/html, */*", 200),
        ({"text": "a"}, "application/*;q=0.5", 200),
    ],
)
def test_a_form_that_there_is_none_of(body: dict[str, Any], accept: str, status: int) -> None:
    assert post(body, headers={"accept": accept}).status_code == status


# -- what is asked wrongly ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "expected one of text, texts and messages"),
        ({"text": "a", "texts": ["b"]}, "expected one of text, texts and messages"),
        ({"text": ""}, "text: empty"),
        ({"text": 3}, "text: Input should be a valid string"),
        ({"text": None}, "expected one of"),
        ({"texts": []}, "texts: "),
        ({"texts": ["a"] * 257}, "texts: "),
        ({"texts": ["a", ""]}, "text: empty"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"text": "a", "ratio": 0.5}, "ratio: got 0.5"),
        ({"text": "a", "ratio": True}, "ratio"),
        ({"text": "a", "ratio": "4"}, "ratio"),
        ({"text": "a", "ratio": 4, "max_soft_tokens": 2}, "max_soft_tokens: got a ratio too"),
        ({"text": "a", "method": "zip"}, "method: got 'zip'"),
        ({"text": "a", "timeout": -1}, "timeout: got -1"),
        ({"text": "a", "priority": 3}, "priority: got 3, expected at most 0"),
        ({"text": "a", "tenant": "other"}, "tenant: Extra inputs are not permitted"),
        ({"text": "a", "surprise": 1}, "surprise: Extra inputs are not permitted"),
        ([1], "body: "),
        ("text", "body: "),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(body: Any, message: str) -> None:
    reply = post(body)
    assert reply.status_code == 422
    assert message in error_of(reply)["message"]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_numbers_that_are_none(literal: str) -> None:
    reply = post(None, content=f'{{"text": "a", "ratio": {literal}}}'.encode())
    assert (reply.status_code, error_of(reply)["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"nonsense", b"\x80\x81", b'{"text": "\xff\xfe"}', b"\x00" * 100),
        *(b"[" * 200_000, b'{"a":' * 50_000, b'{"text": "\\ud800"}', b'{"text": ' + b"9" * 5000 + b"}"),
    ],
    ids=[
        "empty",
        "cut",
        "words",
        "bytes",
        "not utf-8",
        "zeros",
        "deep list",
        "deep object",
        "surrogate",
        "long number",
    ],
)
def test_a_body_that_is_no_json(content: bytes) -> None:
    reply = post(None, content=content)
    assert (reply.status_code, error_of(reply)["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ({"content-type": "multipart/form-data; boundary=x"}, 415, "unsupported_media_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"content-encoding": "gzip"}, 415, "unsupported_media_type"),
        ({"content-encoding": "deflate, gzip"}, 415, "unsupported_media_type"),
        ({"content-length": "99999999999"}, 413, "too_large"),
    ],
)
def test_bodies_of_another_kind(headers: dict[str, str], status: int, code: str) -> None:
    reply = post({"text": "a"}, headers=headers)
    assert (reply.status_code, error_of(reply)["code"]) == (status, code)


def test_sizes_are_bounded() -> None:
    small = HttpLimits(max_body_bytes=1000)
    assert error_of(post({"text": "x" * 2000}, http=small))["code"] == "too_large"
    assert error_of(post({"text": "x" * 200}, max_chars=100))["message"] == (
        "text: 200 characters, expected at most 100"
    )
    assert error_of(post({"text": "x" * 200}, http=HttpLimits(max_buffered_bytes=100)))["code"] == "queue_full"


def test_other_routes_methods_and_models() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        assert error_of(await client.get("/v2/compress"))["code"] == "not_found"
        wrong = await client.get("/v1/compress")
        assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"
        other = await client.post("/v1/compress", json={"text": "a", "model": "other"})
        assert (other.status_code, error_of(other)["code"]) == (404, "unknown_model")
        assert (await client.post("/v1/compress", json={"text": "a", "model": "owner/fake"})).status_code == 200

    run(use)


def test_a_mistake_of_the_server_is_told_without_contents(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.configure(stream)
    try:
        backend = FakeBackend(fails=lambda texts: KeyError(texts[0]))
        reply = post({"text": "the secret of the abbey", "question": "whose secret?"}, backend=backend)
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    assert (reply.status_code, error_of(reply)["code"]) == (500, "internal")
    told = reply.text + stream.getvalue() + "".join(capsys.readouterr())
    assert "secret" not in told
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    request = next(line for line in lines if line["event"] == "request")
    assert (request["status"], request["code"], request["chars"]) == (500, "internal", 36)
    assert any("serving.py:" in line["event"] for line in lines)  # where it was


def test_a_full_queue_says_when_to_come_again() -> None:
    backend = FakeBackend(gate=Event(), together=False)

    async def use(client: httpx.AsyncClient) -> None:
        work = [asyncio.ensure_future(client.post("/v1/compress", json={"text": f"{i}"})) for i in range(2)]
        while (await client.get("/v1/load")).json()["running"] + (await client.get("/v1/load")).json()["waiting"] < 2:
            await asyncio.sleep(0.01)
        reply = await client.post("/v1/compress", json={"text": "one more"})
        assert (reply.status_code, error_of(reply)["code"]) == (503, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        late = await client.post("/v1/compress", json={"text": "late", "timeout": 0.05, "max_soft_tokens": 1})
        assert error_of(late)["code"] == "queue_full"
        backend.gate.set()
        assert [(await each).status_code for each in work] == [200, 200]

    run(use, backend, max_requests=2)


def test_a_deadline_is_an_answer() -> None:
    backend = FakeBackend(gate=Event())
    reply = run(lambda c: _and_open(c.post("/v1/compress", json={"text": "a", "timeout": 0.05}), backend), backend)
    assert (reply.status_code, error_of(reply)["code"]) == (504, "deadline_exceeded")


async def _and_open(work: Awaitable[httpx.Response], backend: FakeBackend) -> httpx.Response:
    try:
        return await work
    finally:
        assert backend.gate is not None
        backend.gate.set()


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    key, lines = new_key("app")
    digest = lines.split('sha256 = "')[1][:64]
    keys = Keys([Key("app", digest, requests_per_minute=4, chars_per_minute=100, max_priority=2)])

    async def use(client: httpx.AsyncClient) -> None:
        for headers in ({}, {"authorization": "Bearer ck_wrong"}, {"authorization": f"Basic {key}"}):
            reply = await client.post("/v1/compress", json={"text": "a"}, headers=headers)
            assert (reply.status_code, error_of(reply)["code"]) == (401, "unauthorized")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/health")).status_code == 200
        mine = {"authorization": f"Bearer {key}"}
        for body, status in (
            ({"text": "x" * 60, "priority": 2}, 200),
            ({"text": "x" * 60}, 429),  # characters
            ({"text": "x" * 30, "priority": 3}, 422),
            ({"text": "x" * 30}, 200),
            ({"text": "x"}, 429),  # requests
        ):
            reply = await client.post("/v1/compress", json=body, headers=mine)
            assert reply.status_code == status, reply.text
        assert error_of(reply)["code"] == "rate_limited"
        assert int(reply.headers["retry-after"]) > 1
        assert key not in (await client.get("/metrics")).text

    run(use, keys=keys)


def test_requests_of_a_key_at_once_are_bounded() -> None:
    backend = FakeBackend(gate=Event())
    key, lines = new_key("app")
    keys = Keys([Key("app", lines.split('sha256 = "')[1][:64], max_concurrent=1)])

    async def use(client: httpx.AsyncClient) -> None:
        mine = {"authorization": f"Bearer {key}"}
        first = asyncio.ensure_future(client.post("/v1/compress", json={"text": "a"}, headers=mine))
        await asyncio.sleep(0.05)
        assert (await client.get("/v1/models", headers=mine)).status_code == 429
        backend.gate.set()
        assert (await first).status_code == 200
        assert (await client.get("/v1/models", headers=mine)).status_code == 200

    run(use, backend, keys=keys)


# -- facts -------------------------------------------------------------------------------------------------------------


def test_request_ids_are_taken_over_where_they_are_harmless() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        reply = await client.get("/health", headers={"x-request-id": "abc-123"})
        assert reply.headers["x-request-id"] == "abc-123"
        for bad in ("a b", "x" * 65, "<script>", ""):
            reply = await client.get("/health", headers={"x-request-id": bad})
            assert len(reply.headers["x-request-id"]) == 32

    run(use)


def test_figures() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        await client.post("/v1/compress", json={"text": "four"})
        await client.post("/v1/compress", json={"text": "unreadable"})
        await client.get("/nowhere/<script>")
        text = (await client.get("/metrics")).text
        for line in (
            'condense_requests_total{code="ok",kind="CompressRequest"} 1.0',
            'condense_requests_total{code="invalid_request",kind="CompressRequest"} 1.0',
            'condense_stage_seconds_count{stage="queue"} 1.0',
            'condense_http_responses_total{route="/v1/compress",status="200"} 1.0',
            'condense_http_responses_total{route="unknown",status="404"} 1.0',
        ):
            assert line in text
        assert "<script" not in text
        load = (await client.get("/v1/load")).json()
        assert (load["waiting"], load["running"]) == (0, 0)
        assert load["latency_ms"]["p50"] > 0
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "fake"
        assert (await client.get("/ready")).json() == {"status": "ready"}

    run(use)


def test_a_device_that_failed_shows_in_health() -> None:
    backend = FakeBackend(fails=lambda texts: RuntimeError("CUDA error: unspecified launch failure"))

    async def use(client: httpx.AsyncClient) -> None:
        assert error_of(await client.post("/v1/compress", json={"text": "a"}))["code"] == "device_failed"
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503

    run(use, backend)
