"""What a layer of a pruned cache tells of itself to be written into a file, and is made of again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorRecord:
    """A tensor to write. rows: those of its first dimension that count, gathered when it is written; None: all."""

    tensor: Tensor
    rows: Tensor | None = None

    @property
    def shape(self) -> list[int]:
        """Of what is written."""
        return list(self.tensor.shape) if self.rows is None else [len(self.rows), *self.tensor.shape[1:]]

    @property
    def nbytes(self) -> int:
        """Likewise."""
        return math.prod(self.shape) * self.tensor.element_size()

    def gathered(self) -> Tensor:
        """What is written, contiguous and on the CPU."""
        chosen = self.tensor if self.rows is None else self.tensor[self.rows]
        return chosen.detach().to("cpu").contiguous()

    def to_bytes(self) -> memoryview:
        """Its bytes, in the machine's order."""
        return self.gathered().flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class LayerRecord:
    """A layer as ``cache_format`` describes it: facts, which JSON can hold, and tensors by name."""

    facts: dict[str, Any]
    tensors: Mapping[str, TensorRecord]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor of that name."""
        return self.tensors[name].tensor
