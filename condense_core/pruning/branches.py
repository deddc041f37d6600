"""Many continuations of one context in one batch, which all read the context's keys and values where they lie.

A batch behind a cache usually holds the context once per sequence: ten questions about 1,550 tokens copy it ten times
and read all copies at every step. Here the batch keeps only what is its own. The attention of a query is one softmax
over two parts: the context, whose logits for all sequences are one matrix product per head, and the sequence's own
tokens. This is the shared-prefix attention of Hydragen (Juravsky et al. 2024, arXiv 2402.05099), for any cache of one
sequence, ragged ones among them, and for plain caches of several contexts of one length with equally many continuations
each.

Shapes: C contexts, B sequences (the first B / C continue the first context, and so on), H query heads, G key-value
heads, D head_dim, P tokens that a head of a context holds, T tokens of a sequence's own so far, Q of them new in this
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from condense_core.decoder.architecture import (
    check_depth,
    check_embeds,
    check_tolerance,
    decoder_parts,
    evaluating,
    hidden_behind,
    relative_error,
    unsupported,
)
from condense_core.decoder.checked import once_per_model
from condense_core.pruning.attention import BASES, PREFIX, SESSIONS, attention_of, switch, switch_back
from condense_core.pruning.extras import Extras
from condense_core.pruning.layers import PrunedLayer
from condense_core.pruning.ragged import RaggedLayer

GROWTH = 64
"""Tokens of room that a branch layer adds when new ones find none."""

_FULL = "full_attention"
_SLIDING = "sliding_attention"

Heads = tuple[Tensor, Tensor]
"""Keys and values ``[C, n, P, D]`` of n heads that hold equally many tokens."""


class WindowTooShort(ValueError):
    """A layer looks back less far than the context and what stands behind it reach."""


class BranchLayer(CacheLayerMixin):
    """The own tokens of B sequences in one layer, ``[B, G, T, D]``; of the context it knows the length."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, past: int) -> None:
        super().__init__()
        self.past, self.length = past, 0
        self._keys: Tensor  # [B, G, capacity, D], of which the first `length` count
        self._values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add ``[B, G, Q, D]``; returns all own tokens, ``[B, G, T, D]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self._keys.shape[2]:
            room = (0, 0, 0, self.length + GROWTH - start)
            self._keys, self._values = (F.pad(old[:, :, :start], room) for old in (self._keys, self._values))
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        self.length -= count

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past + self.length + query_length, 0

    @torch.compiler.disable
    def get_seq_length(self) -> int:
        return self.past + self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class Branches:
    """``with Branches(model, context):`` the model continues ``context`` in batches; nothing is added to the context.

    >>> with Branches(model, cache) as branches:
    ...     model.generate(**branches.inputs(ids, mask), max_new_tokens=48)
    """

    def __init__(self, model: PreTrainedModel, context: Cache | None, *, checked: bool = True) -> None:
        """Of what ``context`` holds now.

        Args:
            model: a decoder that sessions work with, attention ``sdpa``, ``eager`` or a flash attention.
            context: a cache of one sequence, ``PrunedCache`` or ``DynamicCache``, or a ``DynamicCache`` of several
                without padding; None: there is no context.
            checked: compare at the first use of a model what it computes so with what it computes alone.

        Raises:
            TypeError: the model computes its attention in another way, or has layers of another kind.
            ValueError: its attention function is none of the above, or ``context`` is of another kind.
        """
        self.inner: Any = decoder_parts(model)
        self.model, self.config = model, model.config
        attentions = [attention_of(layer) for layer in self.inner.layers]
        if str(self.config._attn_implementation).removeprefix(PREFIX) not in BASES:
            raise ValueError(
                f"model: attention {self.config._attn_implementation!r}, expected one of {', '.join(BASES)}"
            )
        if checked:
            _check(model)
        self.past = 0 if context is None else int(context.get_seq_length())
        layers = context.layers if context is not None and self.past else ()
        self._contexts = [_heads(layer) for layer in layers] or [[] for _ in attentions]
        self.num_contexts = next((len(heads[0][0]) for heads in self._contexts if heads), 1)
        self._visible: tuple[Any, Tensor] | None = None

    def __enter__(self) -> Branches:
        switch(self.model)
        SESSIONS.set((*SESSIONS.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        SESSIONS.set(tuple(session for session in SESSIONS.get() if session is not self))
        switch_back(self.model)

    def inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """What continues behind the context, for ``model.generate(**inputs)`` or ``model(**inputs)``.

        Args:
            input_ids: ``[B, Q]`` int64, Q >= 1; B is a multiple of the number of contexts, whose continuations stand
                together.
            attention_mask: ``[B, Q]``, 0 for padding on the left.
        """
        if len(attention_mask) % self.num_contexts:
            raise ValueError(f"input_ids: {len(attention_mask)} rows, expected a multiple of {self.num_contexts}")
        before = attention_mask.new_ones(len(input_ids), self.past)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.cat([before, attention_mask], 1),
            "position_ids": self.past + (attention_mask.cumsum(1) - 1).clamp_min(0),
            "past_key_values": Cache(layers=[BranchLayer(self.past) for _ in self._contexts]),
        }

    def attend(
        self, module: nn.Module, base: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query [B, H, Q, D]`` over the context and ``key, value [B, G, T, D]``; see ``OpenSession``."""
        extras = Extras.of(module, kwargs)
        batch, num_heads, num_new, dim = query.shape
        groups, own = key.shape[1], key.shape[2]
        if extras.sliding_window is not None and self.past + own > extras.sliding_window:
            raise WindowTooShort(
                f"attention: a window of {extras.sliding_window} tokens, which do not hold the context of {self.past} "
                f"and the {own} behind it; expected fewer, or one sequence at a time"
            )
        share, contexts = num_heads // groups, self.num_contexts
        rows = query.reshape(batch, groups, share * num_new, dim)
        logits = (rows @ key.mT).unflatten(0, (contexts, -1))  # [C, B / C, G, share * Q, T]
        seen = self._seen(mask, batch, num_new, own, query.device).repeat(1, 1, share, 1).unflatten(0, (contexts, -1))
        nothing = key.new_zeros(contexts, groups, 0, dim)
        out = torch.empty_like(rows)
        first = 0
        for keys, values in self._contexts[int(module.layer_idx)] or [(nothing, nothing)]:  # type: ignore[arg-type]
            count, held = keys.shape[1:3]
            heads = slice(first, first + count)
            first += count
            flat = _together(rows[:, heads].unflatten(0, (contexts, -1)))
            shared = _apart(flat @ keys.mT, batch // contexts)  # [C, B / C, n, share * Q, P]
            mine = _scaled(logits[:, :, heads], extras).masked_fill(~seen, float("-inf"))
            parts = [_scaled(shared, extras), mine]
            if extras.sinks is not None:
                sinks = extras.sinks.to(query.device).float().view(groups, share, 1)[heads]
                parts.append(sinks.expand(-1, -1, num_new).reshape(1, 1, count, -1, 1).expand(*shared.shape[:4], 1))
            weights = torch.cat(parts, -1).softmax(-1).to(query.dtype)
            of_context = _apart(_together(weights[..., :held]) @ values, batch // contexts)
            mine = weights[..., held : held + own].flatten(0, 1) @ value[:, heads]
            out[:, heads] = mine + of_context.flatten(0, 1)
        return out.view(batch, num_heads, num_new, dim).transpose(1, 2).contiguous(), None

    def _seen(self, mask: Tensor | None, batch: int, num_new: int, own: int, device: torch.device) -> Tensor:
        """``[B, 1, Q, T]`` bool, which own tokens a query looks at; made once for all layers of a pass."""
        key = (mask, num_new, own)
        if self._visible is None or self._visible[0][0] is not mask or self._visible[0][1:] != key[1:]:
            column = torch.arange(own, device=device)
            query = column[own - num_new :, None]
            seen = (column <= query).expand(batch, -1, -1)
            if mask is not None:
                seen = (seen & mask[:, None, -own:].bool()) | (column == query)
            self._visible = (key, seen[:, None])
        return self._visible[1]


def _scaled(logits: Tensor, extras: Extras) -> Tensor:
    """In float32, with the layer's scale and softcap."""
    logits = logits.float() * extras.scale
    return logits if extras.softcap is None else extras.softcap * torch.tanh(logits / extras.softcap)


def _together(rows: Tensor) -> Tensor:
    """``[C, b, n, R, X]`` as ``[C, n, b * R, X]``: a context's b continuations, to be multiplied with its heads."""
    return rows.transpose(1, 2).flatten(2, 3)


def _apart(rows: Tensor, count: int) -> Tensor:
    """``[C, n, b * R, X]`` as ``[C, b, n, R, X]``, with b = ``count``."""
    return rows.unflatten(2, (count, -1)).transpose(1, 2)


def _heads(layer: Any) -> Sequence[Heads]:
    """What a layer of a cache holds, as blocks of heads of one length."""
    if isinstance(layer, RaggedLayer):
        starts, counts = layer.cu_seqlens.tolist(), layer.lengths.tolist()
        rows = [slice(start, start + count) for start, count in zip(starts, counts, strict=False)]
        if len(rows) != layer.num_kv_heads:
            raise ValueError(f"context: it holds {layer.batch_size} sequences, expected one")
        return [(layer.keys[part][None, None], layer.values[part][None, None]) for part in rows]
    keys, values = layer.keys, layer.values
    if len(keys) != 1 and isinstance(layer, PrunedLayer):  # whose sequences may have seen different numbers of tokens
        raise ValueError(f"context: it holds {len(keys)} sequences, expected one")
    return [(keys, values)]


# -- the check at the first use ----------------------------------------------------------------------------------------

_SHARED = 9
"""Tokens of the context in a check; of the seven others two sequences of different lengths are made."""


@once_per_model
def _check(model: PreTrainedModel) -> None:
    """``TypeError`` unless ``model`` gives its own hidden states in branches."""
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {_FULL, _SLIDING}
    if kinds:
        raise unsupported(model, f"has layers of the kind {', '.join(sorted(kinds))}, which branches cannot read")
    with evaluating(model), torch.no_grad():
        copy_context().run(_compare, model)


def _compare(model: PreTrainedModel) -> None:
    SESSIONS.set(())
    depth, embeds = check_depth(model), check_embeds(model)
    own = hidden_behind(model, depth, inputs_embeds=embeds, use_cache=False)[0]
    try:
        context = DynamicCache()
        hidden_behind(model, depth, inputs_embeds=embeds[:, :_SHARED], past_key_values=context, use_cache=True)
        del context.layers[depth:]
        with Branches(model, context, checked=False) as branches:
            branch = embeds[:, _SHARED:].repeat(2, 1, 1)
            count = branch.shape[1]
            mask = torch.ones(2, count, dtype=torch.long, device=embeds.device)
            branch[1, :2], branch[1, 2:], mask[1, :2] = 0, embeds[0, _SHARED : _SHARED + count - 2], 0
            inputs = branches.inputs(mask, mask)
            del inputs["input_ids"]
            for start, stop in ((0, count - 1), (count - 1, count)):
                found = hidden_behind(
                    model,
                    depth,
                    inputs_embeds=branch[:, start:stop],
                    attention_mask=inputs["attention_mask"][:, : _SHARED + stop],
                    position_ids=inputs["position_ids"][:, start:stop],
                    past_key_values=inputs["past_key_values"],
                    use_cache=True,
                )
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise unsupported(model, f"has an attention that branches cannot read ({reason})") from None
    distance = max(relative_error(found[0], own[-1:]), relative_error(found[1], own[-3:-2]))
    if distance > check_tolerance(embeds.dtype):
        raise unsupported(model, f"has an attention that branches do not reproduce (off by {distance:.2g})")
