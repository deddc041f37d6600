"""Kept tokens in 8 bits: one scale for each token and head, of keys and of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from condense_core.pruning.records import LayerRecord, TensorRecord

STORAGES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Quantized:
    """Keys and values ``[B, G, M, D]`` as ``x = q * scale`` with ``q`` in int8 or fp8 (e4m3), ``scale [B, G, M, 1]``.

    The scale maps a token's largest magnitude to the largest number of the format; it is float32, since a row of 128
    numbers makes its four bytes 3% of them.
    """

    rows: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]

    @staticmethod
    def of(keys: Tensor, values: Tensor, storage: str) -> Quantized:
        """Quantise; ``ValueError`` for a storage that is neither int8 nor fp8."""
        if storage not in STORAGES:
            raise ValueError(f"storage is {storage!r}, expected one of {', '.join(STORAGES)}")
        dtype = STORAGES[storage]
        top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
        rows, scales = [], []
        for x in (keys.float(), values.float()):
            scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
            q = x / scale
            rows.append((q.round() if dtype == torch.int8 else q).to(dtype))
            scales.append(scale)
        return Quantized((rows[0], rows[1]), (scales[0], scales[1]))

    @property
    def storage(self) -> str:
        """``"int8"`` or ``"fp8"``."""
        return next(name for name, dtype in STORAGES.items() if dtype == self.rows[0].dtype)

    @property
    def length(self) -> int:
        """M."""
        return self.rows[0].shape[2]

    def restore(self, which: int, dtype: torch.dtype) -> Tensor:
        """Keys (0) or values (1) in ``dtype``, a new tensor."""
        return (self.rows[which].float() * self.scales[which]).to(dtype)

    def tensors(self) -> list[Tensor]:
        """What takes memory."""
        return [*self.rows, *self.scales]

    def to_record(self) -> Mapping[str, TensorRecord]:
        """Its tensors by the names that a file gives them."""
        named = zip(("keys", "values"), self.rows, self.scales, strict=True)
        return {
            f"stored_{name}{suffix}": TensorRecord(tensor)
            for name, rows, scale in named
            for suffix, tensor in (("", rows), ("_scale", scale))
        }

    @staticmethod
    def from_record(record: LayerRecord) -> Quantized:
        """What ``to_record`` put into ``record``."""
        rows, scales = (
            (record.tensor(f"stored_keys{suffix}"), record.tensor(f"stored_values{suffix}"))
            for suffix in ("", "_scale")
        )
        return Quantized(rows, scales)

    def map(self, change: Callable[[Tensor], Tensor]) -> Quantized:
        """The same with ``change`` applied to every tensor."""
        return Quantized((change(self.rows[0]), change(self.rows[1])), (change(self.scales[0]), change(self.scales[1])))
