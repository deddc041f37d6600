"""``PrunedCache``: a transformers ``Cache`` that holds what a method kept, and knows what it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from condense_core.decoder.model import decoder_parts, public_model_id
from condense_core.pruning.base import Method
from condense_core.pruning.cache_layers import mark_uneven, moved_lengths
from condense_core.pruning.layers import PrunedLayer, UniformLayer
from condense_core.pruning.padding import Padding
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.rotary import Rotary
from condense_core.pruning.session import Session


class PrunedCache(Cache):
    """The KV cache of contexts that were read once; the memory of what was evicted is free.

    It behaves as any cache of transformers does: positions go on behind the tokens seen, it grows, can be cropped to
    where it was, reordered and repeated. Layers whose heads all hold equally many tokens are read by every attention
    function. Others (AdaKV, padded batches), and layers that differ in size when more than one token is asked about
    (PyramidKV), need ``with cache.attached(model):``; without it they raise an error that says so.

    Attributes:
        model_id: the model it belongs to. method: what pruned it, as text.
        lengths: tokens of each context that positions count. context_tokens: tokens that the contexts had.
        full_nbytes: bytes that the contexts would take unpruned.
        rotary: the model's rotary embedding.
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
        rotary: Rotary,
    ) -> None:
        super().__init__(layers=list(layers))
        self.model_id, self.method = model_id, method
        self.lengths, self.context_tokens = tuple(lengths), tuple(context_tokens)
        self.full_nbytes = full_nbytes
        self.rotary = rotary

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
        embeds, mask = _checked_inputs(model, input_ids, inputs_embeds, attention_mask)
        if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int)):
            raise TypeError(f"chunk_size is {chunk_size!r}, expected an int >= 1, or None")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, expected an int >= 1, or None")
        padding = None if mask is None else Padding.of(mask)
        if padding is not None:
            embeds, mask = _left_padded(embeds, padding)
            padding = Padding.of(mask)
        if chunk_size is not None and chunk_size < embeds.shape[1] and len(embeds) > 1:
            starts = padding.starts if padding else (0,) * len(embeds)
            lengths = padding.lengths if padding else (embeds.shape[1],) * len(embeds)
            each = [
                PrunedCache.prefill(
                    model, None, method, chunk_size=chunk_size, inputs_embeds=embeds[b : b + 1, start : start + n]
                )
                for b, (start, n) in enumerate(zip(starts, lengths, strict=True))
            ]
            return _stacked(each)
        with torch.no_grad(), Session(model, method) as session:
            cache = Cache(layers=[UniformLayer() for _ in session.attentions])
            session.prefill(cache, embeds, None if padding is None else mask, chunk_size)
        given = padding.lengths if padding else (embeds.shape[1],) * len(embeds)
        assert session.pruner is not None
        kept = moved_lengths(cache, given) if method.rotates else given
        layers: list[Any] = list(cache.layers)
        return PrunedCache(
            layers,
            model_id=public_model_id(model.name_or_path),
            method=repr(method),
            lengths=kept,
            context_tokens=given,
            full_nbytes=sum(given) * sum(_token_bytes(layer) for layer in layers),
            rotary=session.pruner.rotary,
        )

    # -- use -----------------------------------------------------------------------------------------------------------

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """What continues behind the cache: ``model.generate(**cache.inputs(question_ids))``, or ``model(**...)``.

        generate tells new ids from a repetition of the whole prompt by the mask, which must therefore count what the
        cache has seen; a model that is called itself asks the mask for no positions. That is all that this adds.

        Args:
            input_ids: ``[B, Q]`` int64, the tokens behind the context. B may be a multiple of a cache of one context
                only after ``batch_repeat_interleave``.
            attention_mask: ``[B, Q]``, 0 for padding among them. Questions that were padded count with their padding as
                long as they stay in the cache: ``rewind`` before the next ones.
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
        """``ValueError`` unless the cache is one of ``model``."""
        inner = decoder_parts(model)
        name = public_model_id(model.name_or_path)
        if self.model_id != name:
            raise ValueError(f"cache: it was made by {self.model_id!r}, expected one of {name!r}")
        if len(self.layers) != len(inner.layers):
            raise ValueError(f"cache: it has {len(self.layers)} layers, expected {len(inner.layers)}, as the model has")
        config, layer = model.config, self.layers[0]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        came, expected = (_num_heads(layer), layer.keys.shape[-1]), (config.num_key_value_heads, head_dim)
        if came != expected:
            raise ValueError(
                f"cache: {came[0]} heads of {came[1]}, expected {expected[0]} of {expected[1]}, as the model has"
            )

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
        self.lengths = tuple(self.lengths[b] for b in chosen.tolist())
        self.context_tokens = tuple(self.context_tokens[b] for b in chosen.tolist())
        self.full_nbytes = round(per_token * sum(self.context_tokens))

    @staticmethod
    def merge(first: PrunedCache, second: PrunedCache) -> PrunedCache:
        """One cache of two contexts of one model, the second behind the first: for prompts of several documents.

        The second's keys are turned to the positions behind the first. Neither document was read in the light of the
        other; prefill the second without a token that only begins a text.

        Raises:
            ValueError: they are of different models, of more than one sequence, or not uniform.
        """
        if first.model_id != second.model_id or len(first.layers) != len(second.layers):
            raise ValueError(f"merge: caches of {first.model_id!r} and {second.model_id!r}, expected two of one model")
        for name, cache in (("first", first), ("second", second)):
            if not all(isinstance(layer, UniformLayer) for layer in cache.layers) or len(cache.lengths) != 1:
                raise ValueError(f"merge: {name} is ragged or of {len(cache.lengths)} sequences, expected one, uniform")
        shift = first.get_seq_length()
        layers = [_joined(a, b, shift, first.rotary) for a, b in zip(first.layers, second.layers, strict=True)]
        merged = PrunedCache(
            layers,
            model_id=first.model_id,
            method=f"{first.method} + {second.method}",
            lengths=[shift + second.get_seq_length()],
            context_tokens=[first.context_tokens[0] + second.context_tokens[0]],
            full_nbytes=first.full_nbytes + second.full_nbytes,
            rotary=first.rotary,
        )
        mark_uneven(merged)
        return merged

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: what the layers hold, their positions, and what the cache was made of."""
        from condense_core.pruning.storage import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path, *, device: torch.device | str = "cpu") -> PrunedCache:
        """Read what ``save`` wrote, mapped into memory; ``ValueError`` for anything else, a truncated file among it."""
        from condense_core.pruning.storage import load

        return load(Path(path)).to(device)


