"""The clients against the real application on a real port."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from condense_core import serving
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.pruning.build import build
from condense_core.pruning.text import ask, prefill
from condense_core.serving.client import AsyncCondenseClient, CondenseClient
from condense_core.serving.engine import CompressionEngine, EngineLimits
from condense_core.serving.errors import (
    BadAnswer,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    ServingError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnknownModel,
)
from condense_core.serving.http.app import create_app
from condense_core.serving.keys import Keys, new_key
from condense_core.serving.served import ServedModel
from condense_core.serving.service import LocalService
from condense_core.tasks.sources import ProseWriter
from condense_testing.running_server import running_server
from condense_testing.serving import FakeBackend


@contextmanager
def serving_fake(
    backend: FakeBackend | None = None, *, keys: Keys | None = None, tls: tuple[Path, Path] | None = None, **limits: Any
) -> Iterator[tuple[str, CompressionEngine]]:
    """The URL of a server over a backend without a model, and its engine."""
    engine = CompressionEngine(backend or FakeBackend(), limits=EngineLimits(**{"cache_bytes": 0} | limits))
    app = create_app(LocalService(engine), keys=keys, page=False, stop_seconds=0.2)
    certificate, key = tls or (None, None)
    with running_server(app, stop_seconds=1.0, certificate=certificate, key=key) as url:
        yield url, engine


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_fake() as (url, _):
        yield url


@pytest.fixture
def client(url: str) -> Iterator[CondenseClient]:
    with CondenseClient(url, timeout=10) as client:
        yield client


def lengths(found: list[Any]) -> list[Any]:
    """What the backend made of each text, or the class of its error."""
    return [type(each) if isinstance(each, ServingError) else float(each.embeds[0, 0]) for each in found]


# -- texts -------------------------------------------------------------------------------------------------------------


def test_one_text_and_several(client: CondenseClient) -> None:
    assert client.compress("four", ratio=1).embeds.tolist() == [[4.0, 4.0]]
    assert lengths(client.compress_many(["a", "bb", "ccc"])) == [1, 2, 3]
    assert lengths(client.compress_many(f"{'x' * n}" for n in range(1, 4))) == [1, 2, 3]
    assert client.compress_many([]) == []
    assert sorted((i, lengths([made])[0]) for i, made in client.compress_stream(["aaa", "b"])) == [(0, 3.0), (1, 1.0)]


def test_the_same_from_an_event_loop(url: str) -> None:
    async def main() -> None:
        async with AsyncCondenseClient(url, timeout=10) as client:
            made = await asyncio.gather(*(client.compress("x" * n) for n in range(1, 20)))
            assert lengths(list(made)) == list(range(1, 20))
            assert lengths(await client.compress_many(["a", "bb"])) == [1, 2]
            assert [i async for i, _ in client.compress_stream(["a"])] == [0]
            assert await client.is_ready()
            assert (await client.models())[0]["id"] == "fake"
            with pytest.raises(InvalidRequest, match=r"ratio: got 0\.5"):
                await client.compress("text", ratio=0.5)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_more_texts_than_a_request_holds(client: CondenseClient) -> None:
    assert lengths(client.compress_many(["x" * (1 + i % 7) for i in range(600)])) == [1 + i % 7 for i in range(600)]


def test_texts_that_are_too_long_for_one_body_together(client: CondenseClient) -> None:
    texts = ["\x01" * 900_000, "ü" * 700_000, "x" * 1_500_000, "short"]  # as JSON 5.4, 1.4 and 1.5 MB
    assert lengths(client.compress_many(texts)) == [900_000, 700_000, 1_500_000, 5]


def test_the_error_of_a_text_has_its_index(client: CondenseClient) -> None:
    texts = ["good", "unreadable", "fine"]
    with pytest.raises(InvalidRequest, match=r"^texts\[1\]: text: unreadable, expected another$"):
        client.compress_many(texts)
    assert lengths(client.compress_many(texts, return_errors=True)) == [4, InvalidRequest, 4]
    assert {i: lengths([made])[0] for i, made in client.compress_stream(texts)} == {0: 4, 1: InvalidRequest, 2: 4}


def test_texts_that_a_busy_server_refuses_are_asked_for_again() -> None:
    with serving_fake(FakeBackend(seconds=0.002), max_requests=4) as (url, _), CondenseClient(url) as client:
        assert lengths(client.compress_many(["x" * n for n in range(1, 25)], timeout=9)) == list(range(1, 25))
        with CondenseClient(url, retries=0) as once:
            assert QueueFull in lengths(once.compress_many(["text"] * 24, return_errors=True))


def test_long_messages_of_a_chat_become_soft_tokens(client: CondenseClient) -> None:
    chat = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "x" * 1000, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": "y" * 999},
        {"role": "user", "content": [{"type": "text", "text": "z" * 2000}]},
        {"role": "tool", "content": "w" * 1500},
    ]
    kept = [dict(message) for message in chat]
    made = client.compress_messages(chat)
    assert chat == kept
    assert [list(message) for message in made] == [list(message) for message in chat]
    assert [made[i] for i in (0, 2, 3, 4)] == [chat[i] for i in (0, 2, 3, 4)]
    assert lengths([made[1]["content"], made[5]["content"]]) == [1000, 1500]
    assert (made[1]["role"], made[1]["name"], made[5]["role"]) == ("user", "Ann", "tool")
    assert client.compress_messages(chat[:1], min_chars=1)[0]["content"].embeds[0, 0] == 15
    with pytest.raises(InvalidRequest, match=r"^messages\[1\]: text: unreadable"):
        client.compress_messages([chat[0], {"role": "user", "content": "unreadable" * 100}])


def test_what_makes_no_sense_is_refused_by_name(client: CondenseClient, url: str) -> None:
    for ask_, message in (
        (lambda: client.compress("text", ratio=0.5), "ratio: got 0.5"),
        (lambda: client.compress("text", ratio=float("nan")), "expected values that JSON has"),
        (lambda: client.compress("text", ratio=object()), "expected values that JSON has"),  # type: ignore[arg-type]
        (lambda: client.compress("\ud800"), "text: not valid Unicode"),
        (lambda: client.compress(3), "text: got int, expected str"),  # type: ignore[arg-type]
        (lambda: client.compress_many("text"), "texts: got str, expected a list of str"),
        (lambda: client.compress_many(["a", None]), r"texts\[1\]: got NoneType"),  # type: ignore[list-item]
        (lambda: list(client.compress_stream("text")), "texts: got str"),
        (lambda: client.compress_messages({"role": "user"}), "messages: got dict"),  # type: ignore[arg-type]
        (lambda: client.compress_messages(["text"]), r"messages\[0\]: got str"),  # type: ignore[list-item]
        (lambda: client.compress_messages([], min_chars=0), "min_chars: got 0"),
        (lambda: client.answer("text", 3), "question: got int"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidRequest, match=message):
            ask_()
    with pytest.raises(TooLarge):
        client.compress("x" * 3_000_000)
    with pytest.raises(UnknownModel, match="this server has 'fake'"):
        client.compress("text", model="other")
    with pytest.raises(TypeError, match=r"^rato: there is no such field, expected some of k, max_soft_tokens, method"):
        client.compress("text", rato=3)  # type: ignore[call-arg]
    for seconds in (0, -1, True, "1", float("inf"), 3601):
        with pytest.raises(ValueError, match="timeout: got"):
            client.compress("text", timeout=seconds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes: got 0"):
        client.prune("text", max_bytes=0)


@pytest.mark.parametrize(
    ("base_url", "how", "message"),
    [
        ("localhost:8000", {}, "base_url: got 'localhost:8000', expected http://HOST:PORT or https://HOST:PORT"),
        ("ftp://host", {}, "base_url: got"),
        ("http://", {}, "base_url: got"),
        ("http://host:0", {}, "base_url: got"),
        ("http://host:99999", {}, "base_url: got"),
        ("http://host/?key=1", {}, "base_url: got"),
        ("http://host\\evil", {}, "base_url: got"),
        ("http://ho st", {}, "base_url: got"),
        ("http://[::1", {}, "base_url: got"),
        ("http://a..b", {}, "base_url: got"),
        (None, {}, "base_url: got None"),
        ("http://me:secret@host", {}, "base_url: holds credentials"),
        ("http://host", {"api_key": "two words"}, "api_key: got one with spaces or other than ASCII"),
        ("http://host", {"api_key": "line\r\nx: y"}, "api_key: got one with"),
        ("http://host", {"timeout": 0}, "timeout: got 0"),
        ("http://host", {"retries": -1}, "retries: got -1"),
        ("http://host", {"max_bytes": 0}, "max_bytes: got 0"),
        ("https://host", {"ca_file": "none.pem"}, "ca_file: cannot use none.pem"),
    ],
)
def test_settings_that_make_no_sense(base_url: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        CondenseClient(base_url, **how)
    assert "secret" not in str(caught.value)


# -- time --------------------------------------------------------------------------------------------------------------


def waits(engine: CompressionEngine, count: int) -> None:
    """Until ``count`` requests are with the engine."""
    ends = time.monotonic() + 5
    while engine.load()["waiting"] + engine.load()["running"] != count:
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_a_call_ends_at_its_deadline_and_so_does_its_work() -> None:
    backend = FakeBackend(gate=Event(), together=False)
    with serving_fake(backend) as (url, engine), CondenseClient(url) as client:
        started = time.monotonic()
        for ask_ in (client.compress, lambda text, **how: client.compress_many([text, text], **how)):
            with pytest.raises(DeadlineExceeded):
                ask_("text", timeout=0.25)
        assert time.monotonic() - started < 1.2
        waits(engine, 1)  # the one that runs; the others are not done for nobody
        backend.gate.set()


def waits_for_nothing(client: CondenseClient) -> None:
    with pytest.raises(RuntimeError, match="the client was closed while a call waited"):
        client.compress("waits")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell has started the tests in the background, ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_call_and_its_work() -> None:
    backend = FakeBackend(gate=Event(), together=False)
    with serving_fake(backend) as (url, engine), CondenseClient(url) as client:
        first = threading.Thread(target=waits_for_nothing, args=(client,))
        first.start()
        waits(engine, 1)
        main = threading.main_thread().ident
        assert main is not None
        for ask_ in (lambda: client.compress("text"), lambda: next(client.compress_stream(["a"]))):
            threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                ask_()
            waits(engine, 1)
        client.close()  # while the other thread waits
        first.join(5)
        assert not first.is_alive()
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.compress("text")
        backend.gate.set()


def test_a_stream_that_is_left_ends_its_work() -> None:
    backend = FakeBackend(seconds=0.02, together=False)
    with serving_fake(backend) as (url, engine), CondenseClient(url) as client:
        for _ in client.compress_stream(["text"] * 100):
            break
        waits(engine, 0)
        assert len(backend.batches) < 60
        left = client.compress_stream(["text"])
        client.close()
        with pytest.raises(RuntimeError, match="the client is closed"):
            next(left)


def test_threads_share_a_client(client: CondenseClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: client.compress("x" * n), range(1, 101)))
    assert lengths(made) == list(range(1, 101))


def test_a_forked_process_has_connections_of_its_own(client: CondenseClient) -> None:
    client.compress("text")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, client.models()[0]["id"].encode())
        client.close()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"fake"
    os.waitpid(child, 0)
    assert lengths([client.compress("text")]) == [4]


# -- who asks whom -----------------------------------------------------------------------------------------------------


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, lines = new_key("ann")
    (tmp_path / "keys.toml").write_text(lines)
    with serving_fake(keys=Keys.load(tmp_path / "keys.toml")) as (url, _):
        with CondenseClient(url) as client, pytest.raises(Unauthorized):
            client.compress("text")
        with CondenseClient(url, api_key=key) as client:
            assert client.compress("text").embeds[0, 0] == 4
        monkeypatch.setenv("CONDENSE_API_KEY", key)
        with CondenseClient(url) as client:
            assert client.load()["waiting"] == 0


def test_tls(certificate: tuple[Path, Path]) -> None:
    with serving_fake(tls=certificate) as (url, _):
        with CondenseClient(url, ca_file=certificate[0]) as client:
            assert client.compress("text").embeds[0, 0] == 4
        started = time.monotonic()
        with CondenseClient(url) as client, pytest.raises(BadAnswer, match="its certificate is not trusted"):
            client.compress("text")
        assert time.monotonic() - started < 2  # it does not ask again
    with (
        serving_fake() as (url, _),
        CondenseClient(url.replace("http", "https"), timeout=5) as client,
        pytest.raises(BadAnswer, match="there is no TLS, expected it, or a base_url with http"),
    ):
        client.compress("text")


def test_proxies_of_the_environment_are_not_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with CondenseClient(url, api_key="ck_secret") as client:
        assert client.is_ready()


def test_without_httpx_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "condense_core.serving.async_client")
    with pytest.raises(ImportError, match=r"the package httpx, expected pip install 'condense-core\[serve\]'"):
        importlib.import_module("condense_core.serving.async_client")


def test_the_package_names_them() -> None:
    assert serving.CondenseClient is CondenseClient
    assert serving.AsyncCondenseClient is AsyncCondenseClient
    assert (serving.Unavailable, serving.BadAnswer) == (Unavailable, BadAnswer)


# -- the embedded model ------------------------------------------------------------------------------------------------


def test_soft_tokens_caches_and_answers_are_those_of_the_library(tmp_path: Path) -> None:
    served = ServedModel.load(embedded_model_path(), device="cpu")
    text, question = ProseWriter().document(3, 60)[:1500], "Who is the keeper of the north archive?"
    engine = CompressionEngine(served)
    with running_server(create_app(LocalService(engine), page=False)) as url, CondenseClient(url) as client:
        for how in ({"ratio": 8}, {"method": "select", "ratio": 4, "question": question}):
            soft = client.compress(text, **how)
            condenser = served.condensers[str(how.get("method", served.default_method))]
            expected = condenser.compress(text, how["ratio"], question=how.get("question"))
            assert soft.to_bytes() == expected.to_bytes()
            assert isinstance(soft, SoftTokens)
        cache = client.prune(text, method="snapkv", keep=0.5, folder=tmp_path)
        assert list(tmp_path.iterdir()) == []
        own = prefill(served.model, served.tokenizer, text, build("snapkv", keep=0.5))
        for mine, theirs in zip(cache.layers, own.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)
        assert ask(served.model, served.tokenizer, cache, question) == ask(
            served.model, served.tokenizer, own, question
        )
        told = client.answer(text, question, way="soft", ratio=8, max_new_tokens=6)
        soft = client.compress(text, ratio=8)
        assert told["answer"] == served.condensers["pool"].generate(soft, question, max_new_tokens=6)
        told = client.answer(text, question, way="soft", method="select", max_new_tokens=6)
        assert told["method"] == "select"
        assert client.models()[0]["id"] == "condense-tiny"
