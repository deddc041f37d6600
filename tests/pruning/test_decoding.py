"""Decoding: when a cache shrinks while text is generated."""

from __future__ import annotations

import pytest

from condense_core.pruning.base import Method
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import (
    Decoding,
    Merge,
)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Decoding(SnapKV(keep=0.5), 100, 8), {99: None, 107: None, 108: 100, 200: 100}),
        (Decoding(SnapKV(keep=0.5), 100), {163: None, 164: 100}),
        (Decoding(SnapKV(keep=0.5), keep=0.25, interval=1), {250: None, 251: 250, 400: 250}),
        (Decoding(SnapKV(keep=0.5), keep=0.2501), {314: None, 315: 251}),
        (SnapKV(keep=0.5), {1000: None}),
    ],
    ids=repr,
)
def test_a_cache_shrinks_once_it_has_grown_enough(method: Method, expected: dict[int, int | None]) -> None:
    assert {held: method.decode_budget(held, 1000) for held in expected} == expected
    assert method.traits.decodes == isinstance(method, Decoding)
    assert method.num_kept(1000, 0, 2) == 500
    assert Merge(method).decode_budget(1000, 1000) == method.decode_budget(1000, 1000)
