"""PyramidKV and PerLayer: budgets of layers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import (
    PerLayer,
    PyramidKV,
)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 31, 32])
@pytest.mark.parametrize("num_tokens", [10, 100, 1000, 4097])
@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("beta", [1, 2, 20, 10**6])
def test_a_pyramid_keeps_what_it_was_asked_to(num_layers: int, num_tokens: int, keep: float, beta: int) -> None:
    inner = SnapKV(keep=keep, window=64)
    mean = inner.num_kept(num_tokens, 0, num_layers)
    budgets = [PyramidKV(inner, beta).num_kept(num_tokens, layer_idx, num_layers) for layer_idx in range(num_layers)]
    assert sum(budgets) == num_layers * mean
    assert budgets == sorted(budgets, reverse=True)
    assert min(budgets) >= min(mean, 64)
    assert max(budgets) <= num_tokens
    steps = [a - b for a, b in pairwise(budgets)]
    assert not steps or max(steps) - min(steps) <= 1  # linear, but for rounding
    if num_layers > 1 and beta > 1 and 64 < mean < num_tokens:
        assert budgets[0] > budgets[-1]


def test_a_pyramid_is_kvpresss_where_that_has_one() -> None:
    """n (1 - r) / beta at the end, twice the mean less that at the beginning, where this is the window or more."""
    for num_tokens, keep, beta in ((10_000, 0.2, 20), (8000, 0.25, 4), (4096, 0.125, 2)):
        mean = num_tokens * keep
        low, high = mean / beta, 2 * mean - mean / beta
        assert 64 <= low < high <= num_tokens - 64
        method = PyramidKV(SnapKV(keep=keep), beta)
        for layer_idx in range(32):
            expected = round(high - layer_idx * (high - low) / 31)
            assert method.num_kept(num_tokens, layer_idx, 32) == expected


def test_each_layer_keeps_its_share() -> None:
    method = PerLayer(SnapKV(budget=7), (0.5, 0.1, 1.0))
    assert [method.num_kept(101, layer_idx, 3) for layer_idx in range(3)] == [51, 11, 101]
    with pytest.raises(ValueError, match=r"PerLayer: shares has 3 entries, expected 4, one for each layer"):
        method.num_kept(101, 0, 4)
