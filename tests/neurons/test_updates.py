"""The check for updates asks one place once a day, within bounds, and tells of a newer version once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("httpx", reason="the extra `neurons` is not installed")
from condense_core.neurons import updates
from condense_core.neurons.updates import NotTold, newest, tell_updates, telling_updates


@contextmanager
def index(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """A package index that answers so, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/json", asked
    finally:
        server.shutdown()
        server.server_close()


def says(version: Any) -> bytes:
    return json.dumps({"info": {"version": version}}).encode()


def looks(url: str, days: int, current: str) -> list[float]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == days:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(tell_updates(url=url, current=current, sleep=sleep))
    return slept


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.detail for record in caplog.records if record.message == "updates"]


def test_a_newer_version_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with index(says("0.10.0")) as (url, asked):
        assert looks(url, 3, "0.9.1") == [86_400.0] * 3
    assert asked == ["/json"] * 3
    assert told(caplog) == ["condense-core 0.10.0 is there, this is 0.9.1; see its CHANGELOG before you upgrade"]


@pytest.mark.parametrize("version", ["0.9.1", "0.9.0", "0.9.1rc1"])
def test_nothing_is_told_of_what_is_not_newer(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with index(says(version)) as (url, _):
        looks(url, 1, "0.9.1")
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"no json", 200, "no version"),
        (b"[" * 100_000, 200, "no version"),
        (b"[]", 200, "no version"),
        (says(7), 200, "no version"),
        (says("soon"), 200, "no version"),
        (says("1" * 65), 200, "no version"),
        (says("9.9"), 404, "status 404, expected 200"),
        (b" " * (updates.MOST_BYTES + 1), 200, "more than 4,194,304 bytes"),
    ],
    ids=["no JSON", "nested", "a list", "a number", "no version", "too long", "not found", "too much"],
)
def test_what_an_index_says_wrongly_is_one_line_in_the_log(
    body: bytes, status: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with index(body, status) as (url, _):
        looks(url, 1, "0.1.0")
    assert told(caplog) == [f"the package index does not say what is newest: {why}"]


def test_no_redirect_is_followed() -> None:
    with (
        index(says("9.9")) as (elsewhere, asked),
        index(b"", 302, {"location": elsewhere}) as (url, _),
        pytest.raises(NotTold, match="status 302"),
    ):
        asyncio.run(newest(url))
    assert asked == []


def test_an_index_that_is_away_or_slow_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotTold, match="ConnectError"):
        asyncio.run(newest("http://127.0.0.1:1/json"))
    monkeypatch.setattr(updates, "SECONDS", 0.3)

    async def use() -> None:
        async with await asyncio.start_server(lambda reader, writer: asyncio.sleep(5), "127.0.0.1", 0) as silent:
            port = silent.sockets[0].getsockname()[1]
            with pytest.raises(NotTold, match=r"no answer within 0\.3 s|ReadTimeout"):
                await newest(f"http://127.0.0.1:{port}/json")

    asyncio.run(use())


@pytest.mark.parametrize("wanted", [False, True])
def test_nobody_is_asked_unless_it_is_wanted(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def tell() -> None:
        asked.append("told")
        await asyncio.sleep(60)

    async def serving() -> None:
        await asyncio.sleep(0.05)

    monkeypatch.setattr(updates, "tell_updates", tell)
    asyncio.run(telling_updates(serving(), wanted))
    assert asked == ["told"] * wanted
