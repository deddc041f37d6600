"""Sealed contexts and answers: only the two neurons that talk can read them.

X25519 with a new key for each request, HKDF-SHA256 and ChaCha20-Poly1305, all of `cryptography`. The receiver's key is
published signed by its hotkey (``identity``); the sender is known from the signature of the request, not from here. As
the receiver's key lives longer than a request, who steals it reads what was recorded: rotate it.

    sealed = 'CSEAL1' | 32 bytes of the sender's key for this request | ciphertext with its 16 bytes of tag
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_MAGIC = b"CSEAL1"
_KEY, _TAG = 32, 16
OVERHEAD = len(_MAGIC) + _KEY + _TAG
"""Bytes by which a sealed request is longer."""
_NONCE = bytes(12)  # a key seals one message


class SealError(ValueError):
    """Something sealed cannot be opened."""


@dataclass(frozen=True, repr=False)
class Secret:
    """What both sides of one request share: a key for the request, and one for its answer."""

    request: bytes
    answer: bytes

    def seal_answer(self, answer: bytes) -> bytes:
        """The answer, sealed. Once: a key seals one message."""
        return ChaCha20Poly1305(self.answer).encrypt(_NONCE, answer, _MAGIC)

    def open_answer(self, sealed: bytes) -> bytes:
        """The answer; ``SealError`` where it is not what the other side sealed."""
        try:
            return ChaCha20Poly1305(self.answer).decrypt(_NONCE, sealed, _MAGIC)
        except InvalidTag:
            raise SealError("sealed answer: it is not what the receiver of the request sealed") from None


def public_key(key: X25519PrivateKey) -> bytes:
    """The 32 bytes that others seal for."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def seal(message: bytes, receiver: bytes, *, sender_ss58: str, receiver_ss58: str) -> tuple[bytes, Secret]:
    """A request that only ``receiver``, a key of 32 bytes, can read, and what opens its answer.

    The hotkeys of both are bound to it: it cannot be passed off as another's, or to another.
    """
    own = X25519PrivateKey.generate()
    head = _MAGIC + public_key(own)
    secret = _secret(own, receiver, head, receiver, sender_ss58, receiver_ss58)
    return head + ChaCha20Poly1305(secret.request).encrypt(_NONCE, message, head), secret


def unseal(sealed: bytes, key: X25519PrivateKey, *, sender_ss58: str, receiver_ss58: str) -> tuple[bytes, Secret]:
    """The request that was sealed for ``key``, and what seals its answer; ``SealError`` where it was not."""
    if len(sealed) < OVERHEAD or not sealed.startswith(_MAGIC):
        raise SealError(f"sealed request: expected {_MAGIC.decode()}, a key and a ciphertext")
    head, ciphertext = sealed[: len(_MAGIC) + _KEY], sealed[len(_MAGIC) + _KEY :]
    secret = _secret(key, head[len(_MAGIC) :], head, public_key(key), sender_ss58, receiver_ss58)
    try:
        return ChaCha20Poly1305(secret.request).decrypt(_NONCE, ciphertext, head), secret
    except InvalidTag:
        raise SealError("sealed request: it was sealed for another key, or by another sender, or changed") from None


def _secret(
    own: X25519PrivateKey, other: bytes, head: bytes, receiver: bytes, sender_ss58: str, receiver_ss58: str
) -> Secret:
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:  # of another length, or of low order
        raise SealError("sealed request: its key is none of X25519") from None
    about = b"\0".join((b"condense/seal/1", head, receiver, sender_ss58.encode(), receiver_ss58.encode()))
    keys = HKDF(SHA256(), 2 * _KEY, salt=None, info=about).derive(shared)
    return Secret(keys[:_KEY], keys[_KEY:])
