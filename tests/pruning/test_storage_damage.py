"""Damaged, foreign and forged files are refused with one line."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from condense_core import SoftTokens
from condense_core.pruning import PrunedCache
from condense_testing.pruning.cache_files import (
    SEEN,
    D,
    contents,
    made_of,
    ragged,
    refused,
    split,
    uniform,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ctx.safetensors"


@pytest.fixture
def saved(path: Path) -> bytes:
    made_of(uniform(added=1), ragged(added=1), uniform(storage="int8", added=1)).save(path)
    return path.read_bytes()


def test_a_truncated_file_never_loads(path: Path, saved: bytes) -> None:
    header, payload = split(saved)
    start = len(saved) - len(payload)
    assert start % 64 == 0
    edges = {start + end for name, entry in header.items() if name != "__metadata__" for end in entry["data_offsets"]}
    lengths = {*range(0, start, 13), *range(10), *(edge + i for edge in edges for i in (-1, 0, 1)), len(saved) - 1}
    for length in sorted(lengths):
        if length < len(saved):
            refused(path, saved[:length])
    refused(path, saved[:-1], "truncated: ")
    refused(path, saved[: start - 1], "truncated: ")


def test_a_file_that_is_too_long_is_refused(path: Path, saved: bytes) -> None:
    refused(path, saved + b"\0", f"{len(split(saved)[1]) + 1:,} bytes of tensor data, expected")


def test_every_damaged_byte_of_the_header_is_found(path: Path, saved: bytes) -> None:
    data = bytearray(saved)
    content = len(saved[8 : len(saved) - len(split(saved)[1])].rstrip(b" "))
    for position in range(8 + content):
        data[position] ^= 1
        refused(path, bytes(data))
        data[position] ^= 1


FOREIGN = {
    "nothing": (b"", "no bytes at all"),
    "pickle": (pickle.dumps({"keys": [1.0]}), "a Python pickle, which is never loaded"),
    "torch.save": (b"PK\x03\x04" + bytes(40), "never unpickled"),
    "text": (b"The keeper of the lighthouse.", "expected a pruned cache"),
    "json": (b'{"keys": []}', "this is JSON text"),
    "huge header": ((2**62).to_bytes(8, "little") + b"{" * 100, "no safetensors header"),
    "deep": ((200_001).to_bytes(8, "little") + b"{" + b'"a":[' + b"[" * 199_995, "not valid JSON"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_bytes_are_refused(what: str, path: Path) -> None:
    data, message = FOREIGN[what]
    refused(path, data, message)


def test_other_safetensors_are_refused(path: Path) -> None:
    SoftTokens(torch.ones(5, 8), 19, 4, "maker/model").save(path)
    refused(path, path.read_bytes(), "format is 'condense-soft-tokens', expected 'condense-pruned-cache'")
    save_file({"0.keys": torch.ones(3)}, path)
    refused(path, path.read_bytes(), "format is None")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match=f"cannot read a pruned cache from {path}: it is not a regular file"):
            PrunedCache.load(path)
    with pytest.raises(FileNotFoundError, match=f"cannot read a pruned cache from {tmp_path}/none"):
        PrunedCache.load(tmp_path / "none")


def forged(
    data: bytes, change: Callable[[dict[str, Any], dict[str, Any], bytearray], Any], version: str = "2"
) -> bytes:
    """``data`` after ``change(facts, table, payload)``, as somebody would write it who knows the format.

    Written without the code under test, so it is also the second description of the header.
    """
    table, payload = split(data)
    metadata = table.pop("__metadata__")
    facts, changed = json.loads(metadata["cache"]), bytearray(payload)
    change(facts, table, changed)
    metadata["cache"], metadata["format_version"] = json.dumps(facts), version
    covered = json.dumps(
        {"cache": metadata["cache"], "tensors": table}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    metadata["sha256"] = hashlib.sha256(covered.encode()).hexdigest()
    header = json.dumps({"__metadata__": metadata, **table}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(changed)


def test_a_file_of_version_1_is_read_without_its_rotary_embedding(path: Path, saved: bytes) -> None:
    """It had one table for all layers, which says nothing of the form in which they use it."""

    def older(facts: dict[str, Any], table: dict[str, Any], payload: bytearray) -> None:
        payload += bytes(D * 2)
        table["inv_freq"] = {"dtype": "F32", "shape": [D // 2], "data_offsets": [len(payload) - D * 2, len(payload)]}
        facts["rotary_factor"] = 1.0
        del facts["rotary"], facts["head_dim"]

    bare = forged(saved, lambda facts, table, payload: facts.update(rotary=None))
    for name in ("inv_freq_0", "inv_freq_1"):
        bare = forged(bare, without(name))
    path.write_bytes(bare)
    expected = contents(PrunedCache.load(path))
    path.write_bytes(forged(bare, older, version="1"))
    cache = PrunedCache.load(path)
    assert cache.rotary is None
    assert contents(cache) == expected


def test_the_second_description_of_the_header_is_accepted(path: Path, saved: bytes) -> None:
    path.write_bytes(saved)
    expected = contents(PrunedCache.load(path))
    path.write_bytes(forged(saved, lambda facts, table, payload: None))
    assert contents(PrunedCache.load(path)) == expected


def fact(name: str, value: Any) -> Callable[..., None]:
    return lambda facts, table, payload: facts.__setitem__(name, value)


def of_layer(index: int, name: str, value: Any) -> Callable[..., None]:
    return lambda facts, table, payload: facts["layers"][index].__setitem__(name, value)


def of_rotary(index: int, name: str, value: Any) -> Callable[..., None]:
    return lambda facts, table, payload: facts["rotary"][index].__setitem__(name, value)


def of_tensor(tensor: str, name: str, value: Any) -> Callable[..., None]:
    return lambda facts, table, payload: table[tensor].__setitem__(name, value)


def number(tensor: str, place: int, value: int) -> Callable[..., None]:
    """Another int32 in a tensor's data."""

    def change(facts: Any, table: dict[str, Any], payload: bytearray) -> None:
        start = table[tensor]["data_offsets"][0] + 4 * (place % (table[tensor]["data_offsets"][1] // 4))
        if place < 0:
            start = table[tensor]["data_offsets"][1] + 4 * place
        payload[start : start + 4] = value.to_bytes(4, "little", signed=True)

    return change


def without(tensor: str) -> Callable[..., None]:
    def change(facts: Any, table: dict[str, Any], payload: bytearray) -> None:
        start, stop = table.pop(tensor)["data_offsets"]
        del payload[start:stop]
        for entry in table.values():
            entry["data_offsets"] = [end - (stop - start) * (end >= stop) for end in entry["data_offsets"]]

    return change


FORGERIES: list[tuple[str, Callable[..., None], str]] = [
    ("no model", fact("model_id", ""), "model_id is ''"),
    ("control characters", fact("method", "a\x1b[31m"), "method is"),
    ("no ratio", fact("ratio", "4"), "ratio is '4'"),
    ("infinite factor", of_rotary(1, "factor", float("inf")), "rotary of layer 1: factor is inf"),
    ("rotary of fewer layers", fact("rotary", []), "rotary is [], expected null or an entry for each of 3 layers"),
    ("unknown form", of_rotary(0, "interleaved", "both"), "rotary of layer 0 is"),
    ("no such table", of_rotary(0, "table", 2), "tensor 'inv_freq_2' is missing"),
    ("no head_dim", fact("head_dim", 0), "head_dim is 0"),
    ("too wide a table", fact("head_dim", 2), "has shape [2, 3, 8, 4], expected [2, any, any, 2]"),
    ("negative bytes", fact("full_nbytes", -1), "full_nbytes is -1"),
    ("no sequences", fact("lengths", []), "lengths is []"),
    ("fewer contexts", fact("context_tokens", [3]), "context_tokens has 1 numbers, expected 2"),
    ("other batch", lambda f, t, p: f.update(lengths=[20, 17, 1], context_tokens=[20, 17, 1]), "expected"),
    ("true", fact("lengths", [True, 17]), "lengths is True"),
    ("unknown fact", fact("colour", "red"), "colour"),
    ("no layers", fact("layers", []), "layers is []"),
    ("longer than seen", fact("lengths", [30, 17]), "have seen 21 tokens, expected at least the 30"),
    ("kind", of_layer(0, "kind", "round"), "layer 0: kind is 'round'"),
    ("kind of a list", of_layer(0, "kind", ["uniform"]), "layer 0: kind is"),
    ("unknown entry", of_layer(0, "colour", 1), "layer 0: it lacks, or should not have"),
    ("layers disagree", of_layer(1, "seen", 22), "layer 1 has seen 22 tokens, expected 21"),
    ("seen is huge", of_layer(0, "seen", 2**31), "layer 0: seen is 2147483648"),
    (
        "too short",
        lambda f, t, p: [x.update(seen=5, since=0) for x in f["layers"]],
        "layer 0: num_kept is 7, expected an int in [0, 5]",
    ),
    ("since", of_layer(0, "since", 2), "layer 0 holds 8 of 21 tokens, expected 9"),
    ("num_kept", of_layer(0, "num_kept", 8), "'0.positions' has shape [2, 3, 7], expected [2, 3, 8]"),
    ("positions of an unpruned layer", of_layer(0, "num_kept", None), "layer 0 holds 8 of 21 tokens, expected 21"),
    ("storage", of_layer(2, "storage", "int4"), "storage is 'int4'"),
    ("other storage", of_layer(2, "storage", "fp8"), "'2.stored_keys' has dtype I8, expected F8_E4M3"),
    ("no storage", of_layer(2, "storage", None), "layer 2 holds"),
    ("stored but not kept", of_layer(2, "num_kept", None), "num_kept is null"),
    ("kv_heads", of_layer(1, "kv_heads", 2), "layer 1 has 2 heads, expected 3"),
    ("batch", of_layer(1, "batch", 1), "layer 1: batch is 1, expected 2"),
    ("since of ragged", of_layer(1, "since", 0), "grew by 0 to 1, expected 0 to 0"),
    ("missing tensor", without("1.kept_offsets"), "tensor '1.kept_offsets' is missing"),
    (
        "a tensor of no layer",
        lambda f, t, p: t.update({"9.keys": {"dtype": "I8", "shape": [0], "data_offsets": [len(p), len(p)]}}),
        "tensors ['9.keys'] belong to no layer",
    ),
    ("unknown dtype", of_tensor("0.keys", "dtype", "F4"), "dtype 'F4'"),
    ("wrong dtype", of_tensor("0.positions", "dtype", "F32"), "has dtype F32, expected I32"),
    ("shape", of_tensor("0.keys", "shape", [2, 3, 4, 8]), "has shape [2, 3, 4, 8], expected [2, any, any, 4]"),
    ("other size", of_tensor("0.keys", "shape", [2, 3, 8, 5]), "bytes, expected 960"),
    ("negative size", of_tensor("0.keys", "shape", [-2, -3, 8, 4]), "expected at most four sizes"),
    ("five sizes", of_tensor("0.keys", "shape", [1, 2, 3, 8, 4]), "expected at most four sizes"),
    ("offsets", of_tensor("0.keys", "data_offsets", [0, 768]), "begins at byte"),
    ("offsets of text", of_tensor("0.keys", "data_offsets", "all"), "data_offsets 'all'"),
    ("malformed entry", lambda f, t, p: t["0.keys"].pop("shape"), "malformed"),
    ("cu_seqlens descends", number("1.cu_seqlens", 1, 60), "'1.cu_seqlens' does not ascend"),
    ("cu_seqlens begins late", number("1.cu_seqlens", 0, 1), "'1.cu_seqlens' does not ascend from 0"),
    ("cu_seqlens ends late", number("1.cu_seqlens", -1, 1000), "'1.cu_seqlens' does not ascend"),
    ("kept_offsets negative", number("1.kept_offsets", 1, -4), "'1.kept_offsets' does not ascend"),
    ("position behind the end", number("0.positions", 6, SEEN), "'0.positions': from 0 to 20"),
    ("negative position", number("0.positions", 0, -1), "'0.positions': from -1"),
    ("positions descend", number("0.positions", 3, 0), "'0.positions'"),
    ("ragged position", number("1.positions", -1, SEEN), "'1.positions'"),
    ("no frequency", number("inv_freq_0", 0, 0x7F800000), "inv_freq_0 has NaN or infinite"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in FORGERIES], ids=[row[0] for row in FORGERIES])
def test_forged_files_are_refused(change: Callable[..., None], message: str, path: Path, saved: bytes) -> None:
    refused(path, forged(saved, change), message)


def test_a_key_that_stands_twice_is_refused(path: Path, saved: bytes) -> None:
    length = int.from_bytes(saved[:8], "little")
    header = saved[8 : 8 + length].rstrip(b" ")
    twice = header[:-1] + b',"0.keys":' + json.dumps(split(saved)[0]["0.keys"]).encode() + b"}"
    refused(path, len(twice).to_bytes(8, "little") + twice + saved[8 + length :], "not valid JSON")
