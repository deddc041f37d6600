"""A proxy without a friend: the validator's own signed request is passed on to a miner, and its answer passed back."""

from __future__ import annotations

import aiohttp

from condense_core.neurons.local.adversaries.means import Adversary
from condense_core.neurons.mining.app import create_miner_app
from condense_core.neurons.protocol.messages import COMPRESS
from condense_core.serving.http.guard import App, Message, Receive, Send

_SECONDS = 5.0


def relaying(miner: Adversary) -> App:
    """The application of a miner that says who it is, and passes requests on as they came."""
    sound = create_miner_app(miner)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != COMPRESS:
            await sound(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status, headers, answer = await _passed_on(miner, scope["headers"], body)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


async def _passed_on(
    miner: Adversary, headers: list[tuple[bytes, bytes]], body: bytes
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    assert miner.means.victim is not None
    sent = {name.decode(): value.decode() for name, value in headers if name not in (b"host", b"content-length")}
    url = f"http://{miner.means.victim.address}{COMPRESS}"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_SECONDS), auto_decompress=False) as http,
            http.post(url, data=body, headers=sent, allow_redirects=False) as answer,
        ):
            back = [(name, value) for name, value in answer.raw_headers if name.lower() != b"transfer-encoding"]
            return answer.status, back, await answer.read()
    except (OSError, aiohttp.ClientError):
        return 502, [(b"content-length", b"0")], b""
