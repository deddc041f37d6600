"""A miner is whoever says so at the address on the chain, signed by the hotkey that the chain has for it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from condense_core.neurons.asking.client import NeuronClient, Peer, Reply
from condense_core.neurons.asking.peers import FRESH, RETRY, Peers
from condense_core.neurons.chain.base import Metagraph, Neuron
from condense_core.neurons.protocol.identity import LIFETIME, Identity
from condense_core.neurons.protocol.messages import IDENTITY, VERSION, Ask, MessageError
from condense_core.neurons.protocol.sealing import public_key
from condense_core.neurons.protocol.signing import sign_response
from condense_testing.chains import key
from condense_testing.hostile import Received, Script, http_answer, raw_server

VALIDATOR, MINER, STRANGER = key("validator"), key("miner"), key("stranger")
SEALING = X25519PrivateKey.generate()


def identity(hotkey: Any = MINER, *, by: Any = None, tiers: tuple[str, ...] = ("research",), **changes: Any) -> bytes:
    """An answer that says who somebody is; by: who signs. changes: of its fields."""
    said = Identity.of(hotkey.ss58_address, (), SEALING, VERSION).model_dump() | {"tiers": tiers} | changes
    body = json.dumps(said).encode()
    who = {"nonce_ns": int(said["issued_ns"]), "caller": "-", "status": 200, "body": body}
    return http_answer(body, sign_response(by or hotkey, **who))


def once(answer: bytes) -> Script:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        assert (received.method, received.path) == ("GET", IDENTITY)
        writer.write(answer)

    return script


def said(answer: bytes | Script, *, timeout: float = 1.0) -> Identity:
    async def use() -> Identity:
        script = once(answer) if isinstance(answer, bytes) else answer
        async with raw_server(script) as raw, NeuronClient(VALIDATOR, private=True) as client:
            return await client.identity(Peer(MINER.ss58_address, raw.address), timeout=timeout)

    return asyncio.run(use())


def test_an_identity_says_its_tiers_and_its_key() -> None:
    found = said(identity())
    assert (found.hotkey, found.tiers) == (MINER.ss58_address, ("research",))
    assert bytes.fromhex(found.sealing_key) == public_key(SEALING)


SIGNED = identity()
HOSTILE: dict[str, tuple[bytes, str]] = {
    "another's": (identity(STRANGER), "signed by"),
    "another's, signed by the miner": (identity(STRANGER, by=MINER), "of '"),
    "the miner's, signed by another": (identity(MINER, by=STRANGER), "signed by"),
    "an old one": (identity(issued_ns=time.time_ns() - int((LIFETIME + 60) * 1e9)), "s old"),
    "one of tomorrow": (identity(issued_ns=time.time_ns() + 10**14), "s old"),
    "changed behind its signature": (SIGNED.replace(b"research", b"resaerch"), "its signature is not"),
    "not signed": (http_answer(SIGNED.partition(b"\r\n\r\n")[2]), "it is not signed"),
    "a tier that is no name": (identity(tiers=("research",)).replace(b"research", b"Res arch"), "tiers"),
    "a thousand tiers": (identity(tiers=("research",) * 1000), "tiers"),
    "a key of another length": (identity(sealing_key="00" * 31), "sealing_key"),
    "no JSON": (http_answer(b"\xff{"), "identity: "),
    "depth": (http_answer(b"[" * 10_000), "identity: "),
    "a list": (http_answer(b"[]"), "identity: "),
    "too much": (http_answer(b" " * 20_000), "it has more than 16,384 bytes"),
    "an error": (http_answer(b"{}", status="503 later"), "identity: status 503, expected 200"),
    "a redirect": (http_answer(b"", {"location": "http://127.0.0.1:1/"}, status="302 x"), "status 302"),
    "no HTTP": (b"\x00\x01\x02\r\n\r\n", "identity: broken"),
    "compressed": (http_answer(b"x", {"content-encoding": "gzip"}), "it is compressed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_identity_of_the_miner_is_one_line(name: str) -> None:
    answer, why = HOSTILE[name]
    with pytest.raises(MessageError) as refused:
        said(answer)
    assert str(refused.value).startswith("identity: ")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_an_identity_that_never_ends_is_late() -> None:
    async def drips(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    started = time.monotonic()
    with pytest.raises(MessageError, match="identity: late"):
        said(drips, timeout=0.4)
    assert time.monotonic() - started < 2


# -- who is there ------------------------------------------------------------------------------------------------------


class Scripted:
    """Answers who somebody is without a network; counts whom it asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Identity | str] = {}
        self.asked: list[Peer] = []
        self.sealed_for: list[bytes | None] = []
        self.replies: list[Reply] = []

    async def identity(self, peer: Peer, *, timeout: float = 5.0) -> Identity:
        self.asked.append(peer)
        answer = self.answers[peer.hotkey]
        if isinstance(answer, str):
            raise MessageError(answer)
        return answer

    async def ask(
        self, peer: Peer, ask: Ask, *, timeout: float, max_bytes: int, sealing_key: bytes | None = None
    ) -> Reply:
        self.sealed_for.append(sealing_key)
        assert timeout > 0
        return self.replies.pop(0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def graph(*rows: tuple[str, str | None]) -> Metagraph:
    """Neurons of these hotkeys and addresses, by uid."""
    made = [
        Neuron(uid, hotkey, "cold", address, False, 0.0, 0.0, True, 0, 0, 0.0, 0.0, 0.0)
        for uid, (hotkey, address) in enumerate(rows)
    ]
    return Metagraph(1, 0, tuple(made), 360, 0, None)


def says(hotkey: str, *tiers: str, version: int = VERSION) -> Identity:
    return Identity.of(hotkey, tiers, SEALING, version)


def test_a_miner_is_who_has_an_address_and_says_so() -> None:
    client, clock = Scripted(), Clock()
    client.answers = {
        "a": says("a", "research", "inference_0"),
        "b": "identity: broken",
        "c": says("c", "research"),
        "d": says("d", "research", version=VERSION + 1),
    }
    peers = Peers(client, clock=clock)
    all_of_them = graph(("a", "1.1.1.1:1"), ("own", "1.1.1.2:1"), ("b", "1.1.1.3:1"), ("c", "1.1.1.4:1"))
    asyncio.run(peers.refresh(all_of_them, but="own"))
    assert [peer.hotkey for peer in peers.serving("research")] == ["a", "c"]
    assert [peer.uid for peer in peers.serving("research")] == [0, 3]
    assert [peer.hotkey for peer in peers.serving("inference_0")] == ["a"]
    assert peers.serving("gold") == []
    assert [(peer.hotkey, why) for peer, why in peers.silent()] == [("b", "identity: broken")]
    assert {peer.hotkey for peer in client.asked} == {"a", "b", "c"}
    asyncio.run(peers.refresh(graph(("a", None), ("d", "1.1.1.5:1"))))
    assert peers.serving("research") == []
    assert [why for _, why in peers.silent()] == [f"identity: version 2 of the protocol, expected {VERSION}"]


def test_what_was_said_is_kept_for_a_while_and_silence_for_a_shorter_one() -> None:
    client, clock = Scripted(), Clock()
    client.answers = {"a": says("a", "research"), "b": "identity: late"}
    peers, both = Peers(client, clock=clock), graph(("a", "1.1.1.1:1"), ("b", "1.1.1.2:1"))

    def asked_at(now: float) -> list[str]:
        clock.now = now
        client.asked.clear()
        asyncio.run(peers.refresh(both))
        return [peer.hotkey for peer in client.asked]

    assert asked_at(0.0) == ["a", "b"]
    assert asked_at(RETRY - 1) == []
    assert asked_at(RETRY + 1) == ["b"]
    assert asked_at(FRESH + 1) == ["a", "b"]


def test_an_address_that_changes_hands_is_asked_again() -> None:
    client, clock = Scripted(), Clock()
    client.answers = {"a": says("a", "research")}
    peers = Peers(client, clock=clock)
    asyncio.run(peers.refresh(graph(("a", "1.1.1.1:1"))))
    client.answers["a"] = "identity: signed by another"
    asyncio.run(peers.refresh(graph(("a", "6.6.6.6:1"))))
    assert [peer.address for peer in client.asked] == ["1.1.1.1:1", "6.6.6.6:1"]
    assert peers.serving("research") == []
    client.answers["a"] = says("a", "research")
    asyncio.run(peers.refresh(graph(("z", None), ("a", "6.6.6.6:1"))))  # another uid
    assert [peer.uid for peer in peers.serving("research")] == [1]


ASK = Ask(tier="research", text="x" * 1000, ratio=4.0)
UNREADABLE = Reply(b"", 0.1, "refused: 422 invalid_request", 422)


def replied(client: Scripted, *, timeout: float = 8.0) -> Reply:
    """What asking a miner comes to that has said who it is, and then says what ``client.answers`` has."""

    async def use() -> Reply:
        said = client.answers["a"]
        client.answers["a"] = says("a", "research")
        peers = Peers(client, clock=Clock())
        await peers.refresh(graph(("a", "1.1.1.1:1")))
        client.answers["a"] = said
        [peer] = peers.serving("research")
        return await peers.ask(peer, ASK, timeout=timeout, max_bytes=1000)

    return asyncio.run(use())


def test_a_miner_that_was_started_again_is_sealed_for_anew_once() -> None:
    client, other = Scripted(), X25519PrivateKey.generate()
    client.answers["a"] = Identity.of("a", ("research",), other, VERSION)
    client.replies = [UNREADABLE, Reply(b"soft", 0.2, "", 200)]
    reply = replied(client)
    assert (reply.body, reply.is_answer) == (b"soft", True)
    assert client.sealed_for == [public_key(SEALING), public_key(other)]


@pytest.mark.parametrize("then", ["the same key", "silence", "another key each time"])
def test_a_miner_that_never_reads_what_was_sealed_for_it_is_asked_twice_at_most(then: str) -> None:
    client = Scripted()
    key = X25519PrivateKey.generate() if then == "another key each time" else SEALING
    client.answers["a"] = "identity: late" if then == "silence" else Identity.of("a", ("research",), key, VERSION)
    client.replies = [UNREADABLE] * 3
    assert replied(client).why == UNREADABLE.why
    assert len(client.sealed_for) == (2 if then == "another key each time" else 1)
