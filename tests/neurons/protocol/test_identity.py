"""Identities: a neuron's own, signed, and new."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from condense_core.neurons.protocol.identity import LIFETIME, MAX_BYTES, Identity, read_identity
from condense_core.neurons.protocol.messages import MessageError
from condense_core.neurons.protocol.sealing import public_key
from condense_testing.chains import key

MINER, OTHER = key("miner"), key("other")
SEALING = X25519PrivateKey.generate()
IDENTITY = Identity.of(MINER.ss58_address, ["research"], SEALING, 1)
BODY, HEADERS = IDENTITY.signed(MINER)


def read(body: bytes = BODY, headers: Any = HEADERS, hotkey: str = MINER.ss58_address, age: float = 1.0) -> Identity:
    return read_identity(body, headers, hotkey=hotkey, now_ns=IDENTITY.issued_ns + int(age * 1e9))


def test_an_identity_comes_back_with_the_key_to_seal_for() -> None:
    found = read()
    assert found == IDENTITY
    assert bytes.fromhex(found.sealing_key) == public_key(SEALING)


@pytest.mark.parametrize("age", [LIFETIME + 1, -11.0])
def test_an_old_one_or_one_of_the_future_is_refused(age: float) -> None:
    with pytest.raises(MessageError, match=r"expected .* own and a new one"):
        read(age=age)


def test_another_hotkeys_is_refused_whoever_signs() -> None:
    with pytest.raises(MessageError, match="identity: signed by"):
        read(hotkey=OTHER.ss58_address)
    body, headers = IDENTITY.signed(OTHER)
    with pytest.raises(MessageError, match="identity: signed by"):
        read(body, headers)
    with pytest.raises(MessageError, match="own and a new one"):  # signed by another, about the miner
        read(body, headers, hotkey=OTHER.ss58_address)


def test_a_changed_one_is_refused() -> None:
    changed = BODY.replace(b"research", b"inferenc")
    assert changed != BODY
    with pytest.raises(MessageError, match="its signature is not that of this answer"):
        read(changed)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b"x" * (MAX_BYTES + 1),
        json.dumps({**json.loads(BODY), "sealing_key": "00"}).encode(),
        json.dumps({**json.loads(BODY), "tiers": ["../x"]}).encode(),
        json.dumps({**json.loads(BODY), "issued_ns": 2**70}).encode(),
    ],
    ids=["empty", "no object", "no UTF-8", "too large", "a short key", "a tier that is no name", "no time"],
)
def test_what_is_no_identity_is_refused(body: bytes) -> None:
    with pytest.raises(MessageError, match="identity: "):
        read(body)
