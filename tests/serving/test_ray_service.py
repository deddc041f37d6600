"""What becomes of a request whose replica is lost, late or full: over a handle that does what a test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from condense_core.serving.cluster.figures import FrontObserver
from condense_core.serving.cluster.replica import Failure, Report
from condense_core.serving.cluster.service import RayService
from condense_core.serving.errors import (
    ERRORS,
    DeadlineExceeded,
    InternalError,
    QueueFull,
    ServingError,
    ShuttingDown,
    WorkerLost,
)
from condense_core.serving.requests import CompressRequest, PruneRequest
from condense_core.serving.wire import Compressed

MADE = Compressed(b"soft tokens", 8, 2, 4, "pool", "fake", timing={"run": 0.0})
Behaviour = Callable[[Any], Awaitable[Any]]


def report(name: str = "a", *, waiting: int = 0, wait_seconds: float = 0.5, ready: bool = True) -> Report:
    registry = CollectorRegistry()
    Counter("condense_tokens", "Tokens read", ["kind"], registry=registry).labels("compress").inc(7)
    Counter("condense_requests", "Requests", ["kind", "code"], registry=registry).labels("compress", "ok").inc(9)
    return Report(
        name,
        "machine",
        1,
        {"id": "fake", "limits": {"timeout": 5.0, "max_chars": 100}},
        {"waiting": waiting, "running": 1, "wait_seconds": wait_seconds},
        ready,
        list(registry.collect()),
    )


class Call:
    """What ``handle.method.remote(...)`` gives: awaitable, iterable, and it knows whether it was cancelled."""

    def __init__(self, work: Any) -> None:
        self.work, self.cancelled = work, False

    def __await__(self) -> Any:
        return self.work.__await__()

    async def __anext__(self) -> Any:
        return await self.work.__anext__()

    def cancel(self) -> None:
        self.cancelled = True


class Broadcast:
    def __init__(self, reports: list[Any]) -> None:
        self.reports = reports

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        if not self.reports:
            raise ActorUnavailableError("none", None)
        return self.reports


class Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self.handle, self.name = handle, name

    def remote(self, *arguments: Any) -> Call:
        if self.name == "report":
            call = Call(dies())
        else:
            [request] = arguments
            self.handle.requests.append(request)
            call = Call(self.handle.behaviours.pop(0)(request))
            self.handle.calls.append(call)
        return call


class Handle:
    """A ``DeploymentHandle`` whose calls behave as told, one after the other."""

    def __init__(self, *behaviours: Any) -> None:
        self.behaviours, self.calls, self.requests = list(behaviours), [], []
        self.reports: list[Any] = [report()]

    def options(self, *, stream: bool) -> Handle:
        return self

    def broadcast(self, _method: str) -> Broadcast:
        return Broadcast(self.reports)

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)


def died() -> ActorDiedError:
    return ActorDiedError()


async def dies(*_: Any) -> Any:
    raise died()


async def answers(_: Any) -> Any:
    return MADE


async def hangs(_: Any) -> Any:
    await asyncio.sleep(60)


async def gives_up(_: Any) -> Any:
    raise asyncio.CancelledError


def raising(error: BaseException) -> Behaviour:
    async def behave(_: Any) -> Any:
        raise error

    return behave


def failing(code: str, message: str = "why: got this, expected that", after: float | None = 2.5) -> Behaviour:
    async def behave(_: Any) -> Any:
        return Failure(code, message, after)

    return behave


def run(handle: Handle, use: Callable[[RayService], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        service = RayService(handle, report(), **options)
        await service.start()
        try:
            return await use(service)
        finally:
            await service.stop(1.0)

    return asyncio.run(asyncio.wait_for(main(), 30))


def compress(handle: Handle, timeout: float | None = None, **options: Any) -> Any:
    """The answer, or the error, of one request."""

    async def use(service: RayService) -> Any:
        try:
            return await service.compress(CompressRequest(text="a text", timeout=timeout))
        except ServingError as error:
            return error

    return run(handle, use, **options)


# -- replicas that end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost",
    [
        dies,
        raising(ActorUnavailableError("no connection", None)),
        gives_up,
        failing("device_failed"),
        failing("shutting_down"),
    ],
)
def test_a_request_whose_replica_is_lost_is_answered_by_another(lost: Behaviour) -> None:
    handle = Handle(lost, answers)
    assert compress(handle).payload == MADE.payload
    assert len(handle.calls) == 2


def test_a_request_that_loses_two_replicas_ends_in_one_clear_error() -> None:
    handle = Handle(dies, dies, answers)
    error = compress(handle)
    assert isinstance(error, WorkerLost)
    assert error.retry_after == 1.0
    assert len(handle.calls) == 2


def test_another_try_has_the_time_that_is_left() -> None:
    async def dies_late(_: Any) -> Any:
        await asyncio.sleep(0.3)
        raise died()

    handle = Handle(dies_late, answers)
    compress(handle, timeout=2.0)
    first, second = (request.timeout for request in handle.requests)
    assert 1.9 < first <= 2.0
    assert first - second == pytest.approx(0.3, abs=0.2)


def test_no_other_try_starts_behind_the_deadline() -> None:
    async def blocks(_: Any) -> Any:
        time.sleep(0.3)
        raise died()

    handle = Handle(blocks, answers)
    assert isinstance(compress(handle, timeout=0.2), DeadlineExceeded)
    assert len(handle.calls) == 1


# -- deadlines and clients that go away --------------------------------------------------------------------------------


def test_a_replica_that_hangs_is_left_at_the_deadline() -> None:
    handle = Handle(hangs)
    started = time.monotonic()
    error = compress(handle, timeout=0.2)
    assert isinstance(error, DeadlineExceeded)
    assert "0.2 s" in str(error)
    assert time.monotonic() - started < 2
    assert handle.calls[0].cancelled


def test_the_engines_own_timeout_stands_in_for_none() -> None:
    handle = Handle(answers)
    compress(handle)
    assert handle.requests[0].timeout == pytest.approx(5.0, abs=0.5)


def test_a_client_that_goes_away_takes_the_call_with_it() -> None:
    handle = Handle(hangs)

    async def use(service: RayService) -> None:
        work = asyncio.ensure_future(service.compress(CompressRequest(text="a text")))
        await asyncio.sleep(0.05)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    run(handle, use)
    assert handle.calls[0].cancelled
    assert len(handle.calls) == 1


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted({*ERRORS} - {"device_failed", "shutting_down"}))
def test_errors_cross_with_code_message_and_time_to_come_again(code: str) -> None:
    handle = Handle(failing(code))
    error = compress(handle)
    assert type(error) is ERRORS[code]
    assert (str(error), error.retry_after) == ("why: got this, expected that", 2.5)
    assert len(handle.calls) == 1


@pytest.mark.parametrize("kind", ERRORS.values())
def test_a_failure_is_the_error_that_it_was_made_of(kind: type[ServingError]) -> None:
    error = Failure.of(kind("field: wrong", retry_after=3.0)).error()
    assert (type(error), str(error), error.retry_after) == (kind, "field: wrong", 3.0)


def test_too_many_waiting_requests_are_refused() -> None:
    error = compress(Handle(raising(BackPressureError(9, 8))))
    assert isinstance(error, QueueFull)
    assert error.retry_after == 1.0


def test_what_a_replicas_code_raised_is_told_without_its_message() -> None:
    handle = Handle(raising(RayTaskError("compress", "a trace", KeyError("secret text"))))
    error = compress(handle)
    assert isinstance(error, InternalError)
    assert "secret" not in str(error)
    assert len(handle.calls) == 1


def test_a_stopped_service_accepts_nothing_and_ends_once() -> None:
    closed: list[int] = []

    async def use(service: RayService) -> Any:
        await service.stop(1.0)
        with pytest.raises(ShuttingDown):
            await service.compress(CompressRequest(text="a text"))
        return service.is_ready

    assert run(Handle(), use, close=lambda: closed.append(1)) is False
    assert closed == [1]


# -- streams -----------------------------------------------------------------------------------------------------------


def streaming(*items: Any) -> Callable[[Any], AsyncIterator[Any]]:
    async def behave(_: Any) -> AsyncIterator[Any]:
        for item in items:
            if isinstance(item, BaseException):
                raise item
            yield item

    return behave


def prune(handle: Handle) -> tuple[int, bytes, ServingError | None]:
    """The size that was announced, what came of it, and what it ended in."""

    async def use(service: RayService) -> Any:
        stream = await service.prune(PruneRequest(text="a text"))
        came = b""
        try:
            async for chunk in stream.chunks:
                came += bytes(chunk)
        except ServingError as error:
            return stream.nbytes, came, error
        return stream.nbytes, came, None

    result: tuple[int, bytes, ServingError | None] = run(handle, use)
    return result


def test_a_stream_comes_whole() -> None:
    handle = Handle(streaming(6, b"abc", b"def"))
    assert prune(handle) == (6, b"abcdef", None)
    assert not handle.calls[0].cancelled


def test_a_stream_whose_replica_ends_before_it_begins_is_asked_of_another() -> None:
    assert prune(Handle(streaming(died()), streaming(3, b"abc"))) == (3, b"abc", None)


def test_a_refused_stream_is_an_error() -> None:
    with pytest.raises(ERRORS["invalid_request"], match="keep: wrong"):
        prune(Handle(streaming(Failure("invalid_request", "keep: wrong", None))))


@pytest.mark.parametrize("end", [[died()], []], ids=["killed", "ended"])
def test_a_stream_that_is_cut_off_is_not_begun_again(end: list[Any]) -> None:
    handle = Handle(streaming(6, b"abc", *end), streaming(6, b"abc", b"def"))
    nbytes, came, error = prune(handle)
    assert (nbytes, came) == (6, b"abc")
    assert isinstance(error, WorkerLost)
    assert len(handle.calls) == 1


def test_a_client_that_leaves_a_stream_takes_the_call_with_it() -> None:
    handle = Handle(streaming(6, b"abc", b"def"))

    async def use(service: RayService) -> None:
        stream = await service.prune(PruneRequest(text="a text"))
        async for _ in stream.chunks:
            break
        await stream.chunks.aclose()  # type: ignore[attr-defined]

    run(handle, use)
    assert handle.calls[0].cancelled


# -- what replicas say of themselves -----------------------------------------------------------------------------------


def test_load_is_that_of_all_replicas_and_the_wait_that_of_the_freest() -> None:
    handle = Handle()
    handle.reports = [report("b", waiting=3, wait_seconds=2.0), report("a", waiting=1), died()]

    async def use(service: RayService) -> Any:
        return service.load(), service.models()

    load, [facts] = run(handle, use)
    assert (load["waiting"], load["running"], load["wait_seconds"]) == (4, 2, 0.5)
    assert [each["replica"] for each in load["replicas"]] == ["a", "b"]
    assert facts["replicas"] == 2
    assert facts["id"] == "fake"


def test_a_service_without_replicas_that_answer_is_not_ready_and_later_not_healthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from condense_core.serving.cluster import service as module

    handle = Handle()

    async def use(service: RayService) -> Any:
        before = service.is_ready, service.is_healthy
        handle.reports = []
        monkeypatch.setattr(module, "_FRESH", 0.0)
        between = service.is_ready, service.is_healthy
        monkeypatch.setattr(module, "_DEAD_AFTER", 0.0)
        return before, between, service.is_healthy

    assert run(handle, use) == ((True, True), (False, True), False)


def test_figures_of_replicas_stand_beside_what_clients_got() -> None:
    handle, observer = Handle(dies, answers), FrontObserver()
    handle.reports = [report("a"), report("b")]
    compress(handle, observer=observer)
    families = {family.name: family for family in text_string_to_metric_families(observer.exposition().decode())}
    tokens = {s.labels["replica"]: s.value for s in families["condense_tokens"].samples if s.name.endswith("_total")}
    assert tokens == {"a": 7.0, "b": 7.0}
    counted = [s for s in families["condense_requests"].samples if s.name.endswith("_total")]
    assert [(s.labels, s.value) for s in counted] == [({"kind": "compress", "code": "ok"}, 1.0)]
