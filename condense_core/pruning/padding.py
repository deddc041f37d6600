"""The padding of a batch, as its mask says it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of each sequence stand among the columns of a mask.

    mask: ``[B, L]`` bool. bounds: ``[B, 2]`` int64 on its device: columns start <= i < stop are real.
    starts, lengths: the same on the host.
    """

    mask: Tensor
    bounds: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @staticmethod
    def of(mask: Tensor) -> Padding | None:
        """Of a 2-D mask; None where every token is real. Reads the device once.

        Raises:
            ValueError: a sequence has padding between its tokens.
        """
        mask = mask.bool()
        column = torch.arange(mask.shape[1], device=mask.device)
        lengths = mask.sum(1)
        start = torch.where(mask, column, mask.shape[1]).amin(1).clamp_max(mask.shape[1]) if mask.shape[1] else lengths
        stop = torch.where(mask, column + 1, 0).amax(1) if mask.shape[1] else lengths
        start = torch.minimum(start, stop)
        starts, stops, counts = (t.tolist() for t in torch.stack([start, stop, lengths]))
        for b, (first, last, count) in enumerate(zip(starts, stops, counts, strict=True)):
            if last - first != count:
                raise ValueError(
                    f"attention_mask: sequence {b} has {count} tokens between columns {first} and {last}, expected "
                    "them next to each other, with padding on the left or on the right"
                )
        if all(count == mask.shape[1] for count in counts):
            return None
        return Padding(mask, torch.stack([start, stop], 1), tuple(starts), tuple(counts))


def left_padded(embeds: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
    """The batch ``[B, N, ...]`` with all padding on the left, where later tokens do not have to step over it."""
    width = embeds.shape[1]
    column = torch.arange(width, device=embeds.device)
    shift = (width - padding.bounds[:, 1])[:, None]
    source = (column - shift) % width
    rows = torch.arange(len(embeds), device=embeds.device)[:, None]
    return embeds[rows, source], padding.mask[rows, source]
