"""Attention masks of a forward pass inside a session: each is made once and serves every layer that asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.layers import PrunedLayer, UniformLayer
from condense_core.pruning.padding import Padding


class PassMasks:
    """The masks of one forward pass, made when a layer first asks: each is read back from the device at most once."""

    def __init__(self) -> None:
        self._padding: tuple[Tensor, Padding | None] | None = None  # of which mask
        self._new_tokens: dict[int, Tensor | None] = {}
        self._visible: dict[Any, Tensor | None] = {}
        self._padded: dict[int, bool] = {}  # whether there is padding among so many of the last columns

    @property
    def known_padding(self) -> Padding | None:
        """The padding that a layer has asked for; None: there was none, or nobody asked."""
        return None if self._padding is None else self._padding[1]

    def padding(self, mask: Tensor | None) -> Padding | None:
        """Where the real tokens of ``mask [B, L]`` stand; None: everywhere."""
        if mask is None:
            return None
        if self._padding is None or self._padding[0] is not mask:
            self._padding = (mask, Padding.of(mask))
        return self._padding[1]

    def new_tokens(self, mask: Tensor | None, count: int) -> Tensor | None:
        """``[B, count]`` bool, which of the last ``count`` tokens are no padding; None: all."""
        if mask is None:
            return None
        if count not in self._new_tokens:
            real = mask[:, -count:].bool()
            self._new_tokens[count] = None if bool(real.all()) else real
        return self._new_tokens[count]

    def visible(
        self,
        layer: PrunedLayer | None,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        sliding_window: int | None,
        base: str,
    ) -> Tensor | None:
        """The mask for the model's own attention function ``base``, which lets queries see what ``layer`` holds."""
        num_queries, num_held = query.shape[2], key.shape[2]
        evicted = isinstance(layer, UniformLayer) and layer.held < layer.seen
        num_kept = layer.num_kept if isinstance(layer, UniformLayer) and evicted else None
        slot = (num_queries, num_held, num_kept, sliding_window, query.device)
        if slot not in self._visible:
            real = None if mask is None else over_held(mask, num_held, num_kept)
            if mask is not None and real is not None:
                # Layers that hold different numbers (PyramidKV) ask about the same columns: one read-back serves all.
                since = num_held if num_kept is None else num_held - num_kept
                if since not in self._padded:
                    self._padded[since] = not bool(real.all())
                real = real if self._padded[since] else None
            if base.startswith("flash"):
                self._visible[slot] = real
            else:
                seen = visible(num_queries, num_held, query.device, real, sliding_window)
                self._visible[slot] = as_base_mask(seen, base, query, num_held)
        return self._visible[slot]


def as_base_mask(seen: Tensor | None, base: str, query: Tensor, num_held: int) -> Tensor | None:
    """``visible``'s mask as ``base`` takes it; eager attention knows no causality of its own."""
    if base != "eager":
        return seen
    num_queries = query.shape[2]
    if seen is None:
        if num_queries == 1:
            return None
        everything = torch.ones(num_queries, num_held, dtype=torch.bool, device=query.device)
        seen = everything.tril(num_held - num_queries)[None, None]
    hidden = torch.finfo(query.dtype).min
    return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, hidden)


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
