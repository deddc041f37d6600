"""Signed answers: `btresp/1`, the other half of the SDK's `btauth/1`, which signs requests only.

A request is signed and verified by ``bittensor.http_auth``. Its answer is signed by who gave it, over the request's
nonce, both hotkeys, the status and the body, so that nobody between can give another one, or an answer to another
request, and whoever gave a wrong one cannot deny it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from condense_core.neurons.extra import bittensor_module

PROTOCOL = "btresp/1"
HEADER_HOTKEY = "X-Bittensor-Response-Hotkey"
HEADER_CRYPTO = "X-Bittensor-Response-Crypto"
HEADER_SIGNATURE = "X-Bittensor-Response-Signature"

_SCHEMES = {0: "ed25519", 1: "sr25519"}
_MAX_HEADER = 512


class Hotkey(Protocol):
    """What signs: a ``bittensor`` keypair, or any of its signers that answers at once."""

    @property
    def ss58_address(self) -> str: ...

    @property
    def crypto_type(self) -> int: ...

    def sign(self, payload: bytes) -> bytes: ...


class ResponseError(ValueError):
    """An answer is not signed by whom it should be, or is not the answer to this request."""


def response_payload(*, scheme: str, nonce_ns: int, caller: str, responder: str, status: int, body: bytes) -> bytes:
    """The signed bytes: lines of protocol, scheme, nonce, caller, responder, status and the body's SHA-256 in hex."""
    digest = hashlib.sha256(body).hexdigest()
    return "\n".join((PROTOCOL, scheme, str(nonce_ns), caller, responder, str(status), digest)).encode()


def sign_response(hotkey: Hotkey, *, nonce_ns: int, caller: str, status: int, body: bytes) -> dict[str, str]:
    """Headers that sign ``body``, the answer to the request of ``caller`` with this nonce."""
    scheme = _SCHEMES[hotkey.crypto_type]
    payload = response_payload(
        scheme=scheme, nonce_ns=nonce_ns, caller=caller, responder=hotkey.ss58_address, status=status, body=body
    )
    return {
        HEADER_HOTKEY: hotkey.ss58_address,
        HEADER_CRYPTO: scheme,
        HEADER_SIGNATURE: "0x" + bytes(hotkey.sign(payload)).hex(),
    }


def verify_response(
    headers: Mapping[str, str],
    body: bytes,
    *,
    nonce_ns: int,
    caller: str,
    responder: str,
    status: int,
    crypto_type: int = 1,
) -> None:
    """Check that ``responder`` signed this answer to this request.

    crypto_type: of the responder's key, as the chain has it; never what the answer says (1: sr25519, 0: ed25519).

    Raises:
        ResponseError: a header is missing, or the signature is another's, or of another answer.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    found = [lowered.get(name.lower(), "") for name in (HEADER_HOTKEY, HEADER_CRYPTO, HEADER_SIGNATURE)]
    if not all(found) or max(map(len, found)) > _MAX_HEADER:
        raise ResponseError("answer: it is not signed, expected the headers of btresp/1")
    hotkey, scheme, signature = found
    if hotkey != responder:
        raise ResponseError(f"answer: signed by {hotkey[:60]!r}, expected {responder}")
    if scheme != _SCHEMES[crypto_type]:
        raise ResponseError(f"answer: signed with {scheme[:20]!r}, expected {_SCHEMES[crypto_type]}")
    payload = response_payload(
        scheme=scheme, nonce_ns=nonce_ns, caller=caller, responder=responder, status=status, body=body
    )
    sp_core: Any = bittensor_module("bittensor.sp_core")
    try:
        good = bool(sp_core.verify(payload, bytes.fromhex(signature.removeprefix("0x")), responder, crypto_type))
    except ValueError:  # no hex, or of another length
        good = False
    if not good:
        raise ResponseError("answer: its signature is not that of this answer to this request")
