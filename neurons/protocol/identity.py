"""Who a neuron says it is: its tiers and the key that others seal for, signed by its hotkey and good for a while."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from condense_core.neurons.protocol.messages import MessageError
from condense_core.neurons.protocol.sealing import public_key
from condense_core.neurons.protocol.signing import Hotkey, ResponseError, sign_response, verify_response
from condense_core.neurons.tiers import Name

LIFETIME = 3600.0
"""Seconds for which an identity is believed; a neuron gives a new one whenever it is asked."""
MAX_BYTES = 16 * 1024
_NOBODY = "-"  # an identity is for everybody
_SKEW = 10.0


class Identity(BaseModel):
    """What a neuron says of itself.

    Attributes:
        version: of the protocol. hotkey: its own. tiers: that it serves.
        sealing_key: the 32 bytes of its X25519 key, in hex. issued_ns: when it said so, in ns since the epoch.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    version: Annotated[int, Field(ge=1)]
    hotkey: Annotated[str, Field(min_length=1, max_length=64)]
    tiers: Annotated[tuple[Name, ...], Field(max_length=64, strict=False)]
    sealing_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    issued_ns: Annotated[int, Field(ge=0, lt=2**63)]

    @classmethod
    def of(cls, hotkey: str, tiers: Sequence[str], key: X25519PrivateKey, version: int) -> Identity:
        """That of a neuron, issued now."""
        return cls(
            version=version,
            hotkey=hotkey,
            tiers=tuple(tiers),
            sealing_key=public_key(key).hex(),
            issued_ns=time.time_ns(),
        )

    def signed(self, hotkey: Hotkey) -> tuple[bytes, dict[str, str]]:
        """As JSON, and the headers that sign it."""
        body = self.model_dump_json().encode()
        return body, sign_response(hotkey, nonce_ns=self.issued_ns, caller=_NOBODY, status=200, body=body)


def read_identity(
    body: bytes, headers: Mapping[str, str], *, hotkey: str, now_ns: int | None = None, crypto_type: int = 1
) -> Identity:
    """The identity of ``hotkey``, from hostile bytes; ``MessageError`` where it is none, another's, or too old."""
    if len(body) > MAX_BYTES:
        raise MessageError(f"identity: {len(body):,} bytes, expected at most {MAX_BYTES:,}")
    try:
        found = Identity.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise MessageError(f"identity: {'.'.join(map(str, first['loc']))[:60]}: {first['msg'][:200]}") from None
    try:
        verify_response(
            headers,
            body,
            nonce_ns=found.issued_ns,
            caller=_NOBODY,
            responder=hotkey,
            status=200,
            crypto_type=crypto_type,
        )
    except ResponseError as error:
        raise MessageError(f"identity: {str(error).removeprefix('answer: ')}") from None
    age = ((time.time_ns() if now_ns is None else now_ns) - found.issued_ns) / 1e9
    if found.hotkey != hotkey or not -_SKEW <= age <= LIFETIME:
        raise MessageError(f"identity: of {found.hotkey!r:.70}, {age:.0f} s old, expected {hotkey}'s own and a new one")
    return found
