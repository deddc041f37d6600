"""The engine's promises, on a backend that does what a test says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from threading import Event
from typing import Any

import pytest
import torch

from condense_core.serving.engine import CompressionEngine, EngineLimits
from condense_core.serving.errors import (
    DeadlineExceeded,
    DeviceFailed,
    InternalError,
    InvalidRequest,
    QueueFull,
    ShuttingDown,
    TooLarge,
)
from condense_core.serving.requests import CompressRequest
from condense_testing.serving import FakeBackend


def run(use: Callable[[CompressionEngine], Awaitable[Any]], backend: FakeBackend, **limits: Any) -> Any:
    """What ``use`` returns of a running engine."""

    async def main() -> Any:
        async with CompressionEngine(backend, limits=EngineLimits(**{"cache_bytes": 0} | limits)) as engine:
            return await use(engine)

    return asyncio.run(asyncio.wait_for(main(), 60))


async def ended(work: Awaitable[Any]) -> Any:
    """The result, or the error."""
    try:
        return await work
    except Exception as error:
        return error


async def waiting(engine: CompressionEngine, count: int) -> None:
    """Until so many wait or run, and all texts are tokens."""
    assert isinstance(engine.backend, FakeBackend)
    while engine.load()["waiting"] + engine.load()["running"] < count or engine.backend.prepared < count:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.03)  # what was prepared last is told to the queue


def test_each_caller_gets_its_own_result_and_requests_run_together() -> None:
    backend = FakeBackend(gate=Event())

    async def use(engine: CompressionEngine) -> list[float]:
        work = [asyncio.ensure_future(engine.compress("x" * n)) for n in range(1, 41)]
        await waiting(engine, 40)
        backend.gate.set()
        return [float((await each).embeds[0, 0]) for each in work]

    assert run(use, backend) == list(range(1, 41))
    assert sum(map(len, backend.batches)) == 40
    assert len(backend.batches) <= 3


def test_batches_keep_to_the_token_budget_and_a_longer_request_runs_alone() -> None:
    backend = FakeBackend(gate=Event())

    async def use(engine: CompressionEngine) -> None:
        work = [asyncio.ensure_future(engine.compress("x" * n)) for n in (1, 40, 30, 25, 200, 5, 90)]
        await waiting(engine, 7)
        backend.gate.set()
        await asyncio.gather(*work)

    run(use, backend, max_batch_tokens=100)
    sizes = [sorted(map(len, batch)) for batch in backend.batches]
    assert all(sum(batch) <= 100 or len(batch) == 1 for batch in sizes)
    assert [200] in sizes
    assert sorted(n for batch in sizes for n in batch) == [1, 5, 25, 30, 40, 90, 200]


def test_a_higher_priority_goes_first_and_equal_ones_in_order() -> None:
    backend = FakeBackend(gate=Event(), together=False)

    async def use(engine: CompressionEngine) -> None:
        work = [asyncio.ensure_future(engine.compress("first"))]
        await waiting(engine, 1)
        for text, priority in (("b", 0), ("c", 0), ("low", -3), ("high", 5)):
            work.append(asyncio.ensure_future(engine.compress(text, priority=priority)))
            await waiting(engine, len(work))
        backend.gate.set()
        await asyncio.gather(*work)

    run(use, backend)
    assert [batch[0] for batch in backend.batches] == ["first", "high", "b", "c", "low"]


def test_a_full_queue_answers_at_once_and_says_when_to_come_again() -> None:
    backend = FakeBackend(gate=Event(), together=False)

    async def use(engine: CompressionEngine) -> None:
        work = [asyncio.ensure_future(engine.compress(f"text {i}")) for i in range(4)]
        await waiting(engine, 4)
        started = time.monotonic()
        with pytest.raises(QueueFull, match="4 requests") as caught:
            await engine.compress("one more")
        assert caught.value.retry_after is not None
        assert time.monotonic() - started < 0.05
        work[-1].cancel()
        await asyncio.sleep(0.05)
        last = asyncio.ensure_future(engine.compress("there is room now"))
        await waiting(engine, 4)
        backend.gate.set()
        assert not any(isinstance(each, QueueFull) for each in await asyncio.gather(*map(ended, [*work[:3], last])))

    run(use, backend, max_requests=4)


def test_characters_that_wait_are_bounded_too() -> None:
    backend = FakeBackend(gate=Event())

    async def use(engine: CompressionEngine) -> None:
        work = asyncio.ensure_future(engine.compress("x" * 900))
        await waiting(engine, 1)
        with pytest.raises(QueueFull, match="900 characters"):
            await engine.compress("y" * 200)
        with pytest.raises(TooLarge, match="text: 1,500 characters, expected at most 1,200"):
            await engine.compress("z" * 1500)
        backend.gate.set()
        await work

    run(use, backend, max_queued_chars=1000, max_chars=1200)


def test_at_overload_what_is_accepted_keeps_its_deadline_and_the_rest_is_refused_at_once() -> None:
    backend = FakeBackend(seconds=0.01)
    refused: list[float] = []

    async def one(engine: CompressionEngine, i: int) -> str:
        started = time.monotonic()
        try:
            await engine.compress(f"text {i}", timeout=0.5)
        except QueueFull:
            refused.append(time.monotonic() - started)
            return "refused"
        assert time.monotonic() - started < 0.5
        return "kept"

    async def use(engine: CompressionEngine) -> list[str]:
        work = []
        for i in range(300):  # 3 s of work within 0.6 s
            work.append(asyncio.ensure_future(one(engine, i)))
            await asyncio.sleep(0.002)
        return list(await asyncio.gather(*work))

    ends = run(use, backend)
    assert set(ends) == {"kept", "refused"}
    assert ends.count("kept") > 40  # what 0.5 s hold, and what was done meanwhile
    assert max(refused) < 0.05


def test_a_request_of_high_priority_does_not_push_an_accepted_one_past_its_deadline() -> None:
    backend = FakeBackend(seconds=0.1, together=False)

    async def use(engine: CompressionEngine) -> None:
        first = [asyncio.ensure_future(engine.compress(f"text {i}", timeout=0.6)) for i in range(3)]
        await waiting(engine, 3)
        pushed = [await ended(engine.compress(f"urgent {i}", priority=9, timeout=5)) for i in range(3)]
        assert any(isinstance(each, QueueFull) for each in pushed) or all(each.done() for each in first)
        assert not any(isinstance(each, Exception) for each in await asyncio.gather(*map(ended, first)))

    run(use, backend)


def test_a_deadline_ends_the_wait_even_while_the_device_works() -> None:
    backend = FakeBackend(gate=Event())

    async def use(engine: CompressionEngine) -> None:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"timeout: 0.1 s are over"):
            await engine.compress("text", timeout=0.1)
        assert time.monotonic() - started < 0.5
        second = asyncio.ensure_future(ended(engine.compress("waits behind it", timeout=0.1)))
        assert isinstance(await second, DeadlineExceeded)
        backend.gate.set()
        assert (await engine.compress("next")).embeds[0, 0] == 4

    run(use, backend)
    assert ["waits behind it"] not in backend.batches  # it did not run for nobody


def test_the_work_of_a_caller_that_goes_away_is_not_done() -> None:
    backend = FakeBackend(gate=Event(), together=False)

    async def use(engine: CompressionEngine) -> None:
        work = [asyncio.ensure_future(engine.compress(text)) for text in ("runs", "is left", "stays")]
        await waiting(engine, 3)
        work[1].cancel()
        await asyncio.sleep(0.02)
        assert engine.load()["waiting"] == 1
        backend.gate.set()
        assert [isinstance(e, BaseException) for e in await asyncio.gather(*work, return_exceptions=True)] == [
            False,
            True,
            False,
        ]

    run(use, backend)
    assert backend.batches == [["runs"], ["stays"]]


def test_out_of_memory_splits_the_batch_once_and_hits_only_whom_it_must() -> None:
    def fails(texts: list[str]) -> BaseException | None:
        return torch.OutOfMemoryError("CUDA out of memory") if len(texts) > 2 or "huge" in texts else None

    backend = FakeBackend(gate=Event(), fails=fails)

    async def use(engine: CompressionEngine) -> list[Any]:
        first = asyncio.ensure_future(engine.compress("starts"))
        await waiting(engine, 1)
        work = [asyncio.ensure_future(ended(engine.compress(text))) for text in ("a", "b", "huge", "c")]
        await waiting(engine, 5)
        backend.gate.set()
        await first
        found = list(await asyncio.gather(*work))
        assert (await engine.compress("the process lives")).embeds[0, 0] == 17
        return found

    ends = run(use, backend)
    assert [type(end).__name__ for end in ends] == ["SoftTokens", "SoftTokens", "OutOfMemory", "OutOfMemory"]
    assert backend.batches[1:4] == [["a", "b", "huge", "c"], ["a", "b"], ["huge", "c"]]
    assert backend.released >= 1


def test_the_mistake_of_one_request_is_not_that_of_its_batch() -> None:
    backend = FakeBackend(
        gate=Event(), fails=lambda texts: ValueError("text: too short\nfor this") if "bad" in texts else None
    )

    async def use(engine: CompressionEngine) -> list[Any]:
        first = asyncio.ensure_future(engine.compress("starts"))
        await waiting(engine, 1)
        work = [asyncio.ensure_future(ended(engine.compress(text))) for text in ("good", "bad", "fine")]
        await waiting(engine, 4)
        backend.gate.set()
        await first
        return list(await asyncio.gather(*work))

    good, bad, fine = run(use, backend)
    assert (good.embeds[0, 0], fine.embeds[0, 0]) == (4, 4)
    assert isinstance(bad, InvalidRequest)
    assert str(bad) == "text: too short for this"


def test_a_mistake_of_the_library_tells_and_logs_no_contents(caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(fails=lambda texts: KeyError(texts[0]) if "secret" in texts[0] else None)

    async def use(engine: CompressionEngine) -> list[Any]:
        with caplog.at_level(logging.DEBUG):
            return [await ended(engine.compress(text)) for text in ("a secret", "mistake with a secret", "next")]

    first, second, third = run(use, backend)
    assert isinstance(first, InternalError)
    assert isinstance(second, InternalError)
    assert third.embeds[0, 0] == 4
    assert "KeyError" in str(first)
    assert "secret" not in str(first) + str(second) + caplog.text
    assert "serving.py:" in caplog.text  # where it happened


def test_a_device_that_failed_answers_so_from_then_on() -> None:
    backend = FakeBackend(fails=lambda texts: RuntimeError("CUDA error: an illegal memory access was encountered"))

    async def use(engine: CompressionEngine) -> list[Any]:
        found = [await ended(engine.compress("text")), await ended(engine.compress("text"))]
        assert not engine.is_healthy
        assert not engine.is_ready
        return found

    assert [type(each) for each in run(use, backend)] == [DeviceFailed, DeviceFailed]
    assert len(backend.batches) == 1


def test_results_are_kept_for_the_same_request_of_the_same_tenant() -> None:
    backend = FakeBackend()

    async def use(engine: CompressionEngine) -> None:
        first = await engine.compress("text", tenant="a")
        first.embeds.zero_()  # what a caller does to its own is not seen by others
        assert (await engine.compress("text", tenant="a", priority=3)).embeds[0, 0] == 4
        assert len(backend.batches) == 1
        for other in ({"tenant": "b"}, {"tenant": "a", "ratio": 2}, {"tenant": "a", "question": "?"}):
            await engine.compress("text", **other)
        assert len(backend.batches) == 4
        for i in range(100):
            await engine.compress(f"{i}")
        assert engine.results.nbytes <= 20_000
        assert 1 < len(engine.results) < 25

    run(use, backend, cache_bytes=20_000)


def test_the_same_request_twice_at_once_runs_once() -> None:
    backend = FakeBackend(gate=Event(), together=False)

    async def use(engine: CompressionEngine) -> None:
        work = [asyncio.ensure_future(engine.compress("text")) for _ in range(5)]
        await waiting(engine, 5)
        backend.gate.set()
        assert {float((await each).embeds[0, 0]) for each in work} == {4.0}

    run(use, backend, cache_bytes=10_000)
    assert backend.batches == [["text"]]


def test_it_finishes_what_it_accepted_and_refuses_the_rest() -> None:
    backend = FakeBackend(seconds=0.02, together=False)

    async def main() -> None:
        engine = CompressionEngine(backend)
        with pytest.raises(ShuttingDown, match="new"):
            await engine.compress("too early")
        await engine.start()
        work = [asyncio.ensure_future(ended(engine.compress(f"text {i}"))) for i in range(10)]
        await waiting(engine, 5)
        stop = asyncio.ensure_future(engine.stop())
        await asyncio.sleep(0.03)
        assert isinstance(await ended(engine.compress("too late")), ShuttingDown)
        assert not engine.is_ready
        await stop
        assert not any(isinstance(each, Exception) for each in await asyncio.gather(*work))
        await engine.stop()  # again: nothing happens

    asyncio.run(asyncio.wait_for(main(), 30))


def test_what_is_not_finished_in_time_is_told_so() -> None:
    backend = FakeBackend(gate=Event(), together=False)

    async def main() -> None:
        engine = CompressionEngine(backend)
        await engine.start()
        work = [asyncio.ensure_future(ended(engine.compress(f"text {i}"))) for i in range(3)]
        await waiting(engine, 3)
        await engine.stop(timeout=0.05)
        assert all(isinstance(each, ShuttingDown) for each in await asyncio.gather(*work))
        backend.gate.set()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "text: empty"),
        ({"text": 3}, "text: got int, expected str"),
        ({"text": "\ud800"}, "text: not valid Unicode"),
        ({"ratio": 0.5}, r"ratio: got 0.5, expected a number from 1 to 1024"),
        ({"ratio": float("nan")}, "ratio: got nan"),
        ({"ratio": True}, "ratio: got True"),
        ({"ratio": 4, "max_soft_tokens": 3}, "max_soft_tokens: got a ratio too"),
        ({"max_soft_tokens": 0}, "max_soft_tokens: got 0"),
        ({"method": "zip"}, "method: got 'zip', expected one of"),
        ({"question": "  "}, "question: empty"),
        ({"priority": 11}, "priority: got 11"),
        ({"timeout": 0}, r"timeout: got 0, expected 0.001 to 3600 seconds"),
        ({"timeout": float("inf")}, "timeout: got inf"),
        ({"timeout": float("nan")}, "timeout: got nan"),
        ({"timeout": 10**400}, "timeout: got 1000"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        CompressRequest(**{"text": "text"} | fields)


def test_what_the_backend_cannot_read_is_told_to_whom_it_belongs() -> None:
    async def use(engine: CompressionEngine) -> list[Any]:
        return list(await asyncio.gather(*(ended(engine.compress(t)) for t in ("good", "unreadable", "fine"))))

    good, bad, fine = run(use, FakeBackend())
    assert (good.embeds[0, 0], fine.embeds[0, 0]) == (4, 4)
    assert isinstance(bad, InvalidRequest)


@pytest.mark.parametrize("bad", [{"max_requests": 0}, {"timeout": 0}, {"cache_bytes": -1}, {"max_chars": 2.5}])
def test_limits_that_are_none_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        EngineLimits(**bad)
