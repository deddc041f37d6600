"""Answers that never end, come late, break off, or are more than they say: HTTP as its receiver does not expect it."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Mapping

from condense_core.neurons.local.adversaries.means import Adversary
from condense_core.neurons.mining.app import create_miner_app
from condense_core.neurons.protocol.messages import COMPRESS
from condense_core.serving.http.guard import App, ClientGone, Message, Receive, Send, while_connected
from condense_core.serving.wire import OCTETS

_BEYOND = 1.0  # seconds behind the longest timeout
_PIECE = bytes(64 * 1024)
_SAID = 1_000_000  # bytes that some say they will send
_BOMB = 64 * 2**20


class Broken(Exception):
    """Ends a connection in the middle of an answer."""


Misbehaves = Callable[[Adversary, Send], Awaitable[None]]


def misbehaving(miner: Adversary, misbehaves: Misbehaves) -> App:
    """The application of a miner that says who it is, and then answers requests as ``misbehaves`` does."""
    sound = create_miner_app(miner)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != COMPRESS:
            await sound(scope, receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        try:
            await while_connected(receive, misbehaves(miner, send))
        except ClientGone:
            return

    return app


async def _late(miner: Adversary, send: Send) -> None:
    await asyncio.sleep(max(tier.timeout for tier in miner.tiers.tiers.values()) + _BEYOND)
    await _start(send, {"content-length": "0"})
    await send({"type": "http.response.body", "body": b""})


async def _drips(miner: Adversary, send: Send) -> None:
    await _start(send, {"content-length": str(_SAID)})
    while True:
        await send({"type": "http.response.body", "body": b"\0", "more_body": True})
        await asyncio.sleep(0.1)


async def _endless(miner: Adversary, send: Send) -> None:
    await _start(send, {})
    while True:
        await send({"type": "http.response.body", "body": _PIECE, "more_body": True})
        await asyncio.sleep(0)


async def _bomb(miner: Adversary, send: Send) -> None:
    body = gzip.compress(bytes(_BOMB))
    await _start(send, {"content-encoding": "gzip", "content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body})


async def _crashes(miner: Adversary, send: Send) -> None:
    await _start(send, {"content-length": str(_SAID)})
    await send({"type": "http.response.body", "body": _PIECE, "more_body": True})
    raise Broken("in the middle of an answer")


async def _points_elsewhere(miner: Adversary, send: Send) -> None:
    victim = "127.0.0.1:1" if miner.means.victim is None else miner.means.victim.address
    await _start(send, {"location": f"http://{victim}{COMPRESS}", "content-length": "0"}, status=307)
    await send({"type": "http.response.body", "body": b""})


async def _start(send: Send, headers: Mapping[str, str], *, status: int = 200) -> None:
    lines = {"content-type": OCTETS, **headers}
    encoded = [(name.encode(), value.encode()) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


WIRE: dict[str, Misbehaves] = {
    "late": _late,
    "drip": _drips,
    "endless": _endless,
    "bomb": _bomb,
    "crash": _crashes,
    "redirect": _points_elsewhere,
}
