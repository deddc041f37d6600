"""Requests that are nearly right: fields, values and bytes changed at random, the same for a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from random import Random
from typing import Any

_NUMBERS: tuple[Any, ...] = (0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e-300, 1e300, 3.0000001)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", " ", "\x00", "0", "null", [], {}, [[]], {"": {}}, [None] * 300),
    *("é" * 200, "\ud800", "\U0001f989" * 50, "../../etc/passwd", "http://127.0.0.1/", "'; DROP TABLE uses;--"),
    *("A" * 201, "x" * 3000, "<|im_end|>" * 200, "\u202e" * 40, "9" * 5000),
)
_BYTES = (b"", b"\x00", b"\xff\xfe", b"{", b"}" * 50, b"[" * 3000, b'"', b"NaN", b"-Infinity", b"1e999", b"\r\n\r\n")


def mutated(rng: Random, body: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]]) -> bytes:
    """A request's JSON with some of it changed.

    values: what the fields may well have, so that many requests come far.
    """
    changed = deepcopy(dict(body))  # and what is put in is a copy, too: it may be changed further
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        rng.choice(_CHANGES)(rng, changed, values)
    try:
        written = json.dumps(changed, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, OverflowError):
        written = b"{}"
    return bytes_changed(rng, written) if rng.random() < 0.2 else written


def any_value(rng: Random) -> Any:
    """A value that few fields take."""
    return deepcopy(rng.choice(_VALUES if rng.random() < 0.6 else _NUMBERS))


def _likely(rng: Random, body: dict[str, Any], values: Mapping[str, tuple[Any, ...]]) -> None:
    name = rng.choice(list(values))
    body[name] = deepcopy(rng.choice(values[name]))


def _unlikely(rng: Random, body: dict[str, Any], values: Mapping[str, tuple[Any, ...]]) -> None:
    body[rng.choice([*values, *body, "unknown", "", "__proto__"])] = any_value(rng)


def _left_out(rng: Random, body: dict[str, Any], values: Mapping[str, tuple[Any, ...]]) -> None:
    if body:
        del body[rng.choice(list(body))]


def _inside(rng: Random, body: dict[str, Any], values: Mapping[str, tuple[Any, ...]]) -> None:
    """A value within a list or a table."""
    inner = [value for value in body.values() if isinstance(value, list | dict) and value]
    if not inner:
        _unlikely(rng, body, values)
        return
    chosen: Any = rng.choice(inner)
    keys: list[Any] = list(chosen) if isinstance(chosen, dict) else list(range(len(chosen)))
    key = rng.choice(keys)
    if isinstance(chosen[key], dict) and chosen[key] and rng.random() < 0.7:
        chosen[key][rng.choice([*chosen[key], "unknown"])] = any_value(rng)
    else:
        chosen[key] = any_value(rng)


_CHANGES: tuple[Callable[[Random, dict[str, Any], Mapping[str, tuple[Any, ...]]], None], ...] = (
    *(_likely, _likely, _unlikely, _unlikely, _left_out, _inside),
)


def bytes_changed(rng: Random, written: bytes) -> bytes:
    """Cut off, with something put in, overwritten, or another thing altogether."""
    at = rng.randrange(len(written) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return written[:at]
    if kind == 1:
        return written[:at] + rng.choice(_BYTES) + written[at:]
    if kind == 2:
        return written[:at] + bytes(rng.randrange(256) for _ in range(4)) + written[at + 4 :]
    return rng.choice(_BYTES)
