"""The layers of a pruned cache: what transformers' ``Cache`` holds for each attention layer.

Shapes: B sequences, G key-value heads, D head_dim. A layer has *seen* more tokens than it *holds*: queries go on at the
position after those seen, and look at those held.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from condense_core import ops
from condense_core.pruning.quantized import Quantized

GROWTH = 64
"""Tokens of room that a layer adds when new ones find none."""


class PrunedLayer(CacheLayerMixin):
    """What both kinds of layers share.

    seen: tokens that positions count, padding included. claimed: whether the forward pass that is under way reads the
    cache through this project's attention, which a session sees to.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.claimed = False

    def get_seq_length(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """B, or -1 while the layer is empty."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the layer's tensors occupy, room for growth included."""
        return sum({t.untyped_storage().data_ptr(): storage_bytes(t) for t in self.tensors()}.values())

    def tensors(self) -> list[Tensor]:
        """The tensors that hold memory."""
        raise NotImplementedError

    def rewind(self) -> None:
        """Forget what came after the prefill, or after a later pruning."""
        raise NotImplementedError

    def _check_query(self, query_length: int) -> None:
        if query_length == 0:
            raise ValueError(
                "input_ids: nothing is left of them behind the cache; expected model.generate(**cache.inputs(ids)), "
                "whose mask says that the ids are new"
            )

    def _check_batch(self, new: Tensor) -> None:
        if len(new) != self.batch_size:
            raise ValueError(
                f"past_key_values: it holds {self.batch_size} sequences, expected {len(new)}, as the model is given; "
                f"for beams or several answers cache.batch_repeat_interleave({len(new) // self.batch_size or 1})"
            )


class UniformLayer(PrunedLayer):
    """Every head of every sequence holds equally many tokens: keys and values ``[B, G, held, D]``.

    Ordinary attention functions can read it. Behind the ``num_kept`` tokens of the pruning come those seen since.

    positions: ``[B, G, num_kept]`` int32, where the kept tokens stood; None while nothing was evicted.
    uneven: whether other layers of the cache hold other numbers, so that one mask cannot serve them all.
    recent: ``[B, H, r, D]``, queries of the last tokens since the pruning, while a method evicts during generation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys: Tensor | None = None  # [B, G, capacity, D], of which the first `_length` count
        self._values: Tensor | None = None
        self._length = 0
        self._added = 0  # tokens behind those of the prefill, while nothing was evicted
        self.stored: Quantized | None = None  # the kept tokens, where they are held in 8 bits
        self.positions: Tensor | None = None
        self.num_kept: int | None = None
        self.uneven = False
        self.recent: Tensor | None = None

    # CacheLayerMixin's __init__ sets both to None; they follow from the buffers.
    @property
    def keys(self) -> Tensor | None:
        """``[B, G, held, D]``, a view (a copy if they are held in 8 bits); None while empty."""
        return self._joined(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._keys = value

    @property
    def values(self) -> Tensor | None:
        """Likewise."""
        return self._joined(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    def _joined(self, which: int) -> Tensor | None:
        buffer = (self._keys, self._values)[which]
        if buffer is None:
            return None
        tail = buffer[:, :, : self._length]
        return tail if self.stored is None else torch.cat([self.stored.restore(which, tail.dtype), tail], 2)

    @property
    def held(self) -> int:
        """Tokens that every head holds."""
        return self._length + (0 if self.stored is None else self.stored.length)

    @property
    def batch_size(self) -> int:
        return -1 if self._keys is None else self._keys.shape[0]

    @property
    def since(self) -> int:
        """Tokens seen since the prefill or, if there was one, since the last pruning."""
        return self._added if self.num_kept is None else self.held - self.num_kept

    def tensors(self) -> list[Tensor]:
        stored = [] if self.stored is None else self.stored.tensors()
        return [t for t in (self._keys, self._values, self.positions, self.recent, *stored) if t is not None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = key_states[:, :, :0], value_states[:, :, :0]
        self._length = 0
        self.is_initialized = True

    def hold(self, keys: Tensor, values: Tensor, seen: int) -> None:
        """Hold these ``[B, G, N, D]`` and nothing else; takes the tensors over, without a copy."""
        self.dtype, self.device = keys.dtype, keys.device
        self._keys, self._values, self._length, self.stored = keys, values, keys.shape[2], None
        self.seen, self._added = seen, 0
        self.is_initialized = True

    def prune(self, keys: Tensor, values: Tensor, positions: Tensor, seen: int) -> None:
        """Hold the kept tokens ``[B, G, M, D]``, which stood at ``positions [B, G, M]``."""
        self.hold(keys, values, seen)
        self.positions, self.num_kept, self.recent = positions.int(), keys.shape[2], None

    def settle(self) -> None:
        """All that is held belongs to the prefill, though it came in several passes."""
        self._added = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add ``[B, G, Q, D]`` and return all that is held, ``[B, G, held, D]``."""
        added = key_states.shape[2]
        if not self.is_initialized or (self.held == 0 and self.stored is None):
            # They come as views of a projection, token by token; attention and scores read them head by head.
            keys, values = key_states.contiguous(), value_states.contiguous()
            self.hold(keys, values, self.seen + added)
            return keys, values
        assert self._keys is not None
        assert self._values is not None
        self._check_batch(key_states)
        if self._length + added > self._keys.shape[2] or _sealed(self._keys):
            room = self._length + added + GROWTH
            self._keys, self._values = (_grown(t, self._length, room) for t in (self._keys, self._values))
        for buffer, new in ((self._keys, key_states), (self._values, value_states)):
            buffer[:, :, self._length : self._length + added] = new
        self._length += added
        self._added += added
        self.seen += added
        joined = self.keys, self.values
        assert joined[0] is not None
        assert joined[1] is not None
        return joined[0], joined[1]

    def all_positions(self) -> Tensor | None:
        """``[B, G, held]`` int64 positions of all held tokens; None where token i stands at position i."""
        if self.positions is None or self.num_kept is None:
            return None
        later = torch.arange(self.seen - self.since, self.seen, device=self.positions.device)
        return torch.cat([self.positions.long(), later.expand(*self.positions.shape[:2], -1)], -1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what the queries see, and the position at which a mask of that length begins."""
        self._check_query(query_length)
        if self.uneven and not self.claimed:
            raise ValueError(
                "past_key_values: its layers hold different numbers of tokens, which one mask cannot describe; "
                "expected the call inside `with cache.attached(model):`, or in the session that pruned it"
            )
        return self.held + query_length, self.seen - self.held

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; those that a pruning has thinned out cannot be removed."""
        count = _removed(tokens_to_remove)
        most = self.held if self.num_kept is None else self.since
        if count > most:
            raise ValueError(f"crop: {count} tokens, expected at most the {most} that came after the pruning")
        self._length -= count
        self._added = max(self._added - count, 0)
        self.seen -= count
        if self.recent is not None and count:
            self.recent = self.recent[:, :, :-count] if count < self.recent.shape[2] else None

    def remember(self, queries: Tensor, count: int) -> None:
        """Let ``recent`` be the last ``count`` queries, of which ``queries [B, H, Q, D]`` are the newest."""
        if self.recent is not None:
            queries = torch.cat([self.recent, queries], 2)
        self.recent = queries[:, :, -count:]

    def rewind(self) -> None:
        self.crop(-self.since)

    def reset(self) -> None:
        """Empty the layer."""
        self.__init__()  # type: ignore[misc]  # the state of a new layer, in the same object

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Hold the sequences ``indices``."""
        self._over_batch(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence ``repeats`` times."""
        self._over_batch(lambda t: t.repeat_interleave(repeats, 0))

    def _over_batch(self, change: Any) -> None:
        if self._keys is None or self._values is None:
            return
        self._keys, self._values = (change(t[:, :, : self._length]) for t in (self._keys, self._values))
        self.positions = None if self.positions is None else change(self.positions)
        self.recent = None if self.recent is None else change(self.recent)
        self.stored = None if self.stored is None else self.stored.map(change)

    def to(self, device: torch.device | str) -> None:
        """Move to ``device``."""
        self._over_batch(lambda t: t.to(device))
        if self._keys is not None:
            self.device = self._keys.device

    def offload(self) -> None:
        """Move to the CPU; ``prefetch`` brings it back."""
        home = self.device if self.is_initialized else None
        self.to("cpu")
        if home is not None:
            self.device = home

    def prefetch(self) -> None:
        """Back to the device from which it was offloaded."""
        if self._keys is not None and self._keys.device != self.device:
            self.to(self.device)

    def quantize(self, storage: str) -> None:
        """Hold the kept tokens as ``"int8"`` or ``"fp8"``, with a scale for every token and head."""
        keys, values = self.keys, self.values
        if keys is None or values is None or self.stored is not None:
            return
        kept = self.held - self.since
        self.stored = Quantized.of(keys[:, :, :kept], values[:, :, :kept], storage)
        self._keys, self._values = (t[:, :, kept:].clone() for t in (keys, values))
        self._length -= kept
        self.num_kept = kept
        if self.positions is None:
            everywhere = torch.arange(kept, device=keys.device, dtype=torch.int32)
            self.positions = everywhere.expand(*keys.shape[:2], -1).contiguous()


class PassingLayer(UniformLayer):
    """Shows its queries what another layer holds, and forgets what they add."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The held tokens and the new ones, ``[B, G, held + Q, D]``, in new tensors."""
        assert self._keys is not None
        assert self._values is not None
        return torch.cat([self._keys, key_states], 2), torch.cat([self._values, value_states], 2)


class RaggedLayer(PrunedLayer):
    """Heads, or sequences of a padded batch, hold different numbers of tokens: rows of all heads one after another.

    Head n = b*G + g owns the rows ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]`` of keys and values ``[T, D]``, of which
    the first ``lengths[n]`` are valid; what follows is room. Only this project's attention can read it. Offsets and
    lengths stay on the device.

    positions: ``[T_kept]`` int32, where the kept rows stood, in the order of the pruning (their offsets are
    ``kept_offsets``).
    """

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
        self.room = 0  # rows that every head has at least, behind its valid ones
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        return self.batch

    @property
    def bound(self) -> int:
        """The most valid rows that all heads can have together, known without reading the device."""
        return len(self.positions) + self.batch * self.kv_heads * self.since

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.cu_seqlens, self.lengths, self.kept_offsets, self.positions]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: a ragged layer comes to be by pruning."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new tokens as they came: ``attend`` adds them, once it knows which of them are padding."""
        self._check_claimed()
        self._check_batch(key_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of an ordinary cache: a mask says nothing about ragged rows."""
        self._check_query(query_length)
        self._check_claimed()
        return self.seen + query_length, 0

    def _check_claimed(self) -> None:
        if not self.claimed:
            raise ValueError(
                "past_key_values: its heads or sequences hold different numbers of tokens, which the model's own "
                "attention cannot read; expected the call inside `with cache.attached(model):`, or in the session that "
                "pruned it"
            )

    def attend(
        self, q: Tensor, k_new: Tensor, v_new: Tensor, real: Tensor | None, scale: float, window: int | None = None
    ) -> Tensor:
        """Add new tokens and let their queries look at all that is held, causally.

        Args:
            q: ``[B, H, Q, D]``. k_new, v_new: ``[B, G, Q, D]``.
            real: ``[B, Q]`` bool, which of the new tokens are no padding; None: all.
            scale: factor on the logits.
            window: how many of a head's rows back a query looks, its own included; None: all.

        Returns:
            ``[B, Q, H, D]``, as attention functions of transformers return it.
        """
        added = q.shape[2]
        self._make_room(added)
        self.seen += added
        self.since += added
        if added == 1 and real is None:
            ops.ragged_append(self.keys, self.values, self.cu_seqlens, self.lengths, k_new, v_new)
            self.room -= 1
            starts, lengths = self.cu_seqlens, self.lengths
            if window is not None:
                beyond = (lengths - window).clamp_min(0)
                starts, lengths = starts + torch.cat([beyond, beyond.new_zeros(1)]), lengths - beyond
            out = ops.ragged_decode_attention(
                q.squeeze(2), self.keys, self.values, starts, lengths=lengths, scale=scale
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
                if window is not None:
                    seen = seen.triu(counts[n] - window + 1)
                heads = slice(g * group, (g + 1) * group)
                out[b, heads, place] = F.scaled_dot_product_attention(
                    q[b, heads, place][None],
                    self.keys[rows][None, None].expand(-1, group, -1, -1),
                    self.values[rows][None, None].expand(-1, group, -1, -1),
                    seen,
                    scale=scale,
                )[0]
        self.lengths += chosen.sum(1).to(self.lengths).repeat_interleave(self.kv_heads)
        self.room -= added
        return out.transpose(1, 2)

    def _make_room(self, count: int) -> None:
        """See to room for ``count`` more rows in every head; nothing is read back."""
        if self.room >= count and not _sealed(self.keys):
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
        count = _removed(tokens_to_remove)
        if count > self.since:
            raise ValueError(f"crop: {count} tokens, expected at most the {self.since} that came after the pruning")
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


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of the memory behind ``tensor``, also where it is a view of a part."""
    return tensor.untyped_storage().nbytes()


def _grown(buffer: Tensor, length: int, room: int) -> Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
    grown[:, :, :length] = buffer[:, :, :length]
    return grown


def _sealed(buffer: Tensor) -> bool:
    """Whether it was made in torch's inference mode, which is over: it must be copied before it is written."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def _removed(tokens_to_remove: int) -> int:
    if tokens_to_remove > 0:
        raise ValueError(f"crop: {tokens_to_remove}, expected minus the number of tokens to remove")
    return -tokens_to_remove
