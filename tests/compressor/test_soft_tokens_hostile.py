"""Damaged, foreign and forged bytes in place of soft tokens: each is refused, with one clear line."""

import contextlib
import hashlib
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors_save

from condense_core import SoftTokens
from condense_core.compressor.soft_tokens import SoftTokensError

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st


def make() -> SoftTokens:
    embeds = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    return SoftTokens(embeds, 19, 4, "maker/model", context_sha256=hashlib.sha256(b"context").hexdigest())


def craft(
    *,
    metadata: dict[str, Any] | None = None,
    entry: dict[str, Any] | None = None,
    payload: bytes | None = None,
    text: dict[str, Any] | None = None,
) -> bytes:
    """A file as an attacker would write it: any field changed (None removes it), digests right all the same.

    Written without the code under test, so it is also the second description of the format.
    """
    data = bytes(range(40)) if payload is None else payload  # no float16 NaN among these
    table = {
        "format": "condense-soft-tokens",
        "format_version": "1",
        "dtype": "F16",
        "num_context_tokens": "19",
        "ratio": "4",
        "model_id": "maker/model",
        "model_revision": "",
        "method": "pool",
        "context_sha256": "",
        "payload_sha256": hashlib.sha256(data).hexdigest(),
    }
    tensor = {"dtype": "F16", "shape": [5, 4], "data_offsets": [0, len(data)]}
    table, tensor = table | (metadata or {}), tensor | (entry or {})
    table = {key: value for key, value in table.items() if value is not None}
    tensor = {key: value for key, value in tensor.items() if value is not None}
    if "metadata_sha256" not in table:
        covered = json.dumps({**table, "shape": tensor.get("shape")}, sort_keys=True, separators=(",", ":"))
        table["metadata_sha256"] = hashlib.sha256(covered.encode()).hexdigest()
    entries = {"embeds": tensor} | ({"text": text} if text else {})
    return wrap(json.dumps({"__metadata__": table, **entries}).encode(), data)


