"""Real sockets: senders that are slow, silent or gone, floods of headers, TLS, and the end of the process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from condense_core.serving.engine import CompressionEngine, EngineLimits
from condense_core.serving.http.app import create_app
from condense_core.serving.http.guard import HttpLimits
from condense_core.serving.http.server import bound_socket, check_certificate
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.service import LocalService
from condense_testing.running_server import running_server
from condense_testing.serving import FakeBackend

IMPATIENT = HttpLimits(body_seconds=0.4, header_seconds=0.4, max_header_bytes=4096)


@contextmanager
def server(backend: FakeBackend | None = None, **options: Any) -> Iterator[tuple[str, CompressionEngine]]:
    limits = options.pop("limits", IMPATIENT)
    observer = PrometheusObserver(torch.device("cpu"))
    engine = CompressionEngine(backend or FakeBackend(), limits=EngineLimits(cache_bytes=0), observer=observer)
    app = create_app(LocalService(engine), observer=observer, limits=limits, page=False, stop_seconds=5)
    with running_server(app, limits=limits, **options) as url:
        yield url, engine


def connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    sock = socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=10)
    sock.settimeout(10)
    return sock


def request(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"POST /v1/compress HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    return head.encode() + body


def received(sock: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    data = b""
    try:
        while chunk := sock.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def until(what: Any, seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "it did not come about in time"
        time.sleep(0.005)


def works(url: str) -> None:
    assert httpx.post(f"{url}/v1/compress", json={"text": "four"}).status_code == 200


def test_connections_that_send_nothing_or_no_whole_request_are_closed() -> None:
    with server() as (url, _):
        for sent in (b"", b"POST /v1/compress HTTP/1.1\r\nhost: x\r\n", b"G"):
            started = time.monotonic()
            with connected(url) as sock:
                sock.sendall(sent)
                assert received(sock) == b""
            assert 0.2 < time.monotonic() - started < 3
        with connected(url) as sock:  # a second request that is never finished, on a connection that was kept open
            sock.sendall(request(b'{"text": "a"}'))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            sock.sendall(b"GET /health HT")
            assert b"HTTP/1.1 200" not in received(sock)
        works(url)


def test_a_sender_of_one_header_after_the_other_is_cut_off() -> None:
    with server() as (url, _), connected(url) as sock:
        started = time.monotonic()
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        with suppress(BrokenPipeError, ConnectionResetError):
            for i in range(200):  # 4 s, if it is let
                sock.sendall(f"x-{i}: y\r\n".encode())
                time.sleep(0.02)
        assert time.monotonic() - started < 3
        works(url)


def test_a_slow_body_is_refused_in_time() -> None:
    with server() as (url, _), connected(url) as sock:
        started = time.monotonic()
        sock.sendall(request(b'{"text": "', length=1000))
        answer = received(sock)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in answer
        assert 0.2 < time.monotonic() - started < 3
        works(url)


def test_floods_of_headers_are_refused() -> None:
    with server() as (url, _):
        for flood in (b"x: " + b"a" * 100_000, b"\r\n".join(b"x-%d: a" % i for i in range(20_000))):
            with connected(url) as sock:
                try:
                    sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + flood + b"\r\n\r\n")
                    answer = received(sock)
                except (BrokenPipeError, ConnectionResetError):
                    answer = b""
                assert not answer or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
        works(url)


def test_chunked_bodies_are_bounded_without_a_content_length() -> None:
    limits = HttpLimits(max_body_bytes=10_000)
    with server(limits=limits) as (url, _):

        def endless() -> Iterator[bytes]:
            yield b'{"text": "'
            for _ in range(1000):
                yield b"x" * 1000

        try:
            reply = httpx.post(f"{url}/v1/compress", content=endless(), headers={"content-type": "application/json"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
        except httpx.WriteError:  # it was closed while more was being sent
            pass
        works(url)


def test_what_is_no_http_is_answered_and_closed() -> None:
    with server() as (url, _):
        for sent in (b"\x16\x03\x01\x02\x00\x01\x00", b"nonsense\r\n\r\n", b"GET / FTP/1.1\r\n\r\n", b"\x00" * 5000):
            with connected(url) as sock:
                sock.sendall(sent)
                assert b"200 OK" not in received(sock)
        works(url)


def test_a_client_that_goes_away_takes_its_work_with_it() -> None:
    backend = FakeBackend(gate=Event(), together=False)
    with server(backend) as (url, engine):
        first = connected(url)
        first.sendall(request(b'{"text": "runs"}'))
        until(lambda: engine.load()["running"] == 1)
        body = json.dumps({"texts": ["one", "two", "three"]}).encode()
        second, third = connected(url), connected(url)
        second.sendall(request(body))
        third.sendall(request(b'{"text": "stays"}'))
        until(lambda: engine.load()["waiting"] == 4)
        second.close()
        until(lambda: engine.load()["waiting"] == 1)
        assert backend.gate is not None
        backend.gate.set()
        for sock in (first, third):
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            sock.close()
    assert backend.batches == [["runs"], ["stays"]]


def test_too_many_connections_are_refused() -> None:
    with server(limits=HttpLimits(max_connections=4)) as (url, _):
        idle = [connected(url) for _ in range(6)]
        with connected(url) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert received(sock).startswith(b"HTTP/1.1 503")
        for sock in idle:
            sock.close()
        until(lambda: httpx.get(f"{url}/health").status_code == 200)


# -- the socket and its certificate ------------------------------------------------------------------------------------


def test_a_port_in_use_and_addresses_that_are_none() -> None:
    there = r"port: cannot listen on 127.0.0.1:\d+ \(something else listens there\)"
    with bound_socket("127.0.0.1", 0) as taken, pytest.raises(ValueError, match=there):
        bound_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match=r"cannot listen on 203\.0\.113\.7"):
        bound_socket("203.0.113.7", 0)
    with pytest.raises(ValueError, match="host: got"):
        bound_socket("no such host!", 0)


def test_https(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    check_certificate(cert, key)
    with server(certificate=cert, key=key) as (url, _):
        context = ssl.create_default_context(cafile=str(cert))
        reply = httpx.post(f"{url}/v1/compress", json={"text": "four"}, verify=context)
        assert reply.status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_certificate_that_is_none(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    for pair in ((other, key), (cert, other), (cert, None), (tmp_path / "none.pem", key), (tmp_path, key)):
        with pytest.raises(ValueError, match="tls: ") as caught:
            check_certificate(*pair)
        assert "\n" not in str(caught.value)


# -- the process -------------------------------------------------------------------------------------------------------


def condense(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "condense_core.cli", "serve", "--threads", "1", *arguments]


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``condense serve`` and its URL."""
    with bound_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = condense("--port", str(port), *arguments)
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1"})
    try:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("condense-tiny on cpu"):
                break
        else:
            pytest.fail("it did not start")
        yield running, f"http://127.0.0.1:{port}"
    finally:
        running.kill()
        running.wait()


