"""The layers of a pruned cache whose heads or sequences hold different numbers of tokens.

Shapes: B sequences, G key-value heads, D head_dim, T rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condense_core import ops
from condense_core.pruning.buffers import is_sealed, removed, too_many
from condense_core.pruning.extras import Extras, capped_attention
from condense_core.pruning.layers import GROWTH, PrunedLayer
from condense_core.pruning.records import LayerRecord, TensorRecord


class RaggedLayer(PrunedLayer):
    """Heads, or sequences of a padded batch, hold different numbers of tokens: rows of all heads one after another.

    Head n = b*G + g owns the rows ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]`` of keys and values ``[T, D]``, of which
    the first ``lengths[n]`` are valid; what follows is room. Only this project's attention can read it. Offsets and
    lengths stay on the device.

    positions: ``[T_kept]`` int32, where the kept rows stood, in the order of the pruning (their offsets are
    ``kept_offsets``).
    """

    kind = "ragged"

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        cu_seqlens: Tensor,
        *,
        batch: int,
        kv_heads: int,
        positions: Tensor,
        seen: int,
    ) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.cu_seqlens = cu_seqlens.int()
        self.lengths = self.cu_seqlens.diff()
        self.kept_offsets = self.cu_seqlens
        self.positions = positions.int()
        self.batch, self.kv_heads = batch, kv_heads
        self.seen = seen
        self.since = 0  # tokens seen since the pruning
        self._longest: int | None = None  # at least the rows of the longest head, once they have been counted
        self.room = 0  # rows that every head has at least, behind its valid ones
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        return self.batch

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads

    @property
    def bound(self) -> int:
        """The most valid rows that all heads can have together, known without a read-back from the device."""
        return len(self.positions) + self.batch * self.kv_heads * self.since

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.cu_seqlens, self.lengths, self.kept_offsets, self.positions]

    def to_record(self) -> LayerRecord:
        offsets, rows = self._valid_rows()
        facts = {
            "kind": self.kind,
            "seen": self.seen,
            "since": self.since,
            "batch": self.batch,
            "kv_heads": self.kv_heads,
        }
        tensors = {
            "keys": TensorRecord(self.keys, rows),
            "values": TensorRecord(self.values, rows),
            "cu_seqlens": TensorRecord(offsets),
            "positions": TensorRecord(self.positions),
            "kept_offsets": TensorRecord(self.kept_offsets),
        }
        return LayerRecord(facts, tensors)

    @classmethod
    def from_record(cls, record: LayerRecord) -> RaggedLayer:
        """The layer that ``to_record`` described."""
        facts = record.facts
        layer = cls(
            record.tensor("keys"),
            record.tensor("values"),
            record.tensor("cu_seqlens"),
            batch=facts["batch"],
            kv_heads=facts["kv_heads"],
            positions=record.tensor("positions"),
            seen=facts["seen"],
        )
        layer.since, layer.kept_offsets = facts["since"], record.tensor("kept_offsets")
        return layer

    def _valid_rows(self) -> tuple[Tensor, Tensor | None]:
        """Offsets of the heads without the room between them, and the rows that then remain; None: all."""
        lengths = self.lengths
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0).int()])
        count = int(offsets[-1])
        if count == len(self.keys):
            return offsets, None
        shift = (self.cu_seqlens - offsets)[:-1].repeat_interleave(lengths, output_size=count)
        return offsets, torch.arange(count, device=lengths.device) + shift

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: a ragged layer comes to be by pruning."""

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new tokens as they came: ``attend`` adds them, once it knows which of them are padding."""
        self._check_in_session()
        self._check_batch(key_states)
        self.announced = max(self.announced - key_states.shape[2], 0)
        return key_states, value_states

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of an ordinary cache: a mask says nothing about ragged rows."""
        self._check_query(query_length)
        self._check_in_session()
        return self.seen + query_length, 0

    def _check_in_session(self) -> None:
        if not self.in_session:
            raise ValueError(
                "past_key_values: its heads or sequences hold different numbers of tokens, which the model's own "
                "attention cannot read; expected the call inside `with cache.attached(model):`, or in the session that "
                "pruned it"
            )

    def attend(
        self,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        real: Tensor | None,
        extras: Extras,
    ) -> Tensor:
        """Add new tokens and let their queries look at all that is held, causally.

        Args:
            q: ``[B, H, Q, D]``. k_new, v_new: ``[B, G, Q, D]``.
            real: ``[B, Q]`` bool, which of the new tokens are no padding; None: all.
            extras: of the layer's attention; its sliding window counts a head's rows.

        Returns:
            ``[B, Q, H, D]``, as attention functions of transformers return it.
        """
        added = q.shape[2]
        self._make_room(added)
        self.seen += added
        self.since += added
        sliding_window = extras.sliding_window
        if self._longest is not None:
            self._longest += added
        if added == 1 and real is None:
            ops.ragged_append(self.keys, self.values, self.cu_seqlens, self.lengths, k_new, v_new)
            self.room -= 1
            if not extras.is_plain:
                return self._attend_padded(q, extras)
            starts, lengths = self.cu_seqlens, self.lengths
            if sliding_window is not None:
                beyond = (lengths - sliding_window).clamp_min(0)
                starts, lengths = starts + torch.cat([beyond, beyond.new_zeros(1)]), lengths - beyond
            out = ops.ragged_decode_attention(
                q.squeeze(2), self.keys, self.values, starts, lengths=lengths, scale=extras.scale
            )
            return out.unsqueeze(1)
        # A prompt: head by head through the framework's attention, for which the lengths are read back once.
        chosen = torch.ones(self.batch, added, dtype=torch.bool) if real is None else real.cpu()
        first_rows, counts = self.cu_seqlens.tolist(), self.lengths.tolist()
        group = q.shape[1] // self.kv_heads
        out = torch.zeros_like(q)
        for b in range(self.batch):
            place = chosen[b].nonzero().flatten().to(q.device)
            if not len(place):
                continue
            for g in range(self.kv_heads):
                n = b * self.kv_heads + g
                end = first_rows[n] + counts[n]
                self.keys[end : end + len(place)] = k_new[b, g, place]
                self.values[end : end + len(place)] = v_new[b, g, place]
                rows = slice(first_rows[n], end + len(place))
                seen = torch.ones(len(place), counts[n] + len(place), dtype=torch.bool, device=q.device)
                seen = seen.tril(counts[n])
                if sliding_window is not None:
                    seen = seen.triu(counts[n] - sliding_window + 1)
                heads = slice(g * group, (g + 1) * group)
                queries = q[b, heads, place]
                if extras.is_plain:
                    out[b, heads, place] = F.scaled_dot_product_attention(
                        queries[None],
                        self.keys[rows][None, None].expand(-1, group, -1, -1),
                        self.values[rows][None, None].expand(-1, group, -1, -1),
                        seen,
                        scale=extras.scale,
                    )[0]
                else:
                    sinks = None if extras.sinks is None else extras.sinks[heads].to(q.device)[:, None, None]
                    out[b, heads, place] = capped_attention(
                        queries, self.keys[rows], self.values[rows], seen, extras, sinks
                    )
        self.lengths += chosen.sum(1).to(self.lengths).repeat_interleave(self.kv_heads)
        self.room -= added
        return out.transpose(1, 2)

    def _attend_padded(self, q: Tensor, extras: Extras) -> Tensor:
        """``attend`` for one token of every sequence, which holds it already, with a softcap or sinks.

        The decoding kernel knows neither. All heads are padded to the longest, whose length is read back once in the
        life of the layer and counted from there, so that no step waits for the device.
        """
        if self._longest is None:
            self._longest = int(self.lengths.max())
        column = torch.arange(self._longest, device=q.device)
        rows = (self.cu_seqlens[:-1, None] + column).clamp(max=len(self.keys) - 1)
        seen = column < self.lengths[:, None]
        if extras.sliding_window is not None:
            seen = seen & (column >= self.lengths[:, None] - extras.sliding_window)
        by_head = (self.batch, self.kv_heads)
        sinks = None if extras.sinks is None else extras.sinks.to(q.device).view(1, self.kv_heads, -1, 1)
        out = capped_attention(
            q.view(*by_head, -1, q.shape[3]),
            self.keys[rows].unflatten(0, by_head),
            self.values[rows].unflatten(0, by_head),
            seen.view(*by_head, 1, -1),
            extras,
            sinks,
        )
        return out.reshape(self.batch, 1, q.shape[1], -1)

    def _make_room(self, count: int) -> None:
        """See to room for ``count`` more rows in every head; nothing is read back."""
        if self.room >= count and not is_sealed(self.keys):
            return
        self._lay_out(torch.arange(len(self.lengths), device=self.lengths.device), self.bound, count + GROWTH)

    def _lay_out(self, heads: Tensor, bound: int, room: int) -> None:
        """Rows of the heads ``heads [n]``, at most ``bound`` valid ones, and ``room`` behind those of each head."""
        lengths = self.lengths[heads]
        offsets = torch.cat([lengths.new_zeros(1), (lengths + room).cumsum(0).int()])
        row = torch.arange(bound + len(heads) * room, device=lengths.device)
        owner = torch.searchsorted(offsets, row.int(), right=True).sub_(1).clamp_(max=len(heads) - 1)
        within = row - offsets[owner]
        valid = within < lengths[owner]
        source = torch.where(valid, self.cu_seqlens[heads][owner] + within, 0)
        self.keys, self.values = self.keys[source], self.values[source]
        self.cu_seqlens, self.lengths, self.room = offsets, lengths, room

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; those that a pruning has thinned out cannot be removed.

        Reads back how much room that leaves.
        """
        count = removed(tokens_to_remove)
        if count > self.since:
            raise ValueError(too_many(count, self.since))
        if not count:
            return
        kept = self.kept_offsets.diff()
        self.lengths = torch.maximum(self.lengths - count, kept) if count < self.since else kept.clone()
        self.seen -= count
        self.since -= count
        self.room = int((self.cu_seqlens.diff() - self.lengths).min())

    def rewind(self) -> None:
        self.crop(-self.since)

    def reset(self) -> None:
        """Not possible: a ragged layer cannot become empty and stay one."""
        raise ValueError("reset: a pruned ragged layer cannot be emptied; expected a new cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Hold the sequences ``indices``; reads the lengths back."""
        chosen = torch.arange(self.batch, device=self.lengths.device)[indices.to(self.lengths.device)]
        self._take(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence ``repeats`` times; reads the lengths back."""
        self._take(torch.arange(self.batch, device=self.lengths.device).repeat_interleave(repeats))

    def _take(self, sequences: Tensor) -> None:
        heads = (sequences[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=sequences.device)).flatten()
        kept, edges = self.kept_offsets.diff()[heads], self.kept_offsets.tolist()
        self.positions = torch.cat([self.positions[edges[n] : edges[n + 1]] for n in heads.tolist()])
        self._lay_out(heads, int(self.lengths[heads].sum()), self.room)
        self.kept_offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0).int()])
        self.batch = len(sequences)

    def to(self, device: torch.device | str) -> None:
        """Move to ``device``."""
        for name in ("keys", "values", "cu_seqlens", "lengths", "kept_offsets", "positions"):
            setattr(self, name, getattr(self, name).to(device))
        self.device = self.keys.device

    def offload(self) -> None:
        """Move to the CPU; ``prefetch`` brings it back."""
        home = self.device
        self.to("cpu")
        self.device = home

    def prefetch(self) -> None:
        """Back to the device from which it was offloaded."""
        if self.keys.device != self.device:
            self.to(self.device)

    def quantize(self, storage: str) -> None:
        """Not possible: new rows are written between the kept ones."""
        raise ValueError(
            f"storage: {storage!r} needs heads that hold equally many tokens; expected a method without AdaKV"
        )


def refuse_gradients(out: Tensor, query: Tensor) -> Tensor:
    """``out`` as it is; ``RuntimeError`` as soon as a gradient is to flow through it to ``query``."""
    refused: Tensor = _NoGradient.apply(out, query) if query.requires_grad else out
    return refused


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "backward: attention over heads or sequences of different lengths has no gradients; expected a method that "
            "keeps the same number in every head, without padding, such as SnapKV(keep=0.25)"
        )
