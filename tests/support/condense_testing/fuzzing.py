"""Mutations of what travels: bytes and JSON that are nearly right, or wrong in a way that somebody once got through."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.0, -0.0, 1e308, 5e-324, 0.1),
    *("", " ", "\0", "\ud800", "\U0001f600" * 40, "../../etc/passwd", "http://127.0.0.1/", "{{7*7}}", "a" * 5000),
    *([], {}, [[]], {"": {}}, {"$ref": "#"}, [None] * 300),
)
"""Values that are of no expected type, or at its edge."""
_NOT_JSON = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"\xff\xfe", b"")


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """``data`` with a few bytes changed, taken out, put in, repeated, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not changed:
            break
        at = rng.randrange(len(changed))
        size = rng.choice((1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = rng.randbytes(size)
        elif kind == 3:
            changed[at:at] = changed[at : at + size]
        elif kind == 4:
            del changed[at:]
        else:
            changed[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, (2**63 - 1).to_bytes(8, "little")))
    return bytes(changed)


def mutated_json(rng: random.Random, value: Any) -> bytes:
    """JSON like ``value``, with some of it replaced, removed, added, or written as no JSON is."""
    changed = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, key = _place(rng, changed)
        if place is None:
            changed = _hostile(rng)
            break
        kind = rng.randrange(4)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[rng.choice(("", "version", "__proto__", "sealed", "x" * 300, "tier"))] = _hostile(rng)
        else:
            place[key] = _hostile(rng)
    written = json.dumps(changed, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        written = written.replace(b":", b":" + rng.choice(_NOT_JSON), 1)
    return written


def _hostile(rng: random.Random) -> Any:
    """One's own: what is put into a document is mutated further."""
    return deepcopy(rng.choice(HOSTILE))


def _place(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A container somewhere in ``value`` and a key of it; None where there is none."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else list(range(len(one))) if isinstance(one, list) else []
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return rng.choice(found) if found else (None, None)


def mutated_headers(rng: random.Random, headers: dict[str, str]) -> dict[str, str]:
    """Headers with some missing, swapped, or of hostile values; all can be sent."""
    changed = dict(headers)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(changed) or ["content-type"])
        kind = rng.randrange(5)
        if kind == 0:
            changed.pop(name, None)
        elif kind == 1:
            changed[name] = rng.choice(("", "0", "-1", "9" * 400, "0x" + "f" * 128, "nan", "a" * 3000, "%00", "\u00e9"))
        elif kind == 2:
            changed[name] = mutated_bytes(rng, changed.get(name, "x").encode()).decode("latin-1").translate(_UNSENDABLE)
        elif kind == 3:
            other = rng.choice(list(changed) or [name])
            changed[name], changed[other] = changed.get(other, ""), changed.get(name, "")
        else:
            changed[rng.choice(("content-encoding", "transfer-encoding", "expect", "host", "x-request-id"))] = (
                rng.choice(("gzip", "chunked", "100-continue", "a.b", "' OR 1=1", "x" * 100))
            )
    return changed


_UNSENDABLE = dict.fromkeys((*range(32), 127), "?")


def each(count: int, seed: int, kinds: dict[str, Callable[[random.Random], Any]]) -> Any:
    """``count`` pairs of the name of a kind and what it makes, all kinds in turn."""
    names = sorted(kinds)
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        name = names[number % len(names)]
        yield name, kinds[name](rng)