def test_it_finishes_what_it_accepted_when_it_is_told_to_end() -> None:
    text = "The keeper of the north archive counts the lamps at dusk. " * 40
    with process("--cache-mb", "0", "--methods", "pool") as (running, url), ThreadPoolExecutor(24) as pool:

        def ask(i: int) -> tuple[int, int]:
            reply = httpx.post(f"{url}/v1/compress", json={"text": text + str(i)}, timeout=60)
            return reply.status_code, len(reply.content)

        work = [pool.submit(ask, i) for i in range(24)]
        until(lambda: httpx.get(f"{url}/v1/load").json()["waiting"] >= 8, 30)
        running.send_signal(signal.SIGTERM)
        found = [each.exception() or each.result() for each in work]
        assert running.wait(30) in (0, -signal.SIGTERM)
        done = [each for each in found if isinstance(each, tuple) and each[0] == 200]
        assert len(done) >= 9  # what ran and waited; others came when nothing was accepted any more
        assert len({size for _, size in done}) <= 2
        assert all(isinstance(each, httpx.TransportError) or each[0] in (200, 503) for each in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port"),
        (["--model", "nowhere"], "model: 'nowhere' is no model folder"),
        (["--methods", "zip"], "methods: got 'zip'"),
        (["--methods", "mixed"], "method: 'mixed' is of use only trained"),
        (["--keys", "none.toml"], "keys: cannot read none.toml"),
        (["--tls-cert", "none.pem"], "tls: no file none.pem"),
        (["--tls-key", "none.pem"], "--tls-key: got no --tls-cert"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--device", "cuda:77"], "device: cannot use 'cuda:77'"),
        (["--timeout", "0"], "timeout"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from condense_core.cli import main

    monkeypatch.chdir(tmp_path)
    port = [] if "--port" in arguments else ["--port", "0"]
    assert main(["serve", *port, *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told


def test_a_new_key_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    from condense_core.cli import main

    assert main(["serve", "--new-key", "app"]) == 0
    key, _, lines = capsys.readouterr().out.partition("\n\n")
    assert key.startswith("ck_")
    assert lines.startswith('[[key]]\nname = "app"\nsha256 = "')
    assert shutil.which("condense") is None or key not in lines
