"""Asks miners, within bounds of time and bytes, and believes only what is signed.

Whoever answers may be hostile: it may drip bytes, send for ever, compress a bomb, point elsewhere, or sign as another.
Nothing of that costs more than the timeout and the bytes of the tier, and none of it raises.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

from condense_core._version import __version__
from condense_core.neurons.extra import bittensor_module
from condense_core.neurons.protocol.identity import MAX_BYTES as MAX_IDENTITY_BYTES
from condense_core.neurons.protocol.identity import Identity, read_identity
from condense_core.neurons.protocol.messages import COMPRESS, IDENTITY, Ask, MessageError
from condense_core.neurons.protocol.sealing import SealError, Secret, seal
from condense_core.neurons.protocol.signing import Hotkey, ResponseError, verify_response
from condense_core.serving.wire import JSON

_TAG = 16  # bytes by which a sealed answer is longer
_MOST_ERROR = 16 * 1024  # bytes of an error, which is parsed: JSON takes many times its length in memory


class Unreachable(ValueError):
    """An address that nobody may be asked at."""


@dataclass(frozen=True)
class Peer:
    """A miner as the chain has it.

    Attributes:
        hotkey: of which an answer must be signed. address: ``ip:port`` or ``[ipv6]:port``. uid: on the subnet.
    """

    hotkey: str
    address: str
    uid: int = -1


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Attributes:
        body: signed by the miner for this very request; empty where there is none.
        seconds: from sending to the last byte, or until it failed.
        why: in one line why there is no answer; empty where there is one. Of what a miner writes it shows the code of
            an error at most.
        status: of HTTP, 0 where none came.
    """

    body: bytes
    seconds: float
    why: str = ""
    status: int = 0

    @property
    def is_answer(self) -> bool:
        return not self.why


class NeuronClient:
    """Asks in the name of a hotkey, from one event loop. Close it with ``aclose``, or use it in ``async with``.

    Args:
        hotkey: signs what is asked. private: whether addresses of this host and of private networks may be asked.
        connections: open at once; what is asked beyond waits, and its time does not run yet.
    """

    def __init__(self, hotkey: Hotkey, *, private: bool = False, connections: int = 64) -> None:
        self.hotkey, self.private = hotkey, private
        self._room = asyncio.Semaphore(connections)
        self._http: aiohttp.ClientSession | None = None
        self._nonce = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        if self._http is not None:
            await self._http.close()

    async def ask(
        self, peer: Peer, ask: Ask, *, timeout: float, max_bytes: int, sealing_key: bytes | None = None
    ) -> Reply:
        """A miner's answer, or why there is none.

        Args:
            timeout: seconds until the last byte. max_bytes: of the answer; one more is not read.
            sealing_key: of the miner's identity, to seal request and answer; None: they are sent as they are.
        """
        body, secret = ask.to_bytes(), None
        if sealing_key is not None:
            both = {"sender_ss58": self.hotkey.ss58_address, "receiver_ss58": peer.hotkey}
            try:
                sealed, secret = seal(body, sealing_key, **both)
            except SealError:
                return Reply(b"", 0.0, "not sealed: the receiver's key is none that can be sealed for")
            body = b'{"sealed": "' + base64.b64encode(sealed) + b'"}'
        async with self._room:
            reply = await self._exchange(peer, body, timeout, max_bytes + (_TAG if secret else 0))
        return reply if secret is None else _opened(reply, secret)

    async def identity(self, peer: Peer, *, timeout: float = 5.0) -> Identity:
        """Who a miner says it is; ``MessageError`` where it does not, or wrongly."""
        started = time.monotonic()
        try:
            async with self._room, asyncio.timeout(timeout):
                response = await self._session().get(_url(peer, IDENTITY, self.private), allow_redirects=False)
                async with response:
                    status, headers = response.status, dict(response.headers)
                    body = await _bounded(response, MAX_IDENTITY_BYTES)
        except (OSError, aiohttp.ClientError, _Unread, ValueError) as error:
            raise MessageError(f"identity: {_failure(error, time.monotonic() - started)}") from None
        if status != 200:
            raise MessageError(f"identity: status {status}, expected 200")
        return read_identity(body, headers, hotkey=peer.hotkey)

    async def _exchange(self, peer: Peer, body: bytes, timeout: float, max_bytes: int) -> Reply:
        self._nonce = nonce = max(time.time_ns(), self._nonce + 1)
        status, started = 0, time.monotonic()
        try:
            url = _url(peer, COMPRESS, self.private)
            headers = self._signed(body, peer.hotkey, nonce)
            async with asyncio.timeout(timeout):
                response = await self._session().post(url, data=body, headers=headers, allow_redirects=False)
                async with response:
                    status = response.status
                    payload = await _bounded(response, max_bytes if status == 200 else _MOST_ERROR)
                    answered = dict(response.headers)
        except (OSError, aiohttp.ClientError, _Unread, ValueError) as error:
            seconds = time.monotonic() - started
            return Reply(b"", seconds, _failure(error, seconds), status)
        seconds = time.monotonic() - started
        if status != 200:
            return Reply(b"", seconds, _refused(status, payload), status)
        try:
            verify_response(
                answered,
                payload,
                nonce_ns=nonce,
                caller=self.hotkey.ss58_address,
                responder=peer.hotkey,
                status=200,
            )
        except ResponseError as error:
            return Reply(b"", seconds, f"not signed: {error}", status)
        return Reply(payload, seconds, "", status)

    def _signed(self, body: bytes, receiver: str, nonce: int) -> dict[str, str]:
        http_auth: Any = bittensor_module("bittensor.http_auth")
        signed: dict[str, str] = http_auth.sign(
            self.hotkey, method="POST", path=COMPRESS, body=body, receiver_ss58=receiver, nonce_ns=nonce
        )
        return {"content-type": JSON, **signed}

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, use_dns_cache=False, keepalive_timeout=30),
                timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_read=None),  # each call has its own
                headers={"accept-encoding": "identity", "user-agent": f"condense_core/{__version__}"},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                max_line_size=4096,
                max_field_size=4096,
            )
        return self._http


