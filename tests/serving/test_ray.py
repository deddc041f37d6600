"""``condense serve --engine ray`` as a process, over a real cluster of two replicas on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

pytest.importorskip("ray", reason="the extra [ray] is not installed")
pytest.importorskip("httpx", reason="the extra [serve] is not installed")

from bench.kills import BAD, Load, Server, descendants, expected, recovered, replicas_of, serving, texts
from condense_core.serving.cluster.environment import certificate
from condense_core.serving.wire import parse_server_timing

pytestmark = pytest.mark.slow

SECRETS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_SECRETS": "a token that the test knows, too",
    **certificate(Path(tempfile.mkdtemp(prefix="condense-ray-"))),
}
CONDENSE = [sys.executable, "-c", "import sys; from condense_core.cli import main; sys.exit(main())"]
MAX_CHARS = 20_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file; the last of them ends it."""
    options = ("--replicas", "2", "--threads", "1", "--cache-mb", "0", "--max-chars", str(MAX_CHARS))
    with serving(*options, log=tmp_path_factory.mktemp("ray") / "log", environment=SECRETS) as running:
        yield running


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], bytes]:
    torch.set_num_threads(1)
    return asyncio.run(expected(texts()))


def client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=120)


def error_of(server: Server, path: str, **body: object) -> tuple[int, dict[str, object]]:
    reply = httpx.post(server.url + path, json=body, timeout=120)
    return reply.status_code, reply.json()["error"]


def test_answers_are_those_of_the_library_bit_for_bit(server: Server, answers: dict[tuple[str, str], bytes]) -> None:
    async def use() -> Load:
        async with client(server) as connection:
            load = Load(connection, answers)
            await asyncio.gather(*(load.ask(number) for number in range(24)))
            reply = await connection.post("/v1/compress", json={"text": texts()[0]})
            assert set(parse_server_timing(reply.headers["server-timing"])) >= {"queue", "run", "write", "cluster"}
            return load

    load = asyncio.run(use())
    assert {end for _, end in load.ended} == {"ok"}
    assert {way for way, _ in load.ended} == {"one", "list", "prune"}


def test_errors_of_a_replica_reach_the_client_as_they_are(server: Server) -> None:
    status, error = error_of(server, "/v1/compress", text="a text of some tokens", method="memory", ratio=3)
    assert (status, error["code"]) == (422, "invalid_request")
    assert str(error["message"]).startswith("ratio: got 3, expected one of 2, 4, 8, 16, 32")
    status, error = error_of(server, "/v1/compress", text="x" * (MAX_CHARS + 1))
    assert (status, error["code"]) == (413, "too_large")
    assert error["message"] == f"text: {MAX_CHARS + 1:,} characters, expected at most {MAX_CHARS:,}"
    status, error = error_of(server, "/v1/prune", text="a text", method="no_such_method")
    assert (status, error["code"]) == (422, "invalid_request")
    status, error = error_of(server, "/v1/answer", text="a " * 4_000, question="What?", timeout=0.01)
    assert status in (503, 504)
    assert error["code"] in ("deadline_exceeded", "queue_full")


def test_metrics_and_facts_are_those_of_all_replicas(server: Server) -> None:
    asyncio.run(_recovered(server))
    metrics = httpx.get(server.url + "/metrics").text
    names = {replica["replica"] for replica in httpx.get(server.url + "/v1/load").json()["replicas"]}
    assert len(names) == 2
    for name in names:
        assert f'process_resident_memory_bytes{{replica="{name}"}}' in metrics
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["replicas"] == 2
    assert httpx.get(server.url + "/ready").status_code == 200


async def _recovered(server: Server) -> None:
    async with client(server) as connection:
        await recovered(connection, 2, set())


def test_ray_listens_on_this_machine_or_asks_for_a_certificate(server: Server) -> None:
    ours = {f"/proc/{pid}/fd" for pid in [server.process.pid, *descendants(server.process.pid)]}
    sockets = {str(entry.readlink()) for folder in ours for entry in Path(folder).glob("*") if entry.is_symlink()}
    seen = []
    for table, local in (("tcp", {"0100007F"}), ("tcp6", {"0" * 24 + "01000000", "0000000000000000FFFF00000100007F"})):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                seen.append(fields[1])
                if fields[1].partition(":")[0] not in local:  # a replica's, which unpickles what comes
                    assert_closed_to_strangers(int(fields[1].partition(":")[2], 16))
    assert len(seen) > 3


def assert_closed_to_strangers(port: int) -> None:
    """Neither plain HTTP/2 nor TLS without the cluster's own certificate is answered."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(preface)
        with suppress(ConnectionResetError):
            assert plain.recv(100)[:1] in (b"", b"\x15")  # an alert of TLS
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        try:
            stranger = context.wrap_socket(raw, server_hostname="localhost")
            stranger.sendall(preface)
            answer = stranger.recv(100)
        except OSError:
            answer = b""
    assert not answer


def test_a_second_server_shares_the_replicas_and_leaves_them(
    server: Server, answers: dict[tuple[str, str], bytes], tmp_path: Path
) -> None:
    def start(*options: str) -> subprocess.Popen[bytes]:
        command = [*CONDENSE, "serve", "--engine", "ray", "--ray-address", server.address, "--port", "0", *options]
        return subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, **SECRETS})

    wrong = {"--ray-app": start("--ray-app", "nobody"), "--ray-address": start("--replicas", "1")}
    joining = ("--ray-address", server.address, "--ray-app", "condense")
    with serving(*joining, log=tmp_path / "log", environment=SECRETS) as second:
        assert second.address == server.address
        body = httpx.post(second.url + "/v1/compress", json={"text": texts()[3]}, timeout=120).content
        assert body == answers["one", texts()[3]]
        assert second.stop() == []
    for name, process in wrong.items():
        _, told = process.communicate(timeout=300)
        assert process.returncode == 2
        assert told.decode().startswith(f"error: {name}: ")
        assert told.count(b"\n") == 1
    assert httpx.get(server.url + "/ready").status_code == 200
    assert len(httpx.get(server.url + "/v1/load").json()["replicas"]) == 2


def test_each_request_has_one_end_while_a_replica_is_killed_and_replaced(
    server: Server, answers: dict[tuple[str, str], bytes]
) -> None:
    count = 300

    async def use() -> Load:
        async with client(server) as connection:
            load, numbers = Load(connection, answers), iter(range(1000, 1000 + count))
            [victim, other] = [replica["pid"] for replica in await replicas_of(connection)]

            async def one_client() -> None:
                for number in numbers:
                    await load.ask(number)
                    if number == 1000 + count // 4:
                        os.kill(victim, signal.SIGKILL)

            await asyncio.gather(*(one_client() for _ in range(8)))
            await recovered(connection, 2, {victim})
            assert other in {replica["pid"] for replica in await replicas_of(connection)}
            await asyncio.gather(*(load.ask(number) for number in range(8)))
            return load

    load = asyncio.run(use())
    assert sum(load.ended.values()) == count + 8
    ends = {end for _, end in load.ended}
    assert not ends & set(BAD), load.ended
    assert ends <= {"ok", "worker_lost", "cut_off"}, load.ended
    assert sum(n for (_, end), n in load.ended.items() if end == "ok") >= count  # at most some died twice or were cut
    assert "a replica was lost" in server.log.read_text()


def test_sigterm_ends_it_with_nothing_left(server: Server) -> None:
    assert len(descendants(server.process.pid)) > 5
    assert server.stop() == []
    assert server.process.returncode == -signal.SIGTERM
