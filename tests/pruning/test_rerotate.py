"""Rerotate: kept keys at consecutive positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb

from condense_core import ops
from condense_core.pruning.base import Method
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import (
    ChunkKV,
    Merge,
    Rerotate,
)
from condense_testing.pruning import layers
from condense_testing.pruning.wrapper_cases import (
    DTYPES,
    HEADS,
    PADDINGS,
    batch,
    check_rotation,
    chosen,
    run,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("inner", [SnapKV(keep=0.4, window=8), ChunkKV(SnapKV(keep=0.4, window=8), 7)], ids=repr)
def test_kept_keys_move_to_the_front(padding: str, heads: tuple[int, int], dtype: torch.dtype, inner: Method) -> None:
    layer = batch(padding, heads, dtype)
    _, kept, keys, values = run(Rerotate(inner), layer)
    check_rotation(layer, kept, keys, values)
    assert [len(row) for row in chosen(layer, kept)] == [
        n for n in layer.context(inner).budgets for _ in range(heads[1])
    ]
    assert (kept.cu_seqlens is None) == (padding == "none")


@pytest.mark.parametrize("padding", PADDINGS)
def test_moved_keys_are_those_of_a_text_without_the_others(padding: str) -> None:
    """The model's own rotary embedding at position j gives what Rerotate makes of the one at position p."""
    layer = batch(padding)
    _, kept, keys, _ = run(Rerotate(SnapKV(keep=0.5, window=8)), layer)
    rotary = MistralRotaryEmbedding(layer.module.config)
    for n, own in enumerate(chosen(layer, kept)):
        raw = layer.raw[n // 2, n % 2, own][None, None]
        _, expected = apply_rotary_pos_emb(raw, raw, *rotary(raw, torch.arange(len(own))[None]))
        torch.testing.assert_close(layers.rows(keys, kept)[n], expected[0, 0], rtol=2e-5, atol=1e-4)


def test_keys_of_a_pruned_cache_move_from_where_they_are() -> None:
    layer = layers.build(lengths=(30,))
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(90, generator=generator)[:30].sort().values for _ in range(2)])[None]
    method = Rerotate(SnapKV(budget=12, window=4))
    _, kept, keys, values = run(method, layer, positions=positions)
    check_rotation(layer, kept, keys, values, positions[0].tolist())
    _, kept, keys, _ = run(method, layer, positions=positions, final=False)
    assert torch.equal(keys, layer.k.gather(2, kept.indices[..., None].expand(-1, -1, -1, 8)))


@pytest.mark.parametrize("method", [Rerotate(SnapKV(keep=0.5)), Rerotate(Merge(SnapKV(keep=0.5)))], ids=repr)
def test_rows_are_copied_and_turned_in_one_pass_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    compact, turns = ops.compact, []

    def spy(*args: Any, **options: Any) -> Any:
        turns.append(options.get("rotate") is not None)
        return compact(*args, **options)

    monkeypatch.setattr(ops, "compact", spy)
    run(method, layers.build())
    assert turns == [not isinstance(method.method, Merge)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("order", ["Rerotate(Merge)", "Merge(Rerotate)"])
def test_keys_move_and_values_merge(padding: str, order: str) -> None:
    layer = batch(padding)
    base = SnapKV(keep=0.3, window=8)
    method: Method = Rerotate(Merge(base)) if order == "Rerotate(Merge)" else Merge(Rerotate(base))
    _, kept, keys, values = run(method, layer)
    check_rotation(layer, kept, keys, None)
    _, _, _, merged = run(Merge(base), layer)
    assert torch.equal(values, merged)
    assert not torch.equal(values, run(base, layer)[3])
