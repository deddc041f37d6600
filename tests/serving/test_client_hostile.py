"""The clients against servers that are wrong in every way: each ends in its error, in time, and leaves nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.serving.client import CondenseClient
from condense_core.serving.client_answers import FrameParser
from condense_core.serving.errors import (
    BadAnswer,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    QueueFull,
    RateLimited,
    ServingError,
    Unauthorized,
    Unavailable,
)
from condense_core.serving.wire import END, FRAME, FRAMES, frame
from condense_testing.scripted_server import Answer, ScriptedServer, error_reply, reply, scripted_server

SOFT = SoftTokens(torch.ones(1, 2), num_context_tokens=1, ratio=1, model_id="fake")
PAYLOAD = SOFT.to_bytes()
GOOD = reply(PAYLOAD)
LAST = frame(END, 200, b"")
KEY = "ck_a-secret-that-nobody-may-see"


def framed(*parts: bytes, **headers: str) -> bytes:
    return reply(b"".join(parts), kind=FRAMES, **headers)


def ends(answer: Answer, ask: Callable[[CondenseClient], Any], kind: type[ServingError], **how: Any) -> ScriptedServer:
    """``ask`` ends in an error of exactly this kind, in time; its message is matched by ``match``."""
    match, timeout = how.pop("match", None), how.pop("timeout", 2.0)
    with scripted_server(*(answer if isinstance(answer, tuple) else (answer,))) as server:
        started = time.monotonic()
        with CondenseClient(server.url, timeout=timeout, **how) as client, pytest.raises(kind, match=match) as caught:
            ask(client)
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        assert time.monotonic() - started < timeout + 0.5
    return server


def compress(client: CondenseClient) -> Any:
    return client.compress("text")


def compress_two(client: CondenseClient) -> Any:
    return client.compress_many(["a", "b"])


# -- one text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (reply(b"<html>", kind="text/html"), "content-type is 'text/html', expected application/octet-stream"),
        (reply(PAYLOAD, content_encoding="gzip"), "content-encoding is 'gzip'"),
        (reply(PAYLOAD, status=204), "status 204"),
        (reply(b"", status=418, kind="text/plain"), "status 418"),
        (reply(b""), "soft tokens: no bytes"),
        (reply(b"\x80\x04\x95" + b"." * 50), "soft tokens: this is a Python pickle, which is never loaded"),
        (reply(b"garbage" * 9), "soft tokens: no safetensors header"),
        (reply(PAYLOAD[:-1]), "soft tokens: 7 bytes of tensor data"),
        (reply(PAYLOAD[:-1] + b"!"), "soft tokens: the tensor data does not match its SHA-256"),
        (reply(replace(SOFT, context_sha256="0" * 64).to_bytes()), "soft tokens: they are of another text"),
        (GOOD[:-5], "cut off"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000, "no HTTP"),
        (reply(PAYLOAD, content_length="-1"), "no HTTP"),
        (reply(PAYLOAD, content_length="9" * 18), "more than 5,000 bytes"),
        (reply(b"x" * 5001), "more than 5,000 bytes"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n\r\n" + b"x" * 10_000, "more than 5,000 bytes"),
        (reply(b"", status=422, content_length="99999"), "status 422"),
    ],
)
def test_what_is_no_answer(answer: bytes, match: str) -> None:
    kind = InvalidRequest if b" 422 " in answer else BadAnswer
    server = ends(answer, compress, kind, match=match, max_bytes=5000)
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed_and_its_target_learns_nothing() -> None:
    with scripted_server(GOOD) as other:
        elsewhere = reply(b"", status=307, location=f"{other.url}/v1/compress")
        ends(elsewhere, compress, BadAnswer, match="redirects are not followed", api_key=KEY)
        assert other.requests == []


def test_soft_tokens_of_the_text_that_was_sent_are_taken() -> None:
    mine = replace(SOFT, context_sha256=hashlib.sha256(b"text").hexdigest())
    with scripted_server(reply(mine.to_bytes())) as server, CondenseClient(server.url) as client:
        assert client.compress("text").embeds.equal(mine.embeds)


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\nx", GOOD[:-20], b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_slow_server_is_left_at_the_deadline(first: bytes) -> None:
    with scripted_server() as server:
        piece = b"a" if first[:12] != b"HTTP/1.1 100" else first
        server.answers = (server.drips(piece if first else b"", first=first),)
        started = time.monotonic()
        with CondenseClient(server.url) as client, pytest.raises(DeadlineExceeded, match=r"timeout: 0.25 s are over"):
            client.compress("text", timeout=0.25)
        assert 0.2 < time.monotonic() - started < 0.6


def test_a_body_without_end_is_left_at_its_bound() -> None:
    def pours(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    ends(pours, compress, BadAnswer, match="more than 100,000 bytes", max_bytes=100_000)


# -- when it asks again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        error_reply(503, "queue_full"),
        error_reply(503, "shutting_down", retry_after="0"),
        error_reply(429, "rate_limited"),
        reply(b"<html>", status=502, kind="text/html"),
        reply(b"", status=503, kind="text/plain", retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
        b"",  # closed before an answer
        b"HTTP/1.1 2",
    ],
)
def test_it_asks_again_where_that_may_help(first: bytes) -> None:
    with scripted_server(first, first, GOOD) as server, CondenseClient(server.url, timeout=5) as client:
        assert client.compress("text").embeds.equal(SOFT.embeds)
        bodies = [json.loads(body) for _, body in server.requests]
    assert [body["text"] for body in bodies] == ["text"] * 3
    assert 5 >= bodies[0]["timeout"] > bodies[1]["timeout"] > bodies[2]["timeout"] > 3  # what is left of it


def test_it_comes_no_sooner_than_the_server_said() -> None:
    told = {"error": {"code": "queue_full", "message": "later", "request_id": "1", "retry_after": 0.4}}
    with scripted_server(reply(told, 503, retry_after="1"), GOOD) as server, CondenseClient(server.url) as client:
        started = time.monotonic()
        client.compress("text", timeout=5)
        assert 0.4 <= time.monotonic() - started < 0.9


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error_reply(503, "queue_full", retry_after="30"), QueueFull),
        (reply(b"", status=503, kind="text/plain", retry_after="30"), Unavailable),
        (error_reply(429, "rate_limited", retry_after="30"), RateLimited),
        (error_reply(401, "unauthorized"), Unauthorized),
        (error_reply(404, "not_found"), NotFound),
        (error_reply(422, "queue_full", retry_after="0"), InvalidRequest),  # a code of another status
        (error_reply(500, "internal"), InternalError),
        (error_reply(504, "deadline_exceeded"), DeadlineExceeded),
    ],
)
def test_it_does_not_ask_again_where_that_cannot_help(answer: bytes, kind: type[ServingError]) -> None:
    started = time.monotonic()
    server = ends(answer, compress, kind, timeout=3.0)
    assert len(server.requests) == 1
    assert time.monotonic() - started < 1.0


def test_retries_are_bounded_and_errors_of_later_releases_keep_their_code() -> None:
    assert len(ends(error_reply(503, "queue_full"), compress, QueueFull, retries=2).requests) == 3
    with scripted_server(error_reply(451, "too_secret", "not\x1b[31m for you\n")) as server:
        with CondenseClient(server.url) as client, pytest.raises(ServingError, match=r"not.*for you") as caught:
            client.compress("text")
        assert (type(caught.value), caught.value.code, caught.value.status) == (ServingError, "too_secret", 451)
        assert str(caught.value).isprintable()


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    started = time.monotonic()
    with CondenseClient(url, timeout=0.4) as client:
        with pytest.raises(Unavailable, match=r"http://127.0.0.1:\d+: cannot be reached \(Connection refused\)"):
            client.compress("text")
        assert not client.is_ready()
    assert time.monotonic() - started < 0.6
    with CondenseClient(url.replace("http", "https"), timeout=0.2, retries=0) as client, pytest.raises(Unavailable):
        client.models()


def test_a_server_that_takes_connections_and_never_answers_them() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1) as deaf,
        CondenseClient(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout=0.2) as client,
    ):
        with pytest.raises(DeadlineExceeded, match="has not answered"):
            client.compress("text" * 500_000)  # more than the sockets hold
        with pytest.raises(DeadlineExceeded):
            client.is_ready()


# -- several texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (framed(), "cut off"),
        (framed(frame(0, 200, PAYLOAD), frame(1, 200, PAYLOAD)), "cut off"),
        (framed(frame(0, 200, PAYLOAD), frame(1, 200, PAYLOAD)[:-1]), "cut off"),
        (framed(frame(0, 200, PAYLOAD), LAST), "1 texts too early"),
        (
            framed(frame(0, 200, PAYLOAD), frame(0, 200, PAYLOAD), LAST),
            "got index 0, expected each index of a text once",
        ),
        (framed(frame(2, 200, PAYLOAD)), "got index 2"),
        (framed(frame(0, 99, PAYLOAD)), "got status 99"),
        (framed(FRAME.pack(0, 200, 2**63)), "one of 9,223,372,036,854,775,808 bytes, expected at most 5,000"),
        (framed(frame(0, 200, PAYLOAD), FRAME.pack(1, 200, 5000 - len(PAYLOAD) + 1)), "expected at most 4,5"),
        (framed(FRAME.pack(0, 503, 2**20)), "expected at most 5,000"),
        (framed(frame(0, 200, PAYLOAD), frame(1, 200, PAYLOAD), LAST, b"!"), "behind the last one"),
        (framed(frame(0, 200, PAYLOAD), frame(1, 200, PAYLOAD), frame(END, 200, b"!")), "is not empty"),
        (framed(frame(0, 200, PAYLOAD), frame(1, 200, b"garbage"), LAST), r"texts\[1\]: soft tokens"),
        (framed(frame(0, 200, PAYLOAD), content_length="100000")[:-9], "more than 5,000 bytes"),
        (reply(PAYLOAD), "content-type is"),
    ],
)
def test_frames_that_are_none(answer: bytes, match: str) -> None:
    ends(answer, compress_two, BadAnswer, match=match, max_bytes=5000)


def test_frames_that_stop_coming() -> None:
    with scripted_server() as server:
        head = framed(frame(0, 200, PAYLOAD), content_length="4000")
        server.answers = (server.drips(b"", first=head),)
        with CondenseClient(server.url, timeout=0.3) as client:
            stream = client.compress_stream(["a", "b"])
            index, soft = next(stream)
            assert isinstance(soft, SoftTokens)
            assert index == 0
            with pytest.raises(DeadlineExceeded):
                next(stream)


@pytest.mark.parametrize("payload", [b"", b"[" * 9000, b"\xff", b"3", b'{"error": {"code": 3, "message": []}}'])
def test_an_error_in_a_frame_that_says_nothing_is_that_of_its_status(payload: bytes) -> None:
    answer = framed(frame(0, 422, payload), frame(1, 200, PAYLOAD), LAST)
    ends(answer, compress_two, InvalidRequest, match=r"texts\[0\]: the server answered with status 422")


@given(cuts=st.lists(st.integers(0, 3000), max_size=12), order=st.permutations(range(4)))
@settings(max_examples=60, deadline=None)
def test_frames_are_the_same_however_they_are_cut(cuts: list[int], order: list[int]) -> None:
    body = b"".join(frame(i, 200, bytes([i]) * (i * 300)) for i in order) + LAST
    parser, found = FrameParser(4, 10_000), []
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for start, stop in itertools.pairwise(places):
        found += parser.feed(body[start:stop])
    parser.end()
    assert found == [(i, bytes([i]) * (i * 300)) for i in order]


def test_no_bytes_do_more_than_raise_their_error() -> None:
    rng = random.Random(0)
    body = b"".join(frame(i, 200, b"abc") for i in range(3)) + LAST
    ended = 0
    for _ in range(3000):
        damaged = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        parser = FrameParser(3, 100)
        try:
            parser.feed(bytes(damaged[: rng.randint(1, len(damaged))]))
            parser.end()
        except BadAnswer:
            ended += 1
    assert ended > 2000


# -- JSON and caches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (reply(b"[" * 100_000, kind="application/json"), "no JSON"),
        (reply(b"\xff{}", kind="application/json"), "no JSON"),
        (reply(b"[]", kind="application/json"), "is list, expected a JSON object"),
        (reply({"data": {}}), "got no list of objects"),
        (reply({"data": [3]}), "got no list of objects"),
        (reply(b" " * (4 * 2**20 + 1), kind="application/json"), "more than 4,194,304 bytes"),
        (reply(b"{}", kind="text/json"), "content-type"),
    ],
)
def test_json_that_is_none(answer: bytes, match: str) -> None:
    ends(answer, lambda client: client.models(), BadAnswer, match=match)


def test_readiness_is_told_by_such_a_server_only() -> None:
    ends(reply(b"", status=404, kind="text/html"), lambda client: client.is_ready(), NotFound)
    ends(reply(b"<html>", kind="text/html"), lambda client: client.is_ready(), BadAnswer)
    with scripted_server(reply({"status": "not ready"}, 503)) as server, CondenseClient(server.url) as client:
        assert not client.is_ready()
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (GOOD, "pruned cache: .*expected 'condense-pruned-cache'"),
        (reply(b"garbage" * 9), "pruned cache: no safetensors header"),
        (GOOD[:-5], "cut off"),
        (reply(b"x" * 3_000_000), "more than 2,000,000 bytes"),
        (reply(b"", status=200, content_length="3000000"), "more than 2,000,000 bytes"),
    ],
)
def test_a_cache_that_is_none_leaves_no_file(answer: bytes, match: str, tmp_path: Path) -> None:
    ask = lambda client: client.prune("text", max_bytes=2_000_000, folder=tmp_path)  # noqa: E731
    ends(answer, ask, BadAnswer, match=match, timeout=20.0)  # the first one loads transformers
    assert list(tmp_path.iterdir()) == []


# -- the key -----------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_seen_nowhere_else(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDENSE_API_KEY", KEY)
    echo = error_reply(422, "invalid_request", f"authorization: got Bearer {KEY}")
    with caplog.at_level(logging.DEBUG), scripted_server(GOOD, echo) as server:
        with CondenseClient(server.url) as client:
            client.compress("text")
            with pytest.raises(InvalidRequest, match=r"got Bearer \*\*\*") as caught:
                client.compress("text")
            seen = repr(client) + str(vars(client)) + repr(caught.value) + caplog.text
        assert all(f"authorization: Bearer {KEY}".lower() in head.lower() for head, _ in server.requests)
        with CondenseClient(server.url, api_key="") as client, pytest.raises(InvalidRequest):
            client.compress("text")
        assert "authorization" not in server.requests[-1][0].lower()
    assert server.url in seen
    assert KEY not in seen
