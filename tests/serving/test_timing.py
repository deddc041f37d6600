"""Where the time of an answer went, as the engine and the header ``Server-Timing`` say."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from condense_core.serving.engine import CompressionEngine, EngineLimits
from condense_core.serving.http.app import create_app
from condense_core.serving.requests import CompressRequest
from condense_core.serving.service import LocalService
from condense_core.serving.wire import parse_server_timing, server_timing
from condense_testing.serving import FakeBackend


class SlowTokenizer(FakeBackend):
    """Takes 30 ms to make tokens of a text."""

    def prepare(self, request: Any) -> Any:
        time.sleep(0.03)
        return super().prepare(request)


def test_queue_tokenize_and_run_add_up_to_the_time_of_the_request() -> None:
    async def main() -> list[tuple[dict[str, float], float]]:
        backend = SlowTokenizer(seconds=0.1, together=False)
        async with CompressionEngine(backend, limits=EngineLimits(cache_bytes=0)) as engine:

            async def one(text: str) -> tuple[dict[str, float], float]:
                started = time.monotonic()
                made = await engine.submit_timed(CompressRequest(text=text))
                return dict(made.timing), time.monotonic() - started

            return list(await asyncio.gather(one("first"), one("second")))

    (first, first_took), (second, second_took) = asyncio.run(asyncio.wait_for(main(), 30))
    for timing, took in ((first, first_took), (second, second_took)):
        assert 0.03 <= timing["tokenize"] < 0.06
        assert 0.1 <= timing["run"] < 0.15
        assert timing["queue"] + timing["tokenize"] + timing["run"] == pytest.approx(took, abs=0.02)
    assert first["queue"] < 0.02
    # Ready 30 ms behind the first, which runs for 100: it waited for the tokenizer, then for the device.
    assert second["queue"] == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("form", ["application/octet-stream", "application/json"])
def test_an_answer_to_one_text_says_where_its_time_went(form: str) -> None:
    async def main() -> list[httpx.Headers]:
        service = LocalService(CompressionEngine(FakeBackend(seconds=0.02)))
        await service.start()
        transport = httpx.ASGITransport(create_app(service, page=False))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers={"accept": form}) as client:
            found = [(await client.post("/v1/compress", json={"text": "text"})).headers for _ in range(2)]
            found.append((await client.post("/v1/compress", json={"text": ""})).headers)
        await service.stop(1)
        return found

    made, again, refused = asyncio.run(asyncio.wait_for(main(), 30))
    timing = parse_server_timing(made["server-timing"])
    assert list(timing) == ["queue", "tokenize", "run", "encode", "write"]
    assert 0.02 <= timing["run"] < 0.05
    assert list(parse_server_timing(again["server-timing"])) == ["cached", "write"]
    assert "server-timing" not in refused


def test_the_header_is_read_as_it_was_written_and_foreign_entries_are_passed_over() -> None:
    assert server_timing({"queue": 0.0, "run": 0.0123456}) == "queue;dur=0.000, run;dur=12.346"
    assert parse_server_timing('cdn-cache;desc="hit", run;dur=12.5, db;desc=x;dur=2, total') == {"run": 0.0125}
    assert parse_server_timing("") == {}
