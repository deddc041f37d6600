"""Sealed requests and answers: the receiver reads them, nobody else, and nobody changes them."""

from __future__ import annotations

import pytest

pytest.importorskip("cryptography", reason="the extra `neurons` is not installed")
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from condense_core.neurons.protocol.sealing import OVERHEAD, SealError, public_key, seal, unseal

KEY, OTHER = X25519PrivateKey.generate(), X25519PrivateKey.generate()
WHO = {"sender_ss58": "5Sender", "receiver_ss58": "5Receiver"}


@pytest.mark.parametrize("message", [b"", b"x", b"text" * 5000])
def test_the_receiver_reads_the_request_and_the_sender_its_answer(message: bytes) -> None:
    sealed, mine = seal(message, public_key(KEY), **WHO)
    assert len(sealed) == len(message) + OVERHEAD
    assert len(message) < 2 or message not in sealed
    read, theirs = unseal(sealed, KEY, **WHO)
    assert read == message
    assert mine.open_answer(theirs.seal_answer(b"answer")) == b"answer"


def test_a_request_is_sealed_anew_each_time() -> None:
    (one, _), (other, _) = (seal(b"same", public_key(KEY), **WHO) for _ in range(2))
    assert one != other


@pytest.mark.parametrize("who", [{"sender_ss58": "5Else"}, {"receiver_ss58": "5Else"}])
def test_it_belongs_to_its_sender_and_its_receiver(who: dict[str, str]) -> None:
    sealed, _ = seal(b"text", public_key(KEY), **WHO)
    with pytest.raises(SealError, match="for another key, or by another sender, or changed"):
        unseal(sealed, KEY, **{**WHO, **who})
    with pytest.raises(SealError):
        unseal(sealed, OTHER, **WHO)


def test_every_changed_byte_is_noticed() -> None:
    sealed, mine = seal(b"text", public_key(KEY), **WHO)
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        with pytest.raises(SealError):
            unseal(bytes(changed), KEY, **WHO)
    answer = bytearray(unseal(sealed, KEY, **WHO)[1].seal_answer(b"answer"))
    answer[0] ^= 1
    with pytest.raises(SealError, match="sealed answer"):
        mine.open_answer(bytes(answer))


def test_a_request_is_no_answer_and_an_answer_of_another_request_is_none() -> None:
    (one, mine), (other, _) = (seal(b"text", public_key(KEY), **WHO) for _ in range(2))
    with pytest.raises(SealError):
        mine.open_answer(unseal(other, KEY, **WHO)[1].seal_answer(b"answer"))
    with pytest.raises(SealError):
        mine.open_answer(one)


@pytest.mark.parametrize("sealed", [b"", b"CSEAL1", b"CSEAL2" + bytes(100), b"CSEAL1" + bytes(32) + bytes(20)])
def test_what_is_not_sealed_is_refused(sealed: bytes) -> None:
    with pytest.raises(SealError, match="sealed request: "):
        unseal(sealed, KEY, **WHO)


@pytest.mark.parametrize("key", [b"", b"short", bytes(32)])
def test_a_key_that_is_none_is_refused(key: bytes) -> None:
    with pytest.raises(SealError, match="its key is none of X25519"):
        seal(b"text", key, **WHO)