def _checked_inputs(
    model: PreTrainedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Embeddings ``[B, N, d_model]`` and the mask ``[B, N]``, once they are as ``prefill`` describes them."""
    embedding = decoder_parts(model).embed_tokens
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids: expected either these or inputs_embeds")
    given, name, rank = (input_ids, "input_ids", 2) if input_ids is not None else (inputs_embeds, "inputs_embeds", 3)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}, expected a torch.Tensor")
    if given.dim() != rank or min(given.shape) < 1 or (rank == 3 and given.shape[2] != embedding.weight.shape[1]):
        expected = "[B, N]" if rank == 2 else f"[B, N, {embedding.weight.shape[1]}]"
        raise ValueError(f"{name} has shape {list(given.shape)}, expected {expected} with B and N >= 1")
    if rank == 2:
        if given.is_floating_point():
            raise TypeError(f"input_ids has dtype {given.dtype}, expected int64")
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= embedding.weight.shape[0]:
            raise ValueError(f"input_ids: from {low} to {high}, expected 0 to {embedding.weight.shape[0] - 1}")
        with torch.no_grad():
            given = embedding(given.to(embedding.weight.device))
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != given.shape[:2]):
        came = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: got {came}, expected {list(given.shape[:2])}")
    return given, None if mask is None else mask.to(given.device)


def _left_padded(embeds: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
    """The batch with all padding on the left, where later tokens do not have to step over it."""
    width = embeds.shape[1]
    column = torch.arange(width, device=embeds.device)
    shift = (width - padding.bounds[:, 1])[:, None]
    source = (column - shift) % width
    rows = torch.arange(len(embeds), device=embeds.device)[:, None]
    return embeds[rows, source], padding.mask[rows, source]


def _token_bytes(layer: Any) -> int:
    """Bytes of one token's keys and values in a layer, unpruned."""
    return int(_num_heads(layer) * (layer.keys.shape[-1] + layer.values.shape[-1]) * layer.keys.element_size())


def _num_heads(layer: Any) -> int:
    return int(layer.kv_heads if isinstance(layer, RaggedLayer) else layer.keys.shape[1])


def _joined(first: Any, second: Any, shift: int, rotary: Rotary) -> UniformLayer:
    keys = rotary.move(second.keys, torch.full((1,), shift, device=second.keys.device))
    places = [
        torch.arange(layer.seen, device=layer.keys.device).expand(*layer.keys.shape[:2], -1)
        if layer.all_positions() is None
        else layer.all_positions()
        for layer in (first, second)
    ]
    layer = UniformLayer()
    layer.hold_kept(
        torch.cat([first.keys, keys], 2),
        torch.cat([first.values, second.values], 2),
        torch.cat([places[0], places[1] + shift], 2),
        shift + second.seen,
    )
    return layer


def _stacked(caches: list[PrunedCache]) -> PrunedCache:
    """Caches of one sequence each as a batch; ragged unless all layers hold the same."""
    layers = [_stacked_layer([cache.layers[i] for cache in caches]) for i in range(len(caches[0].layers))]
    stacked = PrunedCache(
        layers,
        model_id=caches[0].model_id,
        method=caches[0].method,
        lengths=[cache.lengths[0] for cache in caches],
        context_tokens=[cache.context_tokens[0] for cache in caches],
        full_nbytes=sum(cache.full_nbytes for cache in caches),
        rotary=caches[0].rotary,
    )
    mark_uneven(stacked)
    return stacked


def _stacked_layer(layers: list[Any]) -> PrunedLayer:
    if all(isinstance(layer, UniformLayer) for layer in layers) and len({(x.held, x.seen) for x in layers}) == 1:
        one = UniformLayer()
        keys, values = (torch.cat([getattr(x, name) for x in layers]) for name in ("keys", "values"))
        if all(x.num_kept is None for x in layers):
            one.hold(keys, values, layers[0].seen)
        else:
            one.hold_kept(keys, values, torch.cat([_positions(x) for x in layers]), layers[0].seen)
        return one
    rows: dict[str, list[Tensor]] = {"keys": [], "values": [], "positions": [], "lengths": []}
    kv_heads = _num_heads(layers[0])
    for x in layers:
        if isinstance(x, RaggedLayer):
            rows["keys"].append(x.keys)
            rows["values"].append(x.values)
            rows["positions"].append(x.positions)
            rows["lengths"].append(x.lengths)
        else:
            rows["keys"].append(x.keys.flatten(0, 2))
            rows["values"].append(x.values.flatten(0, 2))
            rows["positions"].append(_positions(x).flatten())
            rows["lengths"].append(torch.full((kv_heads,), x.held, dtype=torch.int32, device=x.keys.device))
    lengths = torch.cat(rows["lengths"])
    return RaggedLayer(
        torch.cat(rows["keys"]),
        torch.cat(rows["values"]),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0).int()]),
        batch=len(layers),
        kv_heads=kv_heads,
        positions=torch.cat(rows["positions"]),
        seen=max(x.seen for x in layers),
    )


def _positions(layer: UniformLayer) -> Tensor:
    """``[B, G, held]``, also where nothing was evicted."""
    keys = layer.keys
    assert keys is not None
    found = layer.all_positions()
    return torch.arange(layer.held, device=keys.device).expand(*keys.shape[:2], -1) if found is None else found
