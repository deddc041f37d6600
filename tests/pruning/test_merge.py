"""Merge against its definition in loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.pruning.base import Kept, Method
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import (
    AdaKV,
    Merge,
    merge,
)
from condense_testing.pruning import layers
from condense_testing.pruning.wrapper_cases import (
    DTYPES,
    HEADS,
    PADDINGS,
    TOLERANCES,
    Given,
    batch,
    chosen,
    run,
)


def merged_values(layer: Any, kept: list[list[int]], positions: list[list[int]] | None = None) -> list[Tensor]:
    """Each evicted token into its nearest kept neighbour, one after the other, in float64."""
    result = []
    for n, own in enumerate(kept):
        b, g = divmod(n, layer.k.shape[1])
        k, v = layer.k[b, g].double(), layer.v[b, g].double()
        place = positions[n] if positions else list(range(len(k)))
        own = [i for i in own if i >= 0]
        total, mass = {c: v[c].clone() for c in own}, dict.fromkeys(own, 1.0)
        for i in layer.real()[b]:
            if i not in own and own:
                c = min(own, key=lambda c: (abs(place[c] - place[i]), c))
                weight = min(1.0, math.exp(min(700.0, layer.ctx.scale * float(k[i] @ k[c] - k[c] @ k[c]))))
                total[c] += weight * v[i]
                mass[c] += weight
        result.append(torch.stack([total[c] / mass[c] for c in own]) if own else v[:0])
    return result


def check_merged(layer: Any, kept: Kept, values: Tensor, positions: list[list[int]] | None = None) -> None:
    own = chosen(layer, kept)
    for n, expected in enumerate(merged_values(layer, own, positions)):
        actual = layers.rows(values, kept)[n]
        # Values are below 8, weighted means of them no larger.
        tolerance = TOLERANCES[layer.v.dtype]
        torch.testing.assert_close(actual[: len(expected)].double(), expected, rtol=tolerance, atol=8 * 2e-6)
        assert not actual[len(expected) :].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("ragged", [False, True])
def test_evicted_values_join_their_neighbours(
    monkeypatch: pytest.MonkeyPatch, padding: str, heads: tuple[int, int], dtype: torch.dtype, ragged: bool
) -> None:
    monkeypatch.setattr(merge, "_BLOCK", 17)  # several blocks, the last one short
    layer = batch(padding, heads, dtype)
    base: Method = SnapKV(keep=0.3, window=8)
    base = AdaKV(base) if ragged else base
    _, kept, keys, values = run(Merge(base), layer)
    check_merged(layer, kept, values)
    _, plain, plain_keys, plain_values = run(base, layer)
    assert torch.equal(kept.indices, plain.indices)
    assert torch.equal(keys, plain_keys)
    assert not torch.equal(values, plain_values)


def test_two_neighbours_by_hand() -> None:
    """Columns 0 and 4 stay; 1 and 2 (equally near: the earlier) join 0; 3 and 5 join 4."""
    layer = layers.build(lengths=(6,), heads=1, kv_heads=1)
    k = torch.zeros(1, 1, 6, 8)
    k[0, 0, :, 0] = torch.tensor([1.0, 5, -1, 2, 2, 1])
    v = torch.eye(6, 8)[None, None]
    layer = replace(layer, k=k, v=v, ctx=replace(layer.ctx, scale=1.0))
    method = Merge(Given(torch.tensor([[[9.0, 0, 0, 0, 9, 0]]]), 2))
    _, _, _, values = run(method, layer)
    far = math.exp(-2)  # <k_2, k_0> - <k_0, k_0> = -2, and so for columns 5 and 4
    first = torch.tensor([1, 1, far, 0, 0, 0, 0, 0]) / (2 + far)  # column 1 would count e^4, but counts 1
    second = torch.tensor([0, 0, 0, 1, 1, far, 0, 0]) / (2 + far)
    torch.testing.assert_close(values[0, 0], torch.stack([first, second]), rtol=1e-6, atol=1e-7)


def test_nearest_goes_by_position() -> None:
    layer = layers.build(lengths=(30,))
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(400, generator=generator)[:30].sort().values for _ in range(2)])[None]
    method = Merge(SnapKV(budget=9, window=2))
    _, kept, _, values = run(method, layer, positions=positions)
    check_merged(layer, kept, values, positions[0].tolist())
    assert not torch.equal(values, run(method, layer)[3])


def test_places_without_a_token_and_empty_heads_take_part_in_nothing() -> None:
    layer = layers.build(lengths=(9,), heads=4, kv_heads=2)
    method = Merge(Given(torch.rand(1, 2, 9), 4))
    ctx = layer.context(method)
    kept = Kept(torch.tensor([[[2, 5, -1, -1], [0, 1, 7, 8]]]))
    check_merged(layer, kept, method.compact(layer.k, layer.v, kept, ctx)[1])
    kept = Kept(torch.tensor([1, 2, 6]), torch.tensor([0, 0, 3], dtype=torch.int32))
    check_merged(layer, kept, method.compact(layer.k, layer.v, kept, ctx)[1])
    kept = Kept(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0, 0], dtype=torch.int32))
    assert method.compact(layer.k, layer.v, kept, ctx)[1].shape == (0, 8)
    everything = Kept(torch.arange(9).repeat(1, 2, 1))
    assert torch.equal(method.compact(layer.k, layer.v, everything, ctx)[1], layer.v)
