"""Headers of safetensors files that come from strangers: bounded, unambiguous, and named for what they are instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What people pass by mistake, by its first bytes. None of these can begin a file with a header within bounds.
_FOREIGN_FORMATS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes, and is never unpickled"),
    (b"\x93NUMPY", "a numpy array"),
    (b"GGUF", "a GGUF file"),
    (b"{", "JSON text"),
)


def header_length(start: bytes, num_bytes: int, *, limit: int, expected: str) -> int:
    """Bytes of the JSON header of a safetensors file of ``num_bytes`` whose first bytes, nine at least, are ``start``.

    Raises:
        ValueError: this is no safetensors file, or one with a header above ``limit`` or beyond its own end.
    """
    if not num_bytes:
        raise ValueError(f"no bytes at all, expected {expected} in safetensors format")
    length = int.from_bytes(start[:8], "little")
    if num_bytes < 8 or length < 2 or length > limit or start[8:9] != b"{":
        for prefix, what in _FOREIGN_FORMATS:
            if start.startswith(prefix):
                raise ValueError(f"this is {what}; expected {expected} in safetensors")
        if len(start) > 1 and start[0] == 0x80 and start[1] <= 5:
            raise ValueError("this is a Python pickle, which is never loaded; expected safetensors")
        raise ValueError(f"no safetensors header of 2 to {limit:,} bytes at the start; expected {expected}")
    if length > num_bytes - 8:
        raise ValueError(f"truncated: {num_bytes:,} bytes, expected at least {length + 8:,} for the header alone")
    return length


def parse_header(header: bytes) -> Any:
    """A header's JSON; ``ValueError`` where it is none, or where two readers could see two different things in it."""
    try:
        return json.loads(header.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise ValueError("the safetensors header is not valid JSON: the file is damaged or of another format") from None


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """One text for equal contents, for digests and for files that do not depend on the machine."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are unique."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result