def wrap(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


def refused(data: bytes, *parts: str) -> None:
    with pytest.raises(SoftTokensError) as caught:
        SoftTokens.from_bytes(data)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for part in parts:
        assert part in message


def test_the_second_description_of_the_format_is_accepted() -> None:
    back = SoftTokens.from_bytes(craft())
    assert (len(back), back.d_model, back.num_context_tokens, back.ratio) == (5, 4, 19, 4)


# Damage


def test_truncation_at_every_offset_is_refused() -> None:
    data = make().to_bytes()
    for length in range(len(data)):
        refused(data[:length])
    refused(data + b"\0", "81 bytes of tensor data, expected 80")


def test_every_flipped_bit_is_found() -> None:
    data = bytearray(make().to_bytes())
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(SoftTokensError):
                SoftTokens.from_bytes(data)
            data[position] ^= 1 << bit
    SoftTokens.from_bytes(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
@example(b"")
@example(b"\0" * 8)
@example(b"\xff" * 16)
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)


@settings(max_examples=300, deadline=None)
@given(header=st.text(max_size=300), payload=st.binary(max_size=40))
def test_random_headers_are_refused(header: str, payload: bytes) -> None:
    refused(wrap(("{" + header).encode("utf-8", "surrogatepass"), payload))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("format", "dtype", "num_context_tokens", "ratio", "model_id", "context_sha256", "payload_sha256")


@settings(max_examples=300, deadline=None)
@given(where=st.sampled_from([*KEYS, "embeds.dtype", "embeds.shape", "embeds.data_offsets"]), value=JSON)
def test_any_json_in_any_field_is_refused_or_harmless(where: str, value: Any) -> None:
    entry, key = where.startswith("embeds."), where.removeprefix("embeds.")
    data = craft(**{"entry" if entry else "metadata": {key: value}})
    with contextlib.suppress(SoftTokensError):
        assert SoftTokens.from_bytes(data).embeds.shape == (5, 4)


# Foreign and forged files


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save(make().embeds, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_loaded(protocol: int, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "soft.safetensors"
    path.write_bytes(pickle.dumps(Payload(), protocol))
    with pytest.raises(SoftTokensError, match="pickle, which is never loaded"):
        SoftTokens.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "no bytes at all"),
        (torch_saved(), "torch.save"),
        (b'{"embeds": []}', "JSON text"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "numpy array"),
        (b"just some text, long enough for a header", "no safetensors header"),
        (safetensors_save({"embeds": torch.ones(5, 8)}), "expected one tensor 'embeds' and metadata"),
        (safetensors_save({"w": torch.ones(5, 8)}, {"format": "pt"}), "expected one tensor 'embeds'"),
        (safetensors_save({"embeds": torch.ones(5, 8)}, {"format": "pt"}), "some other safetensors file"),
        ((2**63).to_bytes(8, "little") + b"{" + bytes(100), "no safetensors header"),
        ((2**14 + 1).to_bytes(8, "little") + b"{" + bytes(2**15), "no safetensors header"),
        (wrap(b"{}"), "expected one tensor 'embeds'"),
        (wrap(b'{"a":' + b"[" * 8000), "not valid JSON"),
        (wrap(b'{"a":1' + b"0" * 9000 + b"}"), "not valid JSON"),
        (wrap(b'{"\xff": 1}'), "not valid JSON"),
        (
            wrap(craft()[8:-40].replace(b'"dtype"', b'"ratio": "5", "dtype"', 1)),
            "not valid JSON",
        ),  # a key twice
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_foreign_file_is_named(data: bytes, part: str) -> None:
    refused(data, part)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"metadata": {"format": "other"}}, "format is 'other', expected 'condense-soft-tokens'"),
        ({"metadata": {"format_version": "2"}}, "format_version is '2', expected '1'"),
        ({"metadata": {"surprise": "x"}}, "unknown: ['surprise']"),
        ({"metadata": {"ratio": None}}, "missing or unknown: ['ratio']"),
        ({"metadata": {"ratio": 4}}, "not a table of strings"),
        ({"metadata": {"ratio": "04"}}, "ratio is '04'"),
        ({"metadata": {"ratio": "0"}}, "ratio is '0'"),
        ({"metadata": {"ratio": "-4"}}, "ratio is '-4'"),
        ({"metadata": {"ratio": "4.0"}}, "ratio is 4.0"),
        ({"metadata": {"ratio": "4.50"}}, "ratio is '4.50'"),
        ({"metadata": {"ratio": "0.5"}}, "ratio is '0.5'"),
        ({"metadata": {"ratio": "1e1"}}, "ratio is '1e1'"),
        ({"metadata": {"ratio": "nan"}}, "ratio is 'nan'"),
        ({"metadata": {"ratio": "3.5"}}, "5 soft tokens, expected 6"),
        ({"metadata": {"ratio": "999999999.5"}}, "ratio is 999999999.5"),
        ({"metadata": {"ratio": "\u0664"}}, "ratio is"),  # the digit four, in Arabic
        ({"metadata": {"ratio": "9" * 5000}}, "ratio is '999"),
        ({"metadata": {"ratio": "5"}}, "5 soft tokens, expected 4"),
        ({"metadata": {"num_context_tokens": "999999999999"}}, "num_context_tokens is 999999999999"),
        ({"metadata": {"num_context_tokens": "21"}}, "5 soft tokens, expected 6"),
        ({"metadata": {"model_id": ""}}, "model_id is ''"),
        ({"metadata": {"model_id": "a\x1b[2J"}}, "model_id is 'a\\x1b[2J'"),
        ({"metadata": {"context_sha256": "beef"}}, "context_sha256 is 'beef'"),
        ({"metadata": {"payload_sha256": "\ud800"}}, "payload_sha256 is"),
        ({"metadata": {"metadata_sha256": "0" * 64}}, "metadata does not match its SHA-256"),
        ({"metadata": {"payload_sha256": "0" * 64}}, "tensor data does not match its SHA-256"),
        ({"metadata": {"dtype": "F32"}}, "dtype is 'F16' and 'F32'"),
        ({"metadata": {"dtype": "I16"}, "entry": {"dtype": "I16"}}, "dtype is 'I16'"),
        ({"entry": {"dtype": ["F16"]}}, "dtype is ['F16']"),
        ({"entry": {"shape": None}}, "entry of 'embeds' is malformed"),
        ({"entry": {"strides": [4, 1]}}, "entry of 'embeds' is malformed"),
        ({"entry": {"shape": [20]}}, "shape [20]"),
        ({"entry": {"shape": [5, 2, 2]}}, "shape [5, 2, 2]"),
        ({"entry": {"shape": [-5, -4]}}, "shape [-5, -4]"),
        ({"entry": {"shape": [5, 4.0]}}, "shape is [5, 4.0]"),
        ({"entry": {"shape": [5, True]}}, "shape is [5, True]"),
        ({"entry": {"shape": [5, 2**16 + 1]}}, "shape [5, 65537]"),
        ({"entry": {"shape": [5, 2**16]}}, "data_offsets is [0, 40], expected [0, 655360]"),
        ({"entry": {"shape": [5, 5]}}, "data_offsets is [0, 40], expected [0, 50]"),
        ({"entry": {"shape": [5, 5], "data_offsets": [0, 50]}}, "40 bytes of tensor data, expected 50"),
        ({"entry": {"data_offsets": [1, 41]}}, "data_offsets is [1, 41]"),
        ({"entry": {"data_offsets": [False, 40]}}, "data_offsets is [False, 40]"),
        (
            {
                "metadata": {"num_context_tokens": str(2**20), "ratio": "1", "dtype": "F32"},
                "entry": {"shape": [2**20, 2**16], "dtype": "F32", "data_offsets": [0, 2**38]},
            },
            "40 bytes of tensor data, expected 274,877,906,944",
        ),
    ],
    ids=str,
)
def test_a_forged_header_is_refused_before_anything_is_allocated(
    changes: dict[str, Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("memory was taken for a file that should have been refused")

    monkeypatch.setattr(torch, "frombuffer", must_not_run)
    refused(craft(**changes), part)


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00], ids=["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_refused_though_every_digest_is_right(bits: int) -> None:
    payload = bytearray(40)
    payload[16:18] = bits.to_bytes(2, "little")
    refused(craft(payload=bytes(payload)), "NaN or infinite values in 1 of 5 soft tokens (the first is 2)")


def test_size_caps(tmp_path: Path) -> None:
    data = make().to_bytes()
    assert len(SoftTokens.from_bytes(data, max_bytes=len(data))) == 5
    with pytest.raises(SoftTokensError, match="expected at most 100"):
        SoftTokens.from_bytes(data, max_bytes=100)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(SoftTokensError, match="sparse: 1,099,511,627,776 bytes, expected at most"):
        SoftTokens.load(path)


@pytest.mark.parametrize("data", [None, "text", 3, [1, 2]])
def test_only_bytes_are_read(data: Any) -> None:
    with pytest.raises(TypeError, match=r"data is a .*, expected bytes"):
        SoftTokens.from_bytes(data)


EMBEDS = {"data_offsets": [0, 40]}
TEXT_ENTRY = {"dtype": "U8", "shape": [6], "data_offsets": [40, 46]}


def test_a_crafted_file_with_text_is_read() -> None:
    back = SoftTokens.from_bytes(craft(entry=EMBEDS, text=TEXT_ENTRY, payload=bytes(range(40)) + "née !".encode()))
    assert back.text == "née !"


@pytest.mark.parametrize(
    ("changes", "payload", "part"),
    [
        ({}, b"\xff" * 6, "the text is not UTF-8"),
        ({}, b"\xed\xa0\x80abc", "the text is not UTF-8"),  # half of a surrogate pair
        ({}, b"12345", "45 bytes of tensor data, expected 46"),
        ({}, b"1234567", "47 bytes of tensor data, expected 46"),
        ({"dtype": "I8"}, b"123456", "malformed, expected dtype U8"),
        ({"more": 1}, b"123456", "malformed, expected dtype U8"),
        ({"shape": [6, 1]}, b"123456", "the shape of 'text' is [6, 1]"),
        ({"shape": [0], "data_offsets": [40, 40]}, b"", "the shape of 'text' is [0]"),
        ({"shape": [-6]}, b"123456", "the shape of 'text' is [-6]"),
        ({"shape": [True]}, b"1", "the shape of 'text' is [True]"),
        ({"shape": [2**40], "data_offsets": [40, 40 + 2**40]}, b"123456", "text has 1,099,511,627,776 bytes, expected"),
        ({"data_offsets": [34, 40]}, b"123456", "data_offsets of 'text' is [34, 40], expected [40, 46]"),
        ({"data_offsets": [40.0, 46]}, b"123456", "data_offsets of 'text'"),
    ],
)
def test_a_crafted_text_is_refused(changes: dict[str, Any], payload: bytes, part: str) -> None:
    refused(craft(entry=EMBEDS, text=TEXT_ENTRY | changes, payload=bytes(range(40)) + payload), part)


def test_a_text_that_was_changed_is_refused() -> None:
    data = replace(make(), text="a secret").to_bytes()
    refused(data[:-1] + b"T", "does not match its SHA-256")
