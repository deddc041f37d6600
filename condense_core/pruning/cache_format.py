"""What a file of a pruned cache holds, and the checks that it does.

The header's metadata is a format, a version, one JSON text ``cache`` that says what the layers are, and a SHA-256 of
that and of the table of tensors. A file may come from strangers: its size, the header, and every shape and type in it
are checked before a tensor is touched, and offsets and positions, which kernels follow blindly, before a cache is
returned. Keys and values are not read for that: damage inside them is not found, and pages of theirs come from the disk
when a model asks for them. Nothing is ever unpickled.

Tensors of layer i, which has B sequences, G heads and head_dim D (of values: E); all dense:

    uniform   ``i.keys [B, G, n, D]``, ``i.values [B, G, n, E]``; once pruned ``i.positions [B, G, num_kept]`` int32.
              In 8 bits also the num_kept kept tokens, with n those after them: ``i.stored_keys [B, G, num_kept, D]``,
              ``i.stored_values``, and for each a ``_scale [B, G, num_kept, 1]`` float32.
    ragged    the valid rows alone: ``i.keys [T, D]``, ``i.values [T, E]``, ``i.cu_seqlens [B*G+1]`` int32, ascending
              from 0 to T; of the pruning ``i.positions [K]`` and ``i.kept_offsets [B*G+1]`` int32, likewise to K.

and, where ``rotary`` says how each layer turns its keys, tables of frequencies ``inv_freq_k [r/2]`` float32, r <= D:
the first r channels of a head are turned, in halves or interleaved. An empty table is that of a layer without RoPE.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from condense_core.files.headers import canonical_json, parse_header
from condense_core.pruning.quantized import STORAGES

FORMAT = "condense-pruned-cache"
FORMAT_VERSION = "2"
"""2 says of each layer how it turns its keys. 1, which is still read, had one table of frequencies for all layers and
did not say in which form they use it."""

MAX_HEADER_BYTES = 8 * 2**20
MAX_LAYERS = 4096
MAX_BATCH = 2**16
MAX_TOKENS = 2**31 - 1  # positions and offsets are int32
MAX_TEXT_CHARS = 2**20
"""Of the method's text, which holds a query-aware method's question."""

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
_FLOATS = ("F64", "F32", "BF16", "F16")
_STORED = {storage: CODES[dtype] for storage, dtype in STORAGES.items()}
_CACHE_KEYS = {
    *("model_id", "method", "ratio", "lengths", "context_tokens", "full_nbytes", "head_dim", "rotary", "layers")
}
_OPTIONAL_KEYS = {"model_digest"}  # which files of earlier releases lack
_LAYER_KEYS = {
    "uniform": {"kind", "seen", "since", "num_kept", "storage"},
    "ragged": {"kind", "seen", "since", "batch", "kv_heads"},
}
_ROTARY_KEYS = {"table", "factor", "interleaved"}


@dataclass(frozen=True)
class Entry:
    """A tensor in the table of a file; start, stop: bytes behind the header."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def digest(text: str, table: dict[str, Any]) -> str:
    """SHA-256 of what a header says."""
    return hashlib.sha256(canonical_json({"cache": text, "tensors": table})).hexdigest()


def fail(message: str) -> NoReturn:
    """Refuse a file."""
    raise ValueError(message)


