"""The helper that other tests stand on: a server that is there inside of the block, and not behind it."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.http.app import create_app
from condense_core.serving.http.server import bound_socket
from condense_core.serving.service import LocalService
from condense_testing.running_server import running_server
from condense_testing.serving import FakeBackend


def test_it_serves_inside_of_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    app = create_app(LocalService(CompressionEngine(FakeBackend())), page=False)
    with running_server(app) as url:
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        made = httpx.post(f"{url}/v1/compress", json={"text": "text"})
        assert SoftTokens.from_bytes(made.content).embeds[0, 0] == 4
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/ready")
    assert capsys.readouterr().out == ""  # its logs would mix with what a command prints


def test_what_is_sent_waits_for_no_acknowledgement() -> None:
    """Headers and body leave in two parts; the second would else wait for 40 ms on an event loop of asyncio."""

    async def use() -> int:
        found = asyncio.get_running_loop().create_future()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bound_socket("127.0.0.1", 0) as bound:
            async with await asyncio.start_server(accept, sock=bound):
                _, writer = await asyncio.open_connection(*bound.getsockname())
                nodelay: int = await found
                writer.close()
        return nodelay

    assert asyncio.run(use())
