"""Rotary position embedding as each layer of a model has it: angles of any position, keys moved to another one.

Su et al., arXiv 2104.09864. Models differ in which channels of a head they turn (all, the first r, none), in how they
pair them (halves or neighbours) and in their frequencies, some of them from layer to layer. ``rotary_check`` finds out
which of these a layer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """How one attention layer turns the D channels of its queries and keys by their position.

    The first r channels are turned in r/2 pairs: pair i by ``position * inv_freq[i]`` radians.

    Attributes:
        inv_freq: ``[r/2]`` float32, radians a position; empty where the layer has no rotary embedding.
        factor: what the model multiplies cos and sin by (YaRN), else 1.
        head_dim: D, at least r; None: r.
        interleaved: pair i is the channels 2i and 2i + 1 (Cohere, GLM); else i and i + r/2 (Llama's rotate_half).
    """

    inv_freq: Tensor
    factor: float = 1.0
    head_dim: int | None = None
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        """r."""
        return 2 * self.inv_freq.numel()

    @property
    def width(self) -> int:
        """D."""
        return self.rotary_dim if self.head_dim is None else self.head_dim

    @property
    def turns(self) -> bool:
        """Whether keys depend on their position at all."""
        return self.rotary_dim > 0

    @property
    def in_halves(self) -> bool:
        """Whether channel i is paired with i + D/2, all channels in this way, as ops assume it."""
        return self.rotary_dim == self.width and not self.interleaved

    def same_as(self, other: Rotary) -> bool:
        """Whether both turn keys alike."""
        form, others = ((r.width, r.interleaved, r.factor) for r in (self, other))
        return form == others and torch.equal(self.inv_freq.cpu(), other.inv_freq.cpu())

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of integer ``positions [...]``: two ``[..., r/2]`` float32, without ``factor``."""
        angles = positions.unsqueeze(-1).float() * self.inv_freq.to(positions.device)
        return angles.cos(), angles.sin()

    def half_table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the channels in the order of ``to_halves``: cos and sin ``[..., D]`` float32, halves alike.

        With ``factor``, as a model's own cos and sin have it; channels that are not turned have the angle 0.
        """
        rest = (0, (self.width - self.rotary_dim) // 2)
        cos, sin = (t * self.factor for t in self.table(positions))
        cos, sin = F.pad(cos, rest, value=1.0), F.pad(sin, rest)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def to_halves(self, x: Tensor) -> Tensor:
        """``x [..., D]`` with its channels in the order in which i and i + D/2 are a pair, as ops take it.

        Scores of queries and keys do not depend on the order of channels as long as it is the same in both.
        """
        return x if self.in_halves else x[..., self._order(x.device)]

    def move(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Keys ``[..., D]`` moved by ``distance [...]`` positions (negative: backwards), in float32 inside."""
        if not self.turns:
            return keys
        cos, sin = self.table(distance)
        return self._turned(keys.float(), cos, sin).to(keys.dtype)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        part, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.interleaved:
            first, second = part[..., 0::2], part[..., 1::2]
            part = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
        else:
            first, second = part.chunk(2, dim=-1)
            part = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([part, rest], -1) if rest.shape[-1] else part

    def _order(self, device: torch.device) -> Tensor:
        """``[D]``: the channel at each place of ``to_halves``."""
        turned = torch.arange(self.rotary_dim, device=device)
        first, second = (turned[0::2], turned[1::2]) if self.interleaved else turned.unflatten(0, (2, -1))
        rest = torch.arange(self.rotary_dim, self.width, device=device).unflatten(0, (2, -1))
        return torch.cat([first, rest[0], second, rest[1]])


def rotary_record(layers: Sequence[Rotary] | None) -> tuple[list[dict[str, Any]] | None, dict[str, Tensor]]:
    """What a file says of the rotary embeddings of a model's layers, and the tables of frequencies that this needs."""
    if layers is None:
        return None, {}
    facts: list[dict[str, Any]] = []
    tables: list[Tensor] = []
    for rotary in layers:
        inv_freq = rotary.inv_freq.float().cpu()
        index = next((i for i, table in enumerate(tables) if torch.equal(table, inv_freq)), len(tables))
        if index == len(tables):
            tables.append(inv_freq)
        facts.append({"table": index, "factor": rotary.factor, "interleaved": rotary.interleaved})
    return facts, {f"inv_freq_{i}": table for i, table in enumerate(tables)}


def rotary_from_record(
    facts: list[dict[str, Any]] | None, tensors: Mapping[str, Tensor], head_dim: int
) -> tuple[Rotary, ...] | None:
    """What ``rotary_record`` described, of layers with heads of ``head_dim`` channels."""
    if facts is None:
        return None
    return tuple(
        Rotary(tensors[f"inv_freq_{layer['table']}"], float(layer["factor"]), head_dim, layer["interleaved"])
        for layer in facts
    )
