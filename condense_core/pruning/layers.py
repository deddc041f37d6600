"""The layers of a pruned cache whose heads hold equally many tokens, and what all of its layers share.

Shapes: B sequences, G key-value heads, D head_dim. A layer has *seen* more tokens than it *holds*: queries go on at the
position after those seen, and look at those held.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from condense_core.pruning.buffers import grown, is_sealed, removed, storage_bytes, too_many
from condense_core.pruning.quantized import Quantized
from condense_core.pruning.records import LayerRecord, TensorRecord

GROWTH = 64
"""Tokens of room that a layer adds when new ones find none."""


class PrunedLayer(CacheLayerMixin):
    """What transformers' ``Cache`` holds for each attention layer; a ``UniformLayer`` or a ``RaggedLayer``.

    seen: tokens that positions count, padding included.
    in_session: whether the forward pass that is under way goes through a session's attention function.
    uncounted: tokens that the caller counts and ``seen`` does not, since the kept ones have moved together (Rerotate),
        while the session that moved them corrects positions.
    dropped: tokens that were taken out of the positions for good, in a ``PrunedCache``.
    announced: new tokens that ``PrunedCache.inputs`` has prepared.
    """

    kind: ClassVar[str]
    """What a file calls such a layer."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.in_session = False
        self.uncounted, self.dropped, self.announced = 0, 0, 0

    @torch.compiler.disable
    def get_seq_length(self) -> int:
        """Tokens seen, as the caller counts them: generate takes what stands behind them for new."""
        return self.seen + self.uncounted

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B, or -1 while the layer is empty."""

    @property
    @abstractmethod
    def num_kv_heads(self) -> int:
        """G."""

    @abstractmethod
    def to_record(self) -> LayerRecord:
        """What ``from_record`` makes the same layer of; ``ValueError`` while it is empty."""

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values in all heads, as the model made them; 0 while the layer is empty."""
        if self.keys is None or self.values is None:
            return 0
        return int(self.num_kv_heads * (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size())

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the layer's tensors occupy, room for growth included."""
        return sum({t.untyped_storage().data_ptr(): storage_bytes(t) for t in self.tensors()}.values())

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The tensors that hold memory."""

    @abstractmethod
    def rewind(self) -> None:
        """Forget what came after the prefill, or after a later pruning."""

    def _check_query(self, query_length: int) -> None:
        if query_length == 0:
            raise ValueError(
                "input_ids: nothing is left of them behind the cache; expected model.generate(**cache.inputs(ids)), "
                "whose mask says that the ids are new"
            )

        if self.uncounted and not self.in_session:
            raise ValueError(
                "past_key_values: its kept tokens have moved to the front (Rerotate), which only the session that "
                "moved them knows; expected the call in that session, or PrunedCache.prefill(...) and "
                "model.generate(**cache.inputs(ids))"
            )
        if self.dropped and query_length > max(self.dropped, self.announced):
            raise ValueError(
                f"input_ids: {query_length} of them are left behind a cache that has moved its tokens to the positions "
                f"0 to {self.seen - 1} (Rerotate), so that ids of the context would be read again; expected the new "
                "ones alone, in model.generate(**cache.inputs(ids))"
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

    kind = "uniform"

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
    def num_kv_heads(self) -> int:
        return 0 if self._keys is None else self._keys.shape[1]

    @property
    def head_shape(self) -> tuple[int, int]:
        """G and D, of a layer that is not empty."""
        assert self._keys is not None
        return self._keys.shape[1], self._keys.shape[3]

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

    def hold_kept(self, keys: Tensor, values: Tensor, positions: Tensor, seen: int) -> None:
        """Hold the kept tokens ``[B, G, M, D]``, which stood at ``positions [B, G, M]``; in 8 bits if it did before."""
        storage = None if self.stored is None else self.stored.storage
        self.hold(keys, values, seen)
        self.positions, self.num_kept, self.recent = positions.int(), keys.shape[2], None
        if storage is not None:
            self.quantize(storage)

    def end_prefill(self) -> None:
        """All that is held belongs to the prefill, though it came in several passes."""
        self._added = 0

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add ``[B, G, Q, D]`` and return all that is held, ``[B, G, held, D]``."""
        added = key_states.shape[2]
        self.announced = max(self.announced - added, 0)
        if not self.is_initialized or (self.held == 0 and self.stored is None):
            # They come as views of a projection, token by token; attention and scores read them head by head.
            keys, values = key_states.contiguous(), value_states.contiguous()
            self.hold(keys, values, self.seen + added)
            return keys, values
        assert self._keys is not None
        assert self._values is not None
        self._check_batch(key_states)
        if self._length + added > self._keys.shape[2] or is_sealed(self._keys):
            room = self._length + added + GROWTH
            self._keys, self._values = (grown(t, self._length, room) for t in (self._keys, self._values))
        for buffer, new in ((self._keys, key_states), (self._values, value_states)):
            buffer[:, :, self._length : self._length + added] = new
        self._length += added
        self._added += added
        self.seen += added
        joined = self.keys, self.values
        assert joined[0] is not None
        assert joined[1] is not None
        return joined[0], joined[1]

    def to_record(self) -> LayerRecord:
        if self._keys is None or self._values is None:
            raise ValueError(f"an empty {type(self).__name__}, expected one that was prefilled")
        tensors = {
            "keys": TensorRecord(self._keys[:, :, : self._length]),
            "values": TensorRecord(self._values[:, :, : self._length]),
        }
        if self.positions is not None:
            tensors["positions"] = TensorRecord(self.positions)
        if self.stored is not None:
            tensors |= self.stored.to_record()
        facts = {
            "kind": self.kind,
            "seen": self.seen,
            "since": self.since,
            "num_kept": self.num_kept,
            "storage": None if self.stored is None else self.stored.storage,
        }
        return LayerRecord(facts, tensors)

    @classmethod
    def from_record(cls, record: LayerRecord) -> UniformLayer:
        """The layer that ``to_record`` described."""
        layer, facts = cls(), record.facts
        layer.hold(record.tensor("keys"), record.tensor("values"), facts["seen"])
        layer.num_kept, layer._added = facts["num_kept"], facts["since"]
        if layer.num_kept is not None:
            layer.positions = record.tensor("positions")
        if facts["storage"] is not None:
            layer.stored = Quantized.from_record(record)
        return layer

    def all_positions(self) -> Tensor | None:
        """``[B, G, held]`` int64 positions of all held tokens; None where token i stands at position i."""
        if self.positions is None or self.num_kept is None:
            return None
        later = torch.arange(self.seen - self.since, self.seen, device=self.positions.device)
        return torch.cat([self.positions.long(), later.expand(*self.positions.shape[:2], -1)], -1)

    def held_positions(self) -> Tensor:
        """``[B, G, held]`` int64 positions of all held tokens, also where nothing was evicted."""
        assert self._keys is not None
        everywhere = torch.arange(self.held, device=self._keys.device).expand(*self._keys.shape[:2], -1)
        found = self.all_positions()
        return everywhere if found is None else found

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what the queries see, and the position at which a mask of that length begins."""
        self._check_query(query_length)
        if self.uneven and not self.in_session:
            raise ValueError(
                "past_key_values: its layers hold different numbers of tokens, which one mask cannot describe; "
                "expected the call inside `with cache.attached(model):`, or in the session that pruned it"
            )
        return self.held + query_length, self.seen - self.held

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; those that a pruning has thinned out cannot be removed."""
        count = removed(tokens_to_remove)
        most = self.held if self.num_kept is None else self.since
        if count > most:
            raise ValueError(too_many(count, most))
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


class ReadOnlyLayer(UniformLayer):
    """Shows its queries what another layer holds, and forgets what they add."""

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The held tokens and the new ones, ``[B, G, held + Q, D]``, in new tensors."""
        assert self._keys is not None
        assert self._values is not None
        return torch.cat([self._keys, key_states], 2), torch.cat([self._values, value_states], 2)
