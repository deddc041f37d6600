"""Layers by themselves, filled with numbers that tests can name."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.ragged import RaggedLayer

B, G, H, D = 2, 3, 6, 8
TOLERANCE = 2e-6  # fp32 sums of some ten products, relative to float64


def rows(count: int, seed: int = 0, heads: int = G, batch: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, count, D, generator=generator)
    return keys, values


def pruned_uniform(kept: int = 5, seen: int = 20) -> tuple[UniformLayer, Tensor, Tensor]:
    """A layer that kept every fourth of ``seen`` tokens."""
    layer, (keys, values) = UniformLayer(), rows(seen)
    positions = torch.arange(0, seen, seen // kept)[:kept].expand(B, G, -1)
    keys, values = keys[:, :, positions[0, 0]], values[:, :, positions[0, 0]]
    layer.hold_kept(keys, values, positions, seen)
    return layer, keys.clone(), values.clone()


def ragged(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[RaggedLayer, list[Any]]:
    """A layer, and the rows of each of its heads."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, sum(lengths), D, generator=generator).to(dtype)
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    positions = torch.cat([torch.arange(length) * 2 for length in lengths])
    layer = RaggedLayer(
        keys.clone(),
        values.clone(),
        torch.tensor(edges),
        batch=len(lengths) // G,
        kv_heads=G,
        positions=positions,
        seen=40,
    )
    layer.in_session = True
    return layer, [(keys[a:b], values[a:b]) for a, b in pairwise(edges)]
