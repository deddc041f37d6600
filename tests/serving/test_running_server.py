"""The helper that other tests stand on: a server that is there inside of the block, and not behind it."""

from __future__ import annotations

import httpx
import pytest

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.http.app import create_app
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
