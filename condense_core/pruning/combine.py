"""Layers made of others: those of two contexts behind one another, those of several sequences as a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from condense_core.pruning.layers import PrunedLayer, UniformLayer
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.rotary import Rotary


def joined_layer(first: UniformLayer, second: UniformLayer, shift: int, rotary: Rotary) -> UniformLayer:
    """Both layers' tokens, the second's moved by ``shift`` positions; neither is changed."""
    (keys, values), (later_keys, later_values) = _contents(first), _contents(second)
    moved = rotary.move(later_keys, torch.full((1,), shift, device=later_keys.device))
    layer = UniformLayer()
    layer.hold_kept(
        torch.cat([keys, moved], 2),
        torch.cat([values, later_values], 2),
        torch.cat([first.held_positions(), second.held_positions() + shift], 2),
        shift + second.seen,
    )
    return layer


def stacked_layer(layers: Sequence[PrunedLayer]) -> PrunedLayer:
    """Layers of one sequence each as a batch: uniform where all are and hold equally many tokens, else ragged."""
    uniform = [layer for layer in layers if isinstance(layer, UniformLayer)]
    if len(uniform) == len(layers) and len({(layer.held, layer.seen) for layer in uniform}) == 1:
        keys, values = (torch.cat(tensors) for tensors in zip(*map(_contents, uniform), strict=True))
        stacked = UniformLayer()
        if all(layer.num_kept is None for layer in uniform):
            stacked.hold(keys, values, uniform[0].seen)
        else:
            positions = torch.cat([layer.held_positions() for layer in uniform])
            stacked.hold_kept(keys, values, positions, uniform[0].seen)
        return stacked
    parts = [_rows(layer) for layer in layers]
    lengths = torch.cat([part[3] for part in parts])
    return RaggedLayer(
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts]),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0).int()]),
        batch=len(layers),
        kv_heads=layers[0].num_kv_heads,
        positions=torch.cat([part[2] for part in parts]),
        seen=max(layer.seen for layer in layers),
    )


def _contents(layer: UniformLayer) -> tuple[Tensor, Tensor]:
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    return keys, values


def _rows(layer: PrunedLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values ``[T, D]``, positions ``[T]`` and lengths ``[G]`` of one sequence's heads."""
    if isinstance(layer, RaggedLayer):
        return layer.keys, layer.values, layer.positions, layer.lengths
    assert isinstance(layer, UniformLayer)
    keys, values = _contents(layer)
    lengths = torch.full((layer.num_kv_heads,), layer.held, dtype=torch.int32, device=keys.device)
    return keys.flatten(0, 2), values.flatten(0, 2), layer.held_positions().flatten(), lengths
