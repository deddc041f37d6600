"""Signed answers: only the responder's own, to this request, of this caller, verifies."""

from __future__ import annotations

from typing import Any

import pytest

from condense_core.neurons.protocol.signing import (
    HEADER_CRYPTO,
    HEADER_HOTKEY,
    HEADER_SIGNATURE,
    ResponseError,
    response_payload,
    sign_response,
    verify_response,
)

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from bittensor.sp_core import CRYPTO_ED25519, Keypair

NONCE, BODY = 1_700_000_000_000_000_000, b"soft tokens"


def pair(seed: int, crypto_type: int = 1) -> Any:
    return Keypair.create_from_seed(bytes([seed]) * 32, crypto_type=crypto_type)


CALLER, MINER, OTHER = pair(1), pair(2), pair(3)


def checked(headers: dict[str, str], body: bytes = BODY, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "nonce_ns": NONCE,
        "caller": CALLER.ss58_address,
        "responder": MINER.ss58_address,
        "status": 200,
    }
    verify_response(headers, body, **{**fields, **changes})


def signed(by: Any = MINER, **changes: Any) -> dict[str, str]:
    fields: dict[str, Any] = {"nonce_ns": NONCE, "caller": CALLER.ss58_address, "status": 200, "body": BODY}
    return sign_response(by, **{**fields, **changes})


def test_an_answer_verifies_in_headers_of_any_case() -> None:
    checked(signed())
    checked({name.lower(): value for name, value in signed().items()})


def test_the_payload_is_what_the_protocol_says() -> None:
    payload = response_payload(scheme="sr25519", nonce_ns=7, caller="A", responder="B", status=200, body=b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert payload == f"btresp/1\nsr25519\n7\nA\nB\n200\n{empty}".encode()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"body": b"other"}, "its signature is not that of this answer"),
        ({"nonce_ns": NONCE + 1}, "its signature is not that of this answer"),
        ({"caller": OTHER.ss58_address}, "its signature is not that of this answer"),
        ({"status": 500}, "its signature is not that of this answer"),
        ({"by": OTHER}, "signed by .* expected"),
    ],
)
def test_an_answer_to_something_else_or_of_somebody_else_does_not(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ResponseError, match=words):
        checked(signed(**changes))


@pytest.mark.parametrize("missing", [HEADER_HOTKEY, HEADER_CRYPTO, HEADER_SIGNATURE])
def test_an_answer_that_is_not_signed_is_refused(missing: str) -> None:
    headers = signed()
    del headers[missing]
    with pytest.raises(ResponseError, match="it is not signed"):
        checked(headers)


@pytest.mark.parametrize("signature", ["0x", "0xzz", "no hex", "0x" + "00" * 64, "0x" + "00" * 63, "0" * 10_000])
def test_what_is_no_signature_is_refused(signature: str) -> None:
    with pytest.raises(ResponseError, match="answer: "):
        checked({**signed(), HEADER_SIGNATURE: signature})


def test_a_name_beside_somebody_elses_signature_is_refused() -> None:
    with pytest.raises(ResponseError, match="its signature is not that of this answer"):
        checked({**signed(OTHER), HEADER_HOTKEY: MINER.ss58_address})


def test_the_scheme_is_that_of_the_chain_and_not_what_the_answer_says() -> None:
    miner = pair(2, CRYPTO_ED25519)
    headers = signed(miner)
    with pytest.raises(ResponseError, match="signed with 'ed25519', expected sr25519"):
        checked(headers, responder=miner.ss58_address)
    checked(headers, responder=miner.ss58_address, crypto_type=0)
