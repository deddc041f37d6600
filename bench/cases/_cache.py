"""What the scores of a cache's tokens share: one layer, batch 1, a score for every token and KV head."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.case import Case, Setting

Inputs = Callable[[int], tuple[Tensor, ...]]


def layer_bytes(s: Setting, n: int) -> int:
    """Bytes of the keys, or of the values, of one layer with n tokens."""
    return s.itemsize * s.kv_heads * n * s.head_dim


def keys(s: Setting, n: int) -> Inputs:
    """The keys, `[1, G, n, D]`."""
    return lambda seed: (s.normal(seed, 1, s.kv_heads, n, s.head_dim),)


def keys_values(s: Setting, n: int) -> Inputs:
    """Keys and values, `[1, G, n, D]` each."""
    return lambda seed: tuple(s.normal(seed + i, 1, s.kv_heads, n, s.head_dim) for i in range(2))


def queries_keys(s: Setting, n: int, *, queries: int | None = None) -> Inputs:
    """Queries `[1, H, n or queries, D]` and keys `[1, G, n, D]`."""
    return lambda seed: (
        s.normal(seed, 1, s.heads, n if queries is None else queries, s.head_dim),
        s.normal(seed + 1, 1, s.kv_heads, n, s.head_dim),
    )


def scores(name: str, s: Setting, n: int, *, bytes: int, **rest: Any) -> Case:
    """A case of an op that reads `bytes` and writes an fp32 score for every token and KV head."""
    shape = f"n {n}, {s.heads}/{s.kv_heads} heads, d {s.head_dim}"
    return Case(f"{name} n={n}", shape, bytes=bytes + 4 * s.kv_heads * n, **rest)
