"""``PrunedCache``: a transformers ``Cache`` that holds what a method kept, and knows what it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.identity import mismatch, model_digest
from condense_core.decoder.model import public_model_id
from condense_core.pruning import storage
from condense_core.pruning.base import Method
from condense_core.pruning.cache_layers import layer_from_record, mark_uneven, moved_lengths
from condense_core.pruning.combine import joined_layer, stacked_layer
from condense_core.pruning.layers import PrunedLayer, UniformLayer
from condense_core.pruning.padding import Padding, left_padded
from condense_core.pruning.prefill_inputs import check_chunk_size, checked_inputs
from condense_core.pruning.pruner import Pruner
from condense_core.pruning.records import LayerRecord
from condense_core.pruning.rotary import Rotary, rotary_from_record, rotary_record
from condense_core.pruning.rotary_check import SUPPORTED
from condense_core.pruning.session import Session


class PrunedCache(Cache):
    """The KV cache of contexts that were read once; the memory of what was evicted is free.

    It behaves as any cache of transformers does: positions go on behind the tokens seen, it grows, can be cropped to
    where it was, reordered and repeated. Layers whose heads all hold equally many tokens are read by every attention
    function. Others (AdaKV, padded batches), and layers that differ in size when more than one token is asked about
    (PyramidKV), need ``with cache.attached(model):``; without it they raise an error that says so.

    Attributes:
        model_id, model_digest: name of the model it belongs to, and the digest of its weights, which decides whether
            another one may read it; "": unknown, the names decide.
        method: what pruned it, as text.
        lengths: tokens of each context that positions count. context_tokens: tokens that the contexts had.
        full_nbytes: bytes that the contexts would take unpruned.
        rotary: of each layer how it turns its keys; None where that is not understood.
    """

    def __init__(
        self,
        layers: Sequence[PrunedLayer],
        *,
        model_id: str,
        method: str,
        lengths: Sequence[int],
        context_tokens: Sequence[int],
        full_nbytes: int,
        rotary: Sequence[Rotary] | None,
        model_digest: str = "",
    ) -> None:
        super().__init__(layers=list(layers))
        self.model_id, self.model_digest, self.method = model_id, model_digest, method
        self.lengths, self.context_tokens = tuple(lengths), tuple(context_tokens)
        self.full_nbytes = full_nbytes
        self.rotary = None if rotary is None else tuple(rotary)
        self._asked: Tensor | None = None  # [B, tokens behind the contexts], 0 for padding of earlier questions
        for layer in layers:
            layer.uncounted, layer.dropped = 0, max(self.context_tokens) - max(self.lengths)

    @staticmethod
    def prefill(
        model: PreTrainedModel,
        input_ids: Tensor | None,
        method: Method,
        *,
        attention_mask: Tensor | None = None,
        chunk_size: int | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> PrunedCache:
        """Let ``model`` read contexts once, and keep what ``method`` keeps of them.

        Args:
            model: a Llama-shaped decoder of transformers.
            input_ids: ``[B, N]`` int64, or None with inputs_embeds.
            method: such as ``SnapKV(keep=0.25)``.
            attention_mask: ``[B, N]``, 0 for padding on the left or right; None: there is none.
            chunk_size: read at most so many tokens at a time and evict behind each chunk down to the final budget, so
                that the cache never holds more than that and a chunk. Chunks are of nearly equal length. Padded batches
                are then read sequence by sequence. None: all at once. Methods that read the context again (KVzip,
                QueryAware) and Threshold evict at the end only.
            inputs_embeds: ``[B, N, d_model]``, instead of ids.

        Raises:
            TypeError, ValueError: an argument is not as described; the message names it.
        """
        if not isinstance(method, Method):
            raise TypeError(f"method is {type(method).__name__}, expected a pruning method such as SnapKV(keep=0.25)")
        embeds, mask = checked_inputs(model, input_ids, inputs_embeds, attention_mask)
        ids = None if input_ids is None else input_ids.to(embeds.device)
        check_chunk_size(chunk_size)
        padding = None if mask is None else Padding.of(mask)
        if padding is not None:
            ids = None if ids is None else left_padded(ids, padding)[0]
            embeds, mask = left_padded(embeds, padding)
            padding = Padding.of(mask)
        if chunk_size is not None and chunk_size < embeds.shape[1] and len(embeds) > 1:
            starts = padding.starts if padding else (0,) * len(embeds)
            lengths = padding.lengths if padding else (embeds.shape[1],) * len(embeds)
            each = []
            for b, (start, n) in enumerate(zip(starts, lengths, strict=True)):
                part = slice(b, b + 1), slice(start, start + n)
                own_ids, own_embeds = (None, embeds[part]) if ids is None else (ids[part], None)
                each.append(
                    PrunedCache.prefill(model, own_ids, method, chunk_size=chunk_size, inputs_embeds=own_embeds)
                )
            return PrunedCache.stacked(each)
        with torch.no_grad(), Session(model, method) as session:
            cache = Cache(layers=[UniformLayer() for _ in session.attentions])
            session.prefill(cache, embeds, None if padding is None else mask, chunk_size, ids)
        given_lengths = padding.lengths if padding else (embeds.shape[1],) * len(embeds)
        assert session.pruner is not None
        return PrunedCache.of_prefill(model, session.pruner, cache, given_lengths)

    @staticmethod
    def of_prefill(model: PreTrainedModel, pruner: Pruner, cache: Cache, lengths: Sequence[int]) -> PrunedCache:
        """What ``pruner`` has left of ``cache``, which ``model`` has filled with contexts of ``lengths`` tokens."""
        layers: list[Any] = list(cache.layers)
        return PrunedCache(
            layers,
            model_id=public_model_id(model.name_or_path),
            model_digest=model_digest(model),
            method=repr(pruner.method),
            lengths=moved_lengths(cache, lengths) if pruner.method.traits.rotates else lengths,
            context_tokens=lengths,
            full_nbytes=sum(lengths) * sum(layer.token_nbytes for layer in layers),
            rotary=pruner.rotaries,
        )

    # -- use -----------------------------------------------------------------------------------------------------------

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """What continues behind the cache: ``model.generate(**cache.inputs(question_ids))``, or ``model(**...)``.

        generate tells new ids from a repetition of the whole prompt by the mask, which must therefore count what the
        cache has seen; a model that is called itself asks the mask for no positions. That is all that this adds.

        Args:
            input_ids: ``[B, Q]`` int64, the tokens behind the context. B may be a multiple of a cache of one context
                only after ``batch_repeat_interleave``.
            attention_mask: ``[B, Q]``, 0 for padding among them. It is remembered for later turns, as long as the
                questions stay in the cache.
        """
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.shape[1] < 1:
            came = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids: got {came}, expected [B, Q] with Q >= 1")
        if len(input_ids) != len(self.lengths):
            raise ValueError(f"input_ids: {len(input_ids)} sequences, expected {len(self.lengths)}, as the cache holds")
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        if new.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {list(new.shape)}, expected {list(input_ids.shape)}")
        seen = self.get_seq_length()
        since = seen - max(self.lengths)
        column = torch.arange(seen, device=input_ids.device)
        before = torch.stack([column >= seen - since - n for n in self.lengths]).to(input_ids)
        if self._asked is not None:  # what came behind them since was generated, and is no padding
            count = min(self._asked.shape[1], since)
            before[:, seen - since : seen - since + count] = self._asked[:, :count].to(before)
        self._asked = torch.cat([before[:, seen - since :], new], 1)
        for layer in self.layers:
            layer.announced = new.shape[1]
        mask = torch.cat([before, new], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, seen:]
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self,
        }

    def attached(self, model: PreTrainedModel) -> Session:
        """``with cache.attached(model):`` the model reads this cache whatever its layers look like; none is pruned."""
        self.check_model(model)
        return Session(model, None)

    def check_model(self, model: PreTrainedModel) -> None:
        """``ValueError`` unless the cache is one of ``model``: of the same weights, whatever the model is called."""
        inner = decoder_parts(model)
        if len(self.layers) != len(inner.layers):
            raise ValueError(f"cache: it has {len(self.layers)} layers, expected {len(inner.layers)}, as the model has")
        config, layer = model.config, self.layers[0]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        came, expected = (layer.num_kv_heads, layer.keys.shape[-1]), (config.num_key_value_heads, head_dim)
        if came != expected:
            raise ValueError(
                f"cache: {came[0]} heads of {came[1]}, expected {expected[0]} of {expected[1]}, as the model has"
            )
        name = public_model_id(model.name_or_path)
        if reason := mismatch(self.model_id, self.model_digest, name, model_digest(model)):
            raise ValueError(f"cache: it was {reason}")

    def rewind(self) -> None:
        """Forget everything that came after the pruning: the next question starts from the contexts alone."""
        for layer in self.layers:
            layer.rewind()

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def is_uniform(self) -> bool:
        """Whether every head of every layer holds equally many tokens, so that no call needs ``attached``."""
        return all(isinstance(layer, UniformLayer) and not layer.uneven for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache occupies: keys, values, positions, scales, and room to grow."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Bytes of the unpruned contexts over ``nbytes``: what was achieved."""
        return self.full_nbytes / max(self.nbytes, 1)

    def __repr__(self) -> str:
        return (
            f"PrunedCache({self.method}, {sum(self.context_tokens):,} tokens, {self.nbytes:,} bytes, "
            f"{self.ratio:.2f}x smaller, of {self.model_id!r})"
        )

    # -- change --------------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> PrunedCache:
        """Move every layer to ``device``; returns the cache."""
        for layer in self.layers:
            layer.to(device)
        return self

    def quantize(self, storage: str = "int8") -> PrunedCache:
        """Hold the kept tokens in 8 bits, ``"int8"`` or ``"fp8"`` (e4m3), new ones in the model's dtype.

        ``ValueError`` for layers whose heads hold different numbers of tokens.
        """
        for layer in self.layers:
            layer.quantize(storage)
        return self

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._for_batch(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Hold the sequences ``indices``."""
        super().batch_select_indices(indices)
        self._for_batch(torch.arange(len(self.lengths))[indices.cpu()])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Hold the sequences ``beam_idx``, for beam search."""
        self.batch_select_indices(beam_idx)

    def _for_batch(self, chosen: Tensor) -> None:
        per_token = self.full_nbytes / max(sum(self.context_tokens), 1)
        self._asked = None if self._asked is None else self._asked[chosen.to(self._asked.device)]
        self.lengths = tuple(self.lengths[b] for b in chosen.tolist())
        self.context_tokens = tuple(self.context_tokens[b] for b in chosen.tolist())
        self.full_nbytes = round(per_token * sum(self.context_tokens))

    @staticmethod
    def merge(first: PrunedCache, second: PrunedCache) -> PrunedCache:
        """One cache of two contexts of one model, the second behind the first: for prompts of several documents.

        The second's keys are turned to the positions behind the first. Neither document was read in the light of the
        other; prefill the second without a token that only begins a text.

        Raises:
            ValueError: they are of different models, of more than one sequence, not uniform, or of a model whose rotary
                embedding is not understood.
        """
        foreign = mismatch(second.model_id, second.model_digest, first.model_id, first.model_digest)
        if foreign or len(first.layers) != len(second.layers):
            raise ValueError(
                f"merge: the second was {foreign or 'made by a model with other layers'}; expected two of one model"
            )
        for name, cache in (("first", first), ("second", second)):
            if not all(isinstance(layer, UniformLayer) for layer in cache.layers) or len(cache.lengths) != 1:
                raise ValueError(f"merge: {name} is ragged or of {len(cache.lengths)} sequences, expected one, uniform")
        if first.rotary is None:
            raise ValueError(
                f"merge: it is not known how {first.model_id!r} turns its keys, so that the second's cannot be moved; "
                f"supported: {SUPPORTED}"
            )
        shift = first.get_seq_length()
        layers = [
            joined_layer(a, b, shift, rotary)
            for a, b, rotary in zip(first.layers, second.layers, first.rotary, strict=True)
        ]
        merged = PrunedCache(
            layers,
            model_id=first.model_id,
            model_digest=first.model_digest,
            method=f"{first.method} + {second.method}",
            lengths=[shift + second.get_seq_length()],
            context_tokens=[first.context_tokens[0] + second.context_tokens[0]],
            full_nbytes=first.full_nbytes + second.full_nbytes,
            rotary=first.rotary,
        )
        mark_uneven(merged)
        return merged

    @staticmethod
    def stacked(caches: Sequence[PrunedCache]) -> PrunedCache:
        """Caches of one sequence each, of one model, as a batch; ragged unless all layers hold the same."""
        first = caches[0]
        stacked = PrunedCache(
            [stacked_layer([cache.layers[i] for cache in caches]) for i in range(len(first.layers))],
            model_id=first.model_id,
            model_digest=first.model_digest,
            method=first.method,
            lengths=[cache.lengths[0] for cache in caches],
            context_tokens=[cache.context_tokens[0] for cache in caches],
            full_nbytes=sum(cache.full_nbytes for cache in caches),
            rotary=first.rotary,
        )
        mark_uneven(stacked)
        return stacked

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: what the layers hold, their positions, and what the cache was made of."""
        storage.save(Path(path), *self._record())

    def serialized(self) -> tuple[int, Iterator[bytes | memoryview]]:
        """The size of the file that ``save`` writes, and its bytes, one tensor at a time, for a socket."""
        return storage.serialized(*self._record())

    def _record(self) -> tuple[dict[str, Any], list[LayerRecord], dict[str, Tensor]]:
        records = []
        for index, layer in enumerate(self.layers):
            try:
                records.append(layer.to_record())
            except ValueError as error:
                raise ValueError(f"cache: layer {index} is {error}") from None
        facts = {
            "model_id": self.model_id,
            "model_digest": self.model_digest,
            "method": self.method,
            "lengths": list(self.lengths),
            "context_tokens": list(self.context_tokens),
            "full_nbytes": self.full_nbytes,
        }
        rotary, tables = rotary_record(self.rotary)
        return facts | {"rotary": rotary, "head_dim": records[0].tensor("keys").shape[-1]}, records, tables

    @staticmethod
    def load(path: str | Path, *, device: torch.device | str = "cpu") -> PrunedCache:
        """Read what ``save`` wrote, mapped into memory; ``ValueError`` for anything else, a truncated file among it."""
        facts, records, tensors = storage.load(Path(path))
        cache = PrunedCache(
            [layer_from_record(record) for record in records],
            model_id=facts["model_id"],
            model_digest=facts.get("model_digest", ""),
            method=facts["method"],
            lengths=facts["lengths"],
            context_tokens=facts["context_tokens"],
            full_nbytes=facts["full_nbytes"],
            rotary=rotary_from_record(facts["rotary"], tensors, facts["head_dim"]),
        )
        mark_uneven(cache)
        return cache.to(device)