class _Unread(Exception):
    """An answer that is not read, or not to its end."""


def _url(peer: Peer, path: str, private: bool) -> str:
    """Of an address on the chain, which is an IP address and a port and nothing else; no name is ever looked up."""
    host, _, port = peer.address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
    except ValueError:
        raise Unreachable("the address is no IP address with a port") from None
    if not 0 < number < 2**16 or not (private or ip.is_global) or ip.is_multicast or ip.is_unspecified:
        raise Unreachable("the address is not one that others reach")
    return f"http://[{ip}]:{number}{path}" if ip.version == 6 else f"http://{ip}:{number}{path}"


async def _bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The whole body as it was sent."""
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _Unread("it is compressed, which was not asked for")
    if (response.content_length or 0) > max_bytes:
        raise _Unread(f"it has more than {max_bytes:,} bytes")
    parts, length = list[bytes](), 0  # joined once: a buffer that grows is copied again and again
    async for part in response.content.iter_any():
        length += len(part)
        if length > max_bytes:
            raise _Unread(f"it has more than {max_bytes:,} bytes")
        parts.append(part)
    return b"".join(parts)


def _opened(reply: Reply, secret: Secret) -> Reply:
    if not reply.is_answer:
        return reply
    try:
        return Reply(secret.open_answer(reply.body), reply.seconds, "", reply.status)
    except SealError:
        return Reply(b"", reply.seconds, "not sealed: it is not what the receiver of the request sealed", reply.status)


def _failure(error: Exception, seconds: float) -> str:
    """One line, without anything that the other side has written."""
    if isinstance(error, TimeoutError):
        return f"late: nothing whole within {seconds:.2f} s"
    if isinstance(error, _Unread | Unreachable):
        return str(error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"not reached: {error.os_error.strerror or 'no connection'}"
    return f"broken: {type(error).__name__}"


def _refused(status: int, body: bytes) -> str:
    """Of an answer that is none: its status, and its code as far as it is one."""
    try:
        code: object = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        code = None
    known = isinstance(code, str) and len(code) <= 40 and code.replace("_", "").isascii() and code.isidentifier()
    return f"refused: {status}{f' {code}' if known else ''}"
