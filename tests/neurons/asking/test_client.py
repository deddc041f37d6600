"""Whatever answers, asking ends in time, within bounds, without an error, and believes only what its miner signed."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from bittensor import http_auth
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from condense_core.neurons.asking.client import NeuronClient, Peer, Reply
from condense_core.neurons.protocol.messages import COMPRESS, Ask
from condense_core.neurons.protocol.nonces import SqliteNonceStore
from condense_core.neurons.protocol.sealing import public_key, unseal
from condense_core.neurons.protocol.signing import sign_response
from condense_testing.chains import key
from condense_testing.hostile import Raw, Received, Script, http_answer, raw_server

VALIDATOR, MINER, STRANGER = key("validator"), key("miner"), key("stranger")
ASK = Ask(tier="research", text="The keeper counts the lamps. " * 50, ratio=4.0)
SEALING = X25519PrivateKey.generate()
BODY = b"soft tokens" * 100
MANY = 10_000


def nonce_of(received: Received) -> int:
    return int(received.headers[http_auth.HEADER_NONCE.lower()])


def signed(received: Received, body: bytes, by: Any = MINER, **changes: Any) -> dict[str, str]:
    """The headers of an answer; changes: what is signed instead of what is sent."""
    fields = {"nonce_ns": nonce_of(received), "caller": VALIDATOR.ss58_address, "status": 200, "body": body, **changes}
    return sign_response(by, **fields)


def asked(
    script: Script, *, timeout: float = 1.0, max_bytes: int = MANY, times: int = 1, **options: Any
) -> tuple[list[Reply], Raw]:
    """What comes of asking a miner that behaves like ``script``, one time after the other."""

    async def use() -> tuple[list[Reply], Raw]:
        async with raw_server(script) as raw, NeuronClient(VALIDATOR, private=True) as client:
            peer = Peer(MINER.ss58_address, raw.address)
            replies = [
                await client.ask(peer, ASK, timeout=timeout, max_bytes=max_bytes, **options) for _ in range(times)
            ]
        return replies, raw

    return asyncio.run(use())


async def honest(received: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(http_answer(BODY, signed(received, BODY)))
    await writer.drain()


def test_a_signed_answer_is_taken_and_timed(tmp_path: Any) -> None:
    async def slow(received: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await honest(received, writer)

    (reply, again), raw = asked(slow, times=2)
    assert (reply.body, reply.why, reply.status, reply.is_answer) == (BODY, "", 200, True)
    assert 0.2 <= reply.seconds < 0.9
    assert again.is_answer
    assert raw.opened == 1  # one connection for both
    first, second = raw.requests
    assert (first.method, first.path, first.body) == ("POST", COMPRESS, ASK.to_bytes())
    assert nonce_of(first) < nonce_of(second)
    who = {"self_hotkey_ss58": MINER.ss58_address, "nonce_store": SqliteNonceStore(tmp_path / "n.db")}
    found = http_auth.verify(first.headers, first.body, method="POST", path=COMPRESS, **who)
    assert found.hotkey_ss58 == VALIDATOR.ss58_address


def test_a_sealed_request_is_read_by_its_receiver_and_answered_sealed() -> None:
    who = {"sender_ss58": VALIDATOR.ss58_address, "receiver_ss58": MINER.ss58_address}

    async def opens(received: Received, writer: asyncio.StreamWriter) -> None:
        plain, secret = unseal(base64.b64decode(json.loads(received.body)["sealed"]), SEALING, **who)
        assert plain == ASK.to_bytes()
        body = secret.seal_answer(BODY)
        writer.write(http_answer(body, signed(received, body)))

    [reply], raw = asked(opens, sealing_key=public_key(SEALING), max_bytes=len(BODY))
    assert reply.body == BODY
    assert b"keeper" not in raw.requests[0].body
    [reply], _ = asked(honest, sealing_key=public_key(SEALING))
    assert (reply.body, reply.why) == (b"", "not sealed: it is not what the receiver of the request sealed")


# -- who has signed ----------------------------------------------------------------------------------------------------

FORGED: dict[str, tuple[Callable[[Received], dict[str, str]], str]] = {
    "nobody": (lambda r: {}, "it is not signed"),
    "another key": (lambda r: signed(r, BODY, STRANGER), "signed by"),
    "another key in the miner's name": (
        lambda r: {**signed(r, BODY, STRANGER), "X-Bittensor-Response-Hotkey": MINER.ss58_address},
        "its signature is not",
    ),
    "for another receiver": (lambda r: signed(r, BODY, caller=STRANGER.ss58_address), "its signature is not"),
    "for another request": (lambda r: signed(r, BODY, nonce_ns=nonce_of(r) - 1), "its signature is not"),
    "another body": (lambda r: signed(r, BODY + b"."), "its signature is not"),
    "another status": (lambda r: signed(r, BODY, status=201), "its signature is not"),
    "another scheme": (lambda r: {**signed(r, BODY), "X-Bittensor-Response-Crypto": "ed25519"}, "signed with"),
    "zeros": (lambda r: {**signed(r, BODY), "X-Bittensor-Response-Signature": "0x" + "0" * 128}, "its signature"),
    "no hex": (lambda r: {**signed(r, BODY), "X-Bittensor-Response-Signature": "0xyz"}, "its signature"),
    "too short": (lambda r: {**signed(r, BODY), "X-Bittensor-Response-Signature": "0x00"}, "its signature"),
    "too long": (lambda r: {**signed(r, BODY), "X-Bittensor-Response-Signature": "0" * 600}, "it is not signed"),
}


@pytest.mark.parametrize("name", FORGED)
def test_only_the_miners_signature_of_this_answer_counts(name: str) -> None:
    headers, why = FORGED[name]

    async def forged(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_answer(BODY, headers(received)))

    [reply], _ = asked(forged)
    assert (reply.body, reply.status) == (b"", 200)
    assert reply.why.startswith("not signed: ")
    assert why in reply.why


def test_an_old_answer_is_no_answer_to_another_request() -> None:
    old: list[bytes] = []

    async def replays(received: Received, writer: asyncio.StreamWriter) -> None:
        old.append(http_answer(BODY, signed(received, BODY)))
        writer.write(old[0])

    (first, second), _ = asked(replays, times=2)
    assert first.is_answer
    assert "its signature is not that of this answer to this request" in second.why


def test_an_answer_that_is_sent_ahead_is_no_answer_to_what_follows() -> None:
    async def ahead(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_answer(BODY, signed(received, BODY)) * 2)

    (first, second), _ = asked(ahead, times=2)
    assert first.is_answer or first.why.startswith("broken: ")
    assert not second.is_answer or second.body == BODY


# -- what never ends, or is too much -----------------------------------------------------------------------------------


async def flood(writer: asyncio.StreamWriter, piece: bytes, pause: float = 0.0) -> None:
    """Send a piece again and again until nobody takes it."""
    while True:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause)


def after(head: bytes, piece: bytes, pause: float = 0.0) -> Script:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await flood(writer, piece, pause)

    return script


async def silent(received: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
BOMB = gzip.compress(bytes(200 * 2**20), 9)
LATE, TOO_MUCH = "late: nothing whole within", "it has more than 10,000 bytes"
ENDLESS: dict[str, tuple[Script, str]] = {
    "says nothing": (silent, LATE),
    "drips a body": (after(OK + b"content-length: 5000\r\n\r\n", b"x", 0.05), LATE),
    "drips chunks": (after(CHUNKED, b"1\r\nx\r\n", 0.05), LATE),
    "drips headers": (after(OK, b"a", 0.05), LATE),
    "drips its first line": (after(b"", b"H", 0.05), "broken: "),
    "continues for ever": (after(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0.01), ""),
    "sends chunks for ever": (after(CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n"), TOO_MUCH),
    "sends a body without a length for ever": (after(OK + b"connection: close\r\n\r\n", b"x" * 65536), TOO_MUCH),
    "says that it will be too much": (after(OK + b"content-length: 10001\r\n\r\n", b"", 1.0), TOO_MUCH),
    "sends headers for ever": (after(OK, b"x-a: " + b"b" * 1000 + b"\r\n"), "broken: "),
    "sends short headers for ever": (after(OK, b"a: b\r\n" * 1000), "broken: "),
    "sends a header for ever": (after(OK, b"x" * 65536), "broken: "),
    "sends a header's value for ever": (after(OK + b"x: ", b"x" * 65536), "broken: "),
    "sends a first line for ever": (after(b"HTTP/1.1 200 ", b"x" * 65536), "broken: "),
    "sends a chunk's extension for ever": (after(CHUNKED + b"1;", b"x" * 65536), LATE),
    "sends trailers for ever": (after(CHUNKED + b"0\r\n", b"x-a: " + b"b" * 1000 + b"\r\n"), "broken: "),
    "sends short trailers for ever": (after(CHUNKED + b"0\r\n", b"a: b\r\n" * 1000), "broken: "),
    "sends a bomb": (
        after(OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(BOMB) + BOMB, b"", 1.0),
        "it is compressed, which was not asked for",
    ),
    "sends a bomb as a transfer": (after(OK + b"transfer-encoding: gzip, chunked\r\n\r\n", BOMB), ""),
    "sends an error for ever": (
        after(b"HTTP/1.1 500 no\r\ntransfer-encoding: chunked\r\n\r\n", b"1000\r\n" + b"{" * 4096 + b"\r\n"),
        "it has more than 16,384 bytes",
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_costs_its_timeout_and_little_memory(name: str) -> None:
    script, why = ENDLESS[name]
    tracemalloc.start()
    try:
        started = time.monotonic()
        [reply], raw = asked(script, timeout=0.6)
        took, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reply.body == b""
    assert why in reply.why
    assert reply.why
    assert reply.seconds <= took < 3.0  # the server's end among it
    assert peak < 8 * 2**20, f"{peak:,} bytes for a limit of {MANY:,}"
    assert raw.connections == 0


def test_a_body_of_the_limit_is_taken_and_one_byte_more_is_not() -> None:
    [reply], _ = asked(honest, max_bytes=len(BODY))
    assert reply.is_answer
    [reply], _ = asked(honest, max_bytes=len(BODY) - 1)
    assert reply.why == f"it has more than {len(BODY) - 1:,} bytes"


# -- what is broken, or points elsewhere -------------------------------------------------------------------------------


def once(answer: bytes, *, end: bool = True) -> Script:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        if end:
            writer.close()

    return script


BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "no HTTP": b"\x00\xff\x16\x03\x01 not at all\r\n\r\n",
    "half of its headers": OK + b"content-le",
    "half of its body": http_answer(BODY, length=len(BODY) * 2),
    "no length that is one": OK + b"content-length: -5\r\n\r\n" + BODY,
    "a length beyond numbers": OK + b"content-length: " + b"9" * 400 + b"\r\n\r\n" + BODY,
    "two lengths": OK + b"content-length: 5\r\ncontent-length: 7\r\n\r\n" + BODY,
    "chunks that are none": CHUNKED + b"zz\r\nx\r\n",
    "a chunk of a negative size": CHUNKED + b"-1\r\nx\r\n",
    "a chunk beyond memory": CHUNKED + b"ffffffffffffffff\r\nx\r\n",
    "a status beyond numbers": b"HTTP/1.1 99999999999999999999 OK\r\n\r\n",
    "a status that is a word": b"HTTP/1.1 good OK\r\n\r\n",
    "another version": b"HTTP/7.3 200 OK\r\ncontent-length: 0\r\n\r\n",
    "the other protocol": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nxxxx",
    "cookies": OK + b"set-cookie: a=\xff\x00b; \x01\r\nset-cookie: =;;=\r\ncontent-length: 0\r\n\r\n",
    "bytes that are no text": OK + b"x-\xff\xfe: \xc3\x28\r\ncontent-length: 0\r\n\r\n",
    "a body where there is none": b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello",
    "a location of a file": b"HTTP/1.1 302 Found\r\nlocation: file:///etc/passwd\r\ncontent-length: 0\r\n\r\n",
    "a type of a letter": OK + b"content-type: text/html; charset=\xff\r\ncontent-length: 1\r\n\r\n<",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_is_a_reason_of_one_line(name: str) -> None:
    [reply], _ = asked(once(BROKEN[name]), timeout=0.6)
    assert reply.body == b""
    assert reply.why
    assert "\n" not in reply.why
    assert len(reply.why) < 120


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_not_followed(status: str) -> None:
    async def use() -> None:
        async with raw_server(honest) as other, NeuronClient(VALIDATOR, private=True) as client:
            elsewhere = {"location": f"http://{other.address}{COMPRESS}"}
            async with raw_server(once(http_answer(b"", elsewhere, status=status))) as raw:
                peer = Peer(MINER.ss58_address, raw.address)
                reply = await client.ask(peer, ASK, timeout=1.0, max_bytes=MANY)
        assert reply.why == f"refused: {status[:3]}"
        assert other.requests == []

    asyncio.run(use())


REFUSALS: dict[str, tuple[bytes, str]] = {
    "an error of ours": (b'{"error": {"code": "rate_limited", "message": "wait"}}', "refused: 500 rate_limited"),
    "a code with a line": (b'{"error": {"code": "a\\nb"}}', "refused: 500"),
    "a code of many letters": (b'{"error": {"code": "' + b"a" * 41 + b'"}}', "refused: 500"),
    "a code of other letters": ('{"error": {"code": "\u0430bc"}}'.encode(), "refused: 500"),
    "a code that is a list": (b'{"error": {"code": ["x"]}}', "refused: 500"),
    "an error that is a text": (b'{"error": "x"}', "refused: 500"),
    "a list": (b"[1, 2]", "refused: 500"),
    "depth": (b"[" * 9000, "refused: 500"),
    "a number beyond all": (b"9" * 9000, "refused: 500"),
    "no text": (b"\xff\xfe\xfd", "refused: 500"),
    "nothing": (b"", "refused: 500"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_of_an_error_only_its_code_is_repeated(name: str) -> None:
    body, why = REFUSALS[name]
    [reply], _ = asked(once(http_answer(body, status="500 Internal")))
    assert (reply.body, reply.why, reply.status) == (b"", why, 500)


def test_the_body_of_an_error_is_read_within_a_bound_of_its_own() -> None:
    """JSON takes many times its length in memory, so that a body as long as an answer may be is not parsed."""
    body = b"[" + b"{}," * 2**20 + b"{}]"
    tracemalloc.start()
    try:
        [reply], _ = asked(once(http_answer(body, status="500 Internal")), max_bytes=8 * 2**20, timeout=10.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reply.status == 500
    assert peak < 8 * 2**20


def test_nothing_that_is_answered_raises_and_no_change_of_an_answer_is_taken() -> None:
    rng = random.Random(0)
    pieces = [b"\r\n", b"\r\n\r\n", b"\x00", b"content-length: 3\r\n", CHUNKED, b"0\r\n\r\n", b"\xff" * 9, b":", b" "]

    def mutated(answer: bytes) -> bytes:
        for _ in range(rng.randint(1, 3)):
            at, kind = rng.randrange(len(answer)), rng.randrange(4)
            if kind == 0:
                answer = answer[:at] + bytes([rng.randrange(256)]) + answer[at + 1 :]
            elif kind == 1:
                answer = answer[:at] + rng.choice(pieces) + answer[at:]
            elif kind == 2:
                answer = answer[:at] + answer[at + rng.randint(1, 40) :]
            else:
                answer = answer[: at + 1]
        return answer

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(mutated(http_answer(BODY, signed(received, BODY))))
        await writer.drain()
        writer.close()

    replies, _ = asked(script, times=1000, timeout=0.5)
    assert all(reply.body in (b"", BODY) for reply in replies)
    assert all(bool(reply.why) == (not reply.body) and "\n" not in reply.why for reply in replies)
    assert sum(reply.is_answer for reply in replies) < 300  # the others changed what counts


# -- where, and how many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("localhost:80", "example.com:80", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", ":80", ""),
        *("127.0.0.1:80/path", "user@127.0.0.1:80", "[::1", "0.0.0.0:80", "[::]:80", "224.0.0.1:80", "2130706433:80"),
        *("127.0.0.1:" + "9" * 5000, "file:///etc/passwd", "127.1:80", "0x7f.0.0.1:80"),
    ],
)
def test_an_address_that_is_none_is_not_asked(address: str) -> None:
    async def use() -> Reply:
        async with NeuronClient(VALIDATOR, private=True) as client:
            return await client.ask(Peer(MINER.ss58_address, address), ASK, timeout=1.0, max_bytes=MANY)

    reply = asyncio.run(use())
    assert reply.why.startswith("the address is ")
    assert reply.seconds < 0.5


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "[::1]",
        "[fe80::1]",
        "[::ffff:127.0.0.1]",
        "[fd00::1]",
    ],
)
def test_no_private_network_is_asked_unless_that_is_wanted(host: str) -> None:
    async def use() -> Reply:
        async with NeuronClient(VALIDATOR) as client:
            return await client.ask(Peer(MINER.ss58_address, f"{host}:80"), ASK, timeout=1.0, max_bytes=MANY)

    assert asyncio.run(use()).why == "the address is not one that others reach"


def test_nobody_there_is_a_reason() -> None:
    async def use() -> Reply:
        async with raw_server(honest) as raw:
            gone = raw.address
        async with NeuronClient(VALIDATOR, private=True) as client:
            return await client.ask(Peer(MINER.ss58_address, gone), ASK, timeout=1.0, max_bytes=MANY)

    assert asyncio.run(use()).why.startswith("not reached: ")


def test_what_waits_for_its_turn_is_not_late() -> None:
    open_at_once = 0

    async def slow(received: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal open_at_once
        open_at_once = max(open_at_once, raw.connections)
        await asyncio.sleep(0.3)
        await honest(received, writer)

    async def use() -> list[Reply]:
        nonlocal raw
        async with raw_server(slow) as raw, NeuronClient(VALIDATOR, private=True, connections=2) as client:
            peer = Peer(MINER.ss58_address, raw.address)
            return await asyncio.gather(*(client.ask(peer, ASK, timeout=0.8, max_bytes=MANY) for _ in range(6)))

    raw = Raw()
    replies = asyncio.run(use())
    assert all(reply.is_answer and reply.seconds < 0.7 for reply in replies)
    assert open_at_once <= 2
    assert len({nonce_of(received) for received in raw.requests}) == 6


def test_whoever_never_answers_keeps_nobody_else_from_being_asked() -> None:
    async def use() -> list[Reply]:
        async with (
            raw_server(silent) as mute,
            raw_server(honest) as good,
            NeuronClient(VALIDATOR, private=True, connections=64) as client,
        ):
            peers = [Peer(MINER.ss58_address, mute.address)] * 20 + [Peer(MINER.ss58_address, good.address)]
            return await asyncio.gather(*(client.ask(peer, ASK, timeout=0.5, max_bytes=MANY) for peer in peers))

    *late, reply = asyncio.run(use())
    assert reply.is_answer
    assert reply.seconds < 0.4
    assert all(one.why.startswith(LATE) for one in late)