def checked_header(header: bytes, payload: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    """What a header says of the cache, and its table of tensors, for ``payload`` bytes behind it."""
    content = parse_header(header)
    if not isinstance(content, dict):
        fail("the safetensors header is no table")
    metadata = content.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        came = metadata.get("format") if isinstance(metadata, dict) else None
        fail(f"format is {came!r:.80}, expected {FORMAT!r}: some other safetensors file")
    if metadata.get("format_version") not in ("1", FORMAT_VERSION):
        fail(f"format_version is {metadata.get('format_version')!r:.80}, expected {FORMAT_VERSION!r}")
    if set(metadata) != {"format", "format_version", "cache", "sha256"} or not isinstance(metadata["cache"], str):
        fail(f"metadata holds {str(sorted(metadata))[:120]}, expected format, format_version, cache and sha256")
    if metadata["sha256"] != digest(metadata["cache"], content):
        fail("the header does not match its SHA-256: damaged or changed after it was written")
    table = {name: _entry(name, value) for name, value in content.items()}
    end = 0
    for name, entry in sorted(table.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            fail(f"tensor {name!r:.80} begins at byte {entry.start:,}, expected {end:,}, behind the one before")
        end = entry.stop
    if end != payload:
        state = "truncated: " if payload < end else ""
        fail(f"{state}{payload:,} bytes of tensor data, expected {end:,}")
    facts = parse_header(metadata["cache"].encode())
    if metadata["format_version"] == "1":
        facts = _since_version_2(facts, table)
    _check_facts(facts)
    _check_tensors(facts, table)
    return facts, table


def _since_version_2(facts: Any, table: dict[str, Entry]) -> Any:
    """What a file of version 1 says, in the words of version 2; how its keys turn is not known from it."""
    if not isinstance(facts, dict) or facts.pop("rotary_factor", None) is None:
        fail("the description of the cache lacks rotary_factor")
    frequencies = table.pop("inv_freq", None)
    if frequencies is None:
        fail("tensor 'inv_freq' is missing")
    return facts | {"head_dim": 2 * math.prod(frequencies.shape), "rotary": None}


def check_places(facts: dict[str, Any], table: dict[str, Entry], tensors: dict[str, Tensor]) -> None:
    """The numbers that kernels follow: offsets ascend to the rows there are, positions ascend in every head."""
    for name, tensor in tensors.items():
        if name.startswith("inv_freq_") and not bool(tensor.isfinite().all()):
            fail(f"{name} has NaN or infinite values")
    for i, layer in enumerate(facts["layers"]):
        since = layer["since"]
        if layer["kind"] == "ragged":
            positions = tensors[f"{i}.positions"]
            held = _counts(f"{i}.cu_seqlens", tensors, table[f"{i}.keys"].shape[0])
            kept = _counts(f"{i}.kept_offsets", tensors, len(positions))
            grown = held - kept
            if bool(((grown < 0) | (grown > since)).any()):
                fail(
                    f"layer {i} has heads that grew by {int(grown.min())} to {int(grown.max())}, expected 0 to {since}"
                )
            firsts = tensors[f"{i}.kept_offsets"][:-1].long()
        elif layer["num_kept"] is not None:
            positions = tensors[f"{i}.positions"].flatten()
            firsts = torch.arange(0, len(positions), max(layer["num_kept"], 1), device=positions.device)
        else:
            continue
        _check_ascending(f"{i}.positions", positions, firsts, layer["seen"] - since)


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        fail(f"the entry of tensor {name!r:.80} is malformed, expected dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        fail(f"tensor {name!r:.80} has dtype {code!r:.80}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 4 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        fail(f"tensor {name!r:.80} has shape {shape!r:.80}, expected at most four sizes")
    if not isinstance(offsets, list) or [type(end) for end in offsets] != [int, int] or offsets[0] < 0:
        fail(f"tensor {name!r:.80} has data_offsets {offsets!r:.80}, expected two ints")
    size = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != size:
        fail(f"tensor {name!r:.80} has {offsets[1] - offsets[0]:,} bytes, expected {size:,} for {shape} of {code}")
    return Entry(code, tuple(shape), offsets[0], offsets[1])


def _check_facts(facts: Any) -> None:
    """Everything that is no tensor."""
    if not isinstance(facts, dict) or set(facts) - _OPTIONAL_KEYS != _CACHE_KEYS:
        names = sorted((set(facts) - _OPTIONAL_KEYS) ^ _CACHE_KEYS) if isinstance(facts, dict) else type(facts).__name__
        fail(f"the description of the cache lacks, or should not have: {str(names)[:120]}")
    for name, limit in (("model_id", 512), ("method", MAX_TEXT_CHARS)):
        text = facts[name]
        if not isinstance(text, str) or not 1 <= len(text) <= limit or not text.isprintable():
            fail(f"{name} is {text!r:.80}, expected 1 to {limit:,} printable characters")
    known = facts.get("model_digest", "")
    if not isinstance(known, str) or not re.fullmatch(r"([0-9a-f]{64})?", known):
        fail(f"model_digest is {known!r:.80}, expected 64 lower-case hex digits or nothing")
    _check_number("ratio", facts["ratio"])
    _check_int("head_dim", facts["head_dim"], 1, 2**16)
    _check_int("full_nbytes", facts["full_nbytes"], 0, 2**60)
    for name in ("lengths", "context_tokens"):
        if not isinstance(facts[name], list) or not 1 <= len(facts[name]) <= MAX_BATCH:
            fail(f"{name} is {facts[name]!r:.80}, expected a number for each of 1 to {MAX_BATCH:,} sequences")
        for value in facts[name]:
            _check_int(name, value, 0, MAX_TOKENS)
    batch = len(facts["lengths"])
    if len(facts["context_tokens"]) != batch:
        fail(f"context_tokens has {len(facts['context_tokens'])} numbers, expected {batch}, as lengths")
    layers = facts["layers"]
    if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
        fail(f"layers is {layers!r:.80}, expected a list of 1 to {MAX_LAYERS:,}")
    for i, layer in enumerate(layers):
        _check_layer(f"layer {i}", layer, batch)
        if layer["seen"] != layers[0]["seen"]:
            fail(f"layer {i} has seen {layer['seen']} tokens, expected {layers[0]['seen']}, as layer 0")
    _check_rotary(facts["rotary"], len(layers))
    if layers[0]["seen"] < max(facts["lengths"]):
        fail(
            f"the layers have seen {layers[0]['seen']} tokens, expected at least the {max(facts['lengths'])} of lengths"
        )


def _check_layer(name: str, layer: Any, batch: int) -> None:
    kind = layer.get("kind") if isinstance(layer, dict) else None
    keys = _LAYER_KEYS.get(kind) if isinstance(kind, str) else None
    if keys is None:
        fail(f"{name}: kind is {kind!r:.80}, expected one of {', '.join(_LAYER_KEYS)}")
    if set(layer) != keys:
        fail(f"{name}: it lacks, or should not have, {str(sorted(set(layer) ^ keys))[:120]}")
    _check_int(f"{name}: seen", layer["seen"], 1, MAX_TOKENS)
    _check_int(f"{name}: since", layer["since"], 0, layer["seen"])
    if kind == "ragged":
        _check_int(f"{name}: batch", layer["batch"], batch, batch)
        _check_int(f"{name}: kv_heads", layer["kv_heads"], 1, MAX_BATCH)
        return
    storage = layer["storage"]
    if storage is not None and storage not in tuple(STORAGES):
        fail(f"{name}: storage is {storage!r:.80}, expected one of {', '.join(STORAGES)}, or null")
    if layer["num_kept"] is not None:
        _check_int(f"{name}: num_kept", layer["num_kept"], 0, layer["seen"])
    elif storage is not None:
        fail(f"{name}: num_kept is null, expected a number for a layer in {storage}")


def _check_rotary(rotary: Any, num_layers: int) -> None:
    """How each layer turns its keys, or null where that is not known."""
    if rotary is None:
        return
    if not isinstance(rotary, list) or len(rotary) != num_layers:
        fail(f"rotary is {rotary!r:.80}, expected null or an entry for each of {num_layers} layers")
    for i, layer in enumerate(rotary):
        if not isinstance(layer, dict) or set(layer) != _ROTARY_KEYS or type(layer["interleaved"]) is not bool:
            fail(f"rotary of layer {i} is {layer!r:.80}, expected {', '.join(sorted(_ROTARY_KEYS))}")
        _check_int(f"rotary of layer {i}: table", layer["table"], 0, num_layers - 1)
        _check_number(f"rotary of layer {i}: factor", layer["factor"])


def _check_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        fail(f"{name} is {value!r:.80}, expected a finite number >= 0")


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        expected = f"{low:,}" if low == high else f"an int in [{low:,}, {high:,}]"
        fail(f"{name} is {value!r:.80}, expected {expected}")


def _check_tensors(facts: dict[str, Any], table: dict[str, Entry]) -> None:
    """That every layer has its tensors, that these fit each other, and that there are no others."""
    rest = dict(table)

    def take(name: str, codes: tuple[str, ...], *shape: int | None) -> tuple[int, ...]:
        """The shape of a tensor; None stands for any size."""
        entry = rest.pop(name, None)
        if entry is None:
            fail(f"tensor {name!r} is missing")
        if entry.code not in codes:
            fail(f"tensor {name!r} has dtype {entry.code}, expected {' or '.join(codes)}")
        fits = len(entry.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, entry.shape, strict=True))
        if not fits:
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            fail(f"tensor {name!r} has shape {list(entry.shape)}, expected [{expected}]")
        return entry.shape

    rotary = facts["rotary"] or []
    tables = {i: take(f"inv_freq_{i}", ("F32",), None)[0] for i in sorted({layer["table"] for layer in rotary})}
    batch = len(facts["lengths"])
    heads: int | None = None
    head_dim = facts["head_dim"]
    width: int | None = None  # of values
    code: tuple[str, ...] = _FLOATS
    for i, layer in enumerate(facts["layers"]):
        if layer["kind"] == "ragged":
            if heads not in (None, layer["kv_heads"]):
                fail(f"layer {i} has {layer['kv_heads']} heads, expected {heads}, as layer 0")
            heads = layer["kv_heads"]
            rows, _ = take(f"{i}.keys", code, None, head_dim)
            _, width = take(f"{i}.values", code, rows, width)
            take(f"{i}.cu_seqlens", ("I32",), batch * heads + 1)
            take(f"{i}.kept_offsets", ("I32",), batch * heads + 1)
            (kept,) = take(f"{i}.positions", ("I32",), None)
            if not kept <= rows <= batch * heads * layer["seen"]:
                fail(f"layer {i} has {rows} rows, expected {kept} to {batch * heads * layer['seen']}")
        else:
            _, heads, held, _ = take(f"{i}.keys", code, batch, heads, None, head_dim)
            width = take(f"{i}.values", code, batch, heads, held, width)[3]
            kept = layer["num_kept"]
            if kept is not None:
                take(f"{i}.positions", ("I32",), batch, heads, kept)
            if layer["storage"] is not None:
                for name, size in (("keys", head_dim), ("values", width)):
                    take(f"{i}.stored_{name}", (_STORED[layer["storage"]],), batch, heads, kept, size)
                    take(f"{i}.stored_{name}_scale", ("F32",), batch, heads, kept, 1)
                held += kept
            expected = layer["seen"] if kept is None else kept + layer["since"]
            if held != expected or held > layer["seen"]:
                fail(f"layer {i} holds {held} of {layer['seen']} tokens, expected {expected}")
        if rotary and (2 * tables[rotary[i]["table"]] > head_dim or head_dim % 2):
            fail(f"layer {i} turns {2 * tables[rotary[i]['table']]} channels of heads of {head_dim}")
        code = (table[f"{i}.keys"].code,)
        if table[f"{i}.values"].code not in code:
            fail(f"tensor '{i}.values' has dtype {table[f'{i}.values'].code}, expected {code[0]}, as the keys")
    if rest:
        fail(f"tensors {str(sorted(rest))[:120]} belong to no layer")


def _counts(name: str, tensors: dict[str, Tensor], num_rows: int) -> Tensor:
    """Rows of every head, by offsets that are checked."""
    offsets = tensors[name].long()
    counts = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_rows or bool((counts < 0).any()):
        fail(f"tensor {name!r} does not ascend from 0 to {num_rows}, the number of rows")
    return counts


def _check_ascending(name: str, positions: Tensor, firsts: Tensor, limit: int) -> None:
    """firsts: where the heads begin among ``positions``, which must ascend in each, from 0 at least to below limit."""
    if not len(positions):
        return
    steps = positions.long().diff(prepend=positions.new_zeros(1).long())
    steps[firsts[firsts < len(positions)]] = 1
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= limit or bool((steps < 1).any()):
        fail(f"tensor {name!r}: from {low} to {high}, expected positions that ascend in each head, in [0, {limit})")
