"""Pruned caches in files: written as a whole or not at all, and mapped into memory when read.

``cache_format`` says what is in a file and checks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from condense_core.files.atomic import naming, regular_size, replacing
from condense_core.files.headers import canonical_json, header_length, parse_header
from condense_core.pruning.cache_format import (
    CODES,
    FORMAT,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    Entry,
    check_places,
    checked_header,
    digest,
    fail,
)
from condense_core.pruning.records import LayerRecord, TensorRecord

WHAT = "a pruned cache"
_ALIGNMENT = 64


# -- writing -----------------------------------------------------------------------------------------------------------


def save(path: Path, facts: dict[str, Any], layers: Sequence[LayerRecord], tensors: Mapping[str, Tensor]) -> None:
    """Write a cache; one tensor at a time passes through memory. Arguments and errors as of ``serialized``.

    ``OSError`` where the file cannot be written; one that stood there before is then untouched.
    """
    parts = serialized(facts, layers, tensors)[1]
    with replacing(path, WHAT) as file:
        for part in parts:
            file.write(part)


def serialized(
    facts: dict[str, Any], layers: Sequence[LayerRecord], tensors: Mapping[str, Tensor]
) -> tuple[int, Iterator[bytes | memoryview]]:
    """The size of a cache's file and its bytes, one tensor at a time.

    Args:
        facts: what the header says of the cache; ``full_nbytes`` among them, from which the ratio follows.
        layers: as their ``to_record`` described them.
        tensors: of the cache as a whole.

    Raises:
        ValueError: the cache is one that ``load`` would refuse.
    """
    parts = {name: TensorRecord(tensor) for name, tensor in tensors.items()}
    for index, layer in enumerate(layers):
        parts |= {f"{index}.{name}": part for name, part in layer.tensors.items()}
    payload = sum(part.nbytes for part in parts.values())
    # The ratio is that of the file, which has no room to grow, so that equal caches give equal files.
    facts = facts | {"ratio": round(facts["full_nbytes"] / payload, 4), "layers": [layer.facts for layer in layers]}
    # Wide types first: each tensor is then aligned to its type.
    parts = dict(sorted(parts.items(), key=lambda item: -item[1].tensor.element_size()))
    try:
        header = _header(facts, parts)
        _, table = checked_header(header, payload)
        check_places(facts, table, {name: part.tensor for name, part in parts.items()})
    except ValueError as error:
        raise ValueError(f"cache: it cannot be saved: {error}") from None
    first = len(header).to_bytes(8, "little") + header
    return len(first) + payload, chain([first], (part.to_bytes() for part in parts.values()))


def _header(facts: dict[str, Any], parts: Mapping[str, TensorRecord]) -> bytes:
    table, end = {}, 0
    for name, part in parts.items():
        if part.tensor.dtype not in CODES:
            fail(f"{name} has dtype {part.tensor.dtype}, expected one of {', '.join(map(str, CODES))}")
        offsets = [end, end + part.nbytes]
        table[name] = {"dtype": CODES[part.tensor.dtype], "shape": part.shape, "data_offsets": offsets}
        end = offsets[1]
    text = canonical_json(facts).decode()
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "cache": text, "sha256": digest(text, table)}
    header = canonical_json({"__metadata__": metadata} | table)
    return header + b" " * (-(len(header) + 8) % _ALIGNMENT)


# -- reading -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> tuple[dict[str, Any], list[LayerRecord], dict[str, Tensor]]:
    """Read what ``save`` wrote, mapped into memory: its arguments but the path.

    Changing the tensors does not change the file. The file must not be cut while they are in use, which ``save`` never
    does: it puts a new file in the place of the old one.

    Raises:
        ValueError: the file is truncated, damaged, of another format or out of bounds; the message names it.
        OSError: it cannot be read; the message names it.
    """
    try:
        with naming(f"read {WHAT} from", path):
            size = regular_size(path)
            with path.open("rb") as file:
                length = header_length(file.read(16), size, limit=MAX_HEADER_BYTES, expected=WHAT)
                file.seek(8)
                header = file.read(length)
            facts, table = checked_header(header, size - 8 - length)
            tensors = _mapped(path, header, table)
        check_places(facts, table, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    own: list[dict[str, TensorRecord]] = [{} for _ in facts["layers"]]
    for name in [name for name in tensors if "." in name]:
        index, _, what = name.partition(".")
        own[int(index)][what] = TensorRecord(tensors.pop(name))
    return facts, [LayerRecord(about, named) for about, named in zip(facts["layers"], own, strict=True)], tensors


def _mapped(path: Path, header: bytes, table: dict[str, Entry]) -> dict[str, Tensor]:
    """The tensors of a file whose header has been checked."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != parse_header(header)["__metadata__"]:
                fail("it changed while it was being read")
            return {name: file.get_tensor(name) for name in table}
    except SafetensorError as error:
        fail(str(error))
