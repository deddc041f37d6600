"""The padding of a batch, read from its mask once in a forward pass; and masks made of it."""

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


def visible(
    num_queries: int, num_held: int, device: torch.device, real: Tensor | None = None, sliding_window: int | None = None
) -> Tensor | None:
    """What each query may look at, ``[B or 1, 1, Q, num_held]`` bool; None where plain causality says it.

    The queries belong to the last Q of the columns. real: ``[B, num_held]`` bool, no padding. sliding_window: how
    many columns back a query looks, itself included. A query that is padding looks at itself, so that no row is empty.
    """
    narrow = sliding_window is not None and sliding_window < num_held
    if real is None and not narrow and num_queries in (1, num_held):
        return None
    column = torch.arange(num_held, device=device)
    query = column[num_held - num_queries :, None]
    seen = column <= query
    if narrow:
        assert sliding_window is not None
        seen = seen & (column > query - sliding_window)
    if real is None:
        return seen[None, None]
    return ((seen & real[:, None]) | (column == query))[:, None]


def over_held(mask: Tensor, num_held: int, num_kept: int | None) -> Tensor:
    """A mask ``[B, tokens seen]`` over the held tokens: those that a pruning kept are real, the others are its last."""
    since = num_held if num_kept is None else num_held - num_kept
    if mask.shape[1] < since:
        raise ValueError(
            f"attention_mask: it has {mask.shape[1]} columns for {since} tokens, expected one for every token seen; "
            "see PrunedCache.inputs"
        )
    later = mask[:, mask.shape[1] - since :].bool()
    return later if num_kept is None else torch.cat([later.new_ones(len(later), num_kept), later], 1)
