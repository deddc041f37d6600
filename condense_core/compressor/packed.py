"""Attention over packed sequences, registered with transformers, for the encoder's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from condense_core.compressor import varlen

ATTENTION_NAME = "condense_packed"
CHECKED_NAME = "condense_packed_checked"
"""As ``ATTENTION_NAME``, and compares what a layer tells its attention with the mask that the model makes for it."""

# What transformers' layers pass along and attention functions do not act on.
_WITHOUT_EFFECT = {
    *("position_ids", "cache_position", "use_cache", "past_key_values", "return_dict", "is_causal"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings"),
}
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class LayerAttention:
    """What a layer attends with in a pack, and how it makes weights of it.

    Attributes:
        query, key: ``[H, T, D]`` and ``[G, T, D]`` after RoPE.
        scaling: of the logits.
        softcap: the logits' bound, where they have one.
        window: how many tokens a token sees, itself among them; None: all.
        sinks: ``[H]``, a logit of each head that belongs to no token.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class FixedPacking:
    """A pack as compiled layers see it: no list of lengths, of which each would be compiled for.

    Attributes:
        offsets: int32 ``[S + 1]`` on the device.
        longest: tokens of the longest sequence, or more.
    """

    offsets: Tensor
    longest: int


@dataclass
class Packing:
    """Sequence boundaries of a pack, as Python integers (the encoder's shapes are known on the host anyway).

    Attributes:
        cu_seqlens: offsets of the sequences in the pack.
        causal: whether attention looks back only.
        parents: for each sequence the one that it continues, or None; () where none does. A parent comes before its
            children and has no parent itself. Several questions about one text are children of it: the text is read
            once, and its tokens see no question.
        observe: called with the index of every layer and what it attends with.
        calls: how many layers attended, compiled ones aside.
        fixed: what compiled layers know of the pack instead of all this, or None.
    """

    cu_seqlens: list[int]
    causal: bool = True
    parents: Sequence[int | None] = ()
    observe: Callable[[int, LayerAttention], None] | None = None
    calls: int = 0
    fixed: FixedPacking | None = None
    _offsets: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in pairwise(self.cu_seqlens)]

    def offsets(self, device: torch.device) -> Tensor:
        """int32 ``[S + 1]`` on ``device``, of the sequences that have tokens; made once for all layers."""
        if device not in self._offsets:
            ends = [0, *accumulate(n for n in self.lengths if n)]
            self._offsets[device] = torch.tensor(ends, dtype=torch.int32, device=device)
        return self._offsets[device]

    def parent(self, sequence: int) -> int | None:
        """The sequence that ``sequence`` continues."""
        return self.parents[sequence] if self.parents else None

    def start(self, sequence: int) -> int:
        """The position of a sequence's first token."""
        parent = self.parent(sequence)
        return 0 if parent is None else self.lengths[parent]


@dataclass(frozen=True)
class LayerMask:
    """What a model's mask for a layer says beyond causality, in the self-check: it sees the last ``window`` tokens."""

    window: int | None


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, G, T, D]
    value: Tensor,  # [1, G, T, D]
    attention_mask: object,
    *,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention inside each sequence of a pack; returns ``[1, T, H, D]``.

    Sequences of one length run as a batch. Others run in one call of a kernel where ``varlen`` has one for them, else
    one by one: there is no padding, and without softcap and sinks no ``[T, T]`` matrix.

    Args:
        scaling: of the logits, 1/sqrt(D) by default. softcap: ``softcap * tanh(logits / softcap)`` (Gemma 2).
        s_aux: ``[H]``, a logit of each head that belongs to no token (the sinks of GPT-OSS).
        sliding_window: how many tokens a token sees, itself among them.

    Raises:
        TypeError: the layer brings a mask of its own, or an argument that is not known here.
    """
    odd = sorted(name for name, came in others.items() if name not in _WITHOUT_EFFECT and came is not None)
    if odd:
        raise TypeError(f"attention: {type(module).__name__} gives it {', '.join(odd)}, which is not known here")
    if packing is None:
        raise TypeError(f"attention: {type(module).__name__} does not pass on what its model is called with")
    if isinstance(attention_mask, LayerMask) and attention_mask.window != sliding_window:
        raise TypeError(
            f"attention: {type(module).__name__} masks with a window of {attention_mask.window} tokens and gives its "
            f"attention one of {sliding_window}"
        )
    if attention_mask is not None and not isinstance(attention_mask, LayerMask):
        raise TypeError(f"attention: {type(module).__name__} computes a mask of its own")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is None and s_aux is None and not dropout
    if torch.compiler.is_compiling() and (fixed := packing.fixed) is not None and plain:
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, D]
        if query.device.type == "cpu" or varlen.serves(q.shape[-1]):
            window, causal = sliding_window, packing.causal
            out = attend_fixed(q, k, v, fixed.offsets, fixed.longest, scaling, window, causal)
            return out.unsqueeze(0), None
    return _attend(module, query, key, value, packing, scaling, sliding_window, dropout, softcap, s_aux), None


@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float,
    window: int | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """``[1, T, H, D]``: what ``packed_attention`` computes, by the pack's lengths."""
    packing.calls += 1
    if packing.observe is not None:
        seen = LayerAttention(query[0], key[0], scaling, softcap, window, s_aux)
        packing.observe(int(getattr(module, "layer_idx", 0)), seen)
    lengths = packing.lengths

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _mask(q.shape[2], k.shape[2], window, packing.causal, q.device)
        if softcap is not None or s_aux is not None:
            return _attend_in_blocks(q, k, v, mask, scaling, packing.causal, softcap, s_aux, dropout)
        causal, grouped = packing.causal and mask is None, k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, scale=scaling, is_causal=causal, enable_gqa=grouped
        )

    continued = any(parent is not None for parent in packing.parents)
    if len(filled := {n for n in lengths if n}) == 1 and not continued:
        n = filled.pop()
        q, k, v = (t[0].unflatten(1, (-1, n)).transpose(0, 1) for t in (query, key, value))  # [S, H, n, D]
        return attend(q, k, v).permute(0, 2, 1, 3).flatten(0, 1).unsqueeze(0)
    plain = softcap is None and s_aux is None and not dropout
    if filled and plain and not continued and varlen.fits(query, key, value):
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, D]
        offsets = packing.offsets(query.device)
        return varlen.attend(q, k, v, offsets, max(filled), scaling, window, packing.causal).unsqueeze(0)
    queries, keys, values = (t.split(lengths, dim=2) for t in (query, key, value))
    parts = []
    for i, q in enumerate(queries):
        k, v = keys[i], values[i]
        if (parent := packing.parent(i)) is not None:
            k, v = torch.cat([keys[parent], k], 2), torch.cat([values[parent], v], 2)
        if lengths[i]:
            parts.append(attend(q, k, v))
    return torch.cat(parts, 2).transpose(1, 2)


@torch.library.custom_op("condense_core::packed_attention", mutates_args=())
def attend_fixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scaling: float,
    window: int | None,
    causal: bool,
) -> Tensor:
    """``[T, H, D]``: plain attention inside each sequence, as one operation of a compiled graph.

    Arguments as of ``varlen.attend``, which computes it on a GPU; where it cannot, the offsets are read on the host.
    There is no gradient.
    """
    if varlen.fits(query, key, value):
        return varlen.attend(query, key, value, offsets, longest, scaling, window, causal).contiguous()
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    packing = Packing(offsets.tolist(), causal)
    return _attend(nn.Identity(), q, k, v, packing, scaling, window, 0.0, None, None)[0].contiguous()


@attend_fixed.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _mask(rows: int, columns: int, window: int | None, causal: bool, device: torch.device) -> Tensor | None:
    """``[rows, columns]`` bool, which tokens each of the last ``rows`` sees; None: all, or all before it and itself."""
    before = columns - rows
    if (window is None or window >= columns) and (not before or not causal):
        return None
    distance = torch.arange(before, columns, device=device)[:, None] - torch.arange(columns, device=device)
    window = columns if window is None else window
    return (distance < window) & (distance >= 0 if causal else distance > -window)


def _attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """``[S, H, n, D]``: attention written out, some rows of logits at a time; softmax in fp32."""
    sequences, heads, n, _ = q.shape
    columns = k.shape[2]
    if k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
    if mask is None and causal:
        mask = torch.ones(n, columns, dtype=torch.bool, device=q.device).tril(columns - n)
    rows = max(1, _BLOCK_BYTES // (4 * sequences * heads * columns))
    parts = []
    for start in range(0, n, rows):
        some = None if mask is None else mask[start : start + rows]
        weights = _weights(q[:, :, start : start + rows], k, some, scaling, softcap, sinks).to(v.dtype)
        parts.append(F.dropout(weights, dropout, training=dropout > 0) @ v)
    return torch.cat(parts, 2)


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention weights ``[..., H, m, n]`` in fp32 of queries ``[..., H, m, D]`` to keys ``[..., H, n, D]``."""
    logits = (q @ k.transpose(-2, -1)).float() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.float().view(-1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    return logits.softmax(-1)[..., : k.shape[-2]]


def strongest_attention(seen: LayerAttention, packing: Packing, child: int) -> Tensor:
    """``[n]`` fp32: the most that a token of a sequence gets from any head and token of its continuation ``child``.

    Weights are the layer's own: those of one token of ``child`` over all that it sees, itself among it, sum to 1.
    """
    parent = packing.parent(child)
    assert parent is not None, "child continues no sequence"
    (a, b), (c, d) = (packing.cu_seqlens[i : i + 2] for i in (parent, child))
    keys = torch.cat([seen.key[:, a:b], seen.key[:, c:d]], 1)
    queries = seen.query[:, c:d].unflatten(0, (len(keys), -1))  # [G, H/G, m, D]
    mask = _mask(d - c, b - a + d - c, seen.window, packing.causal, keys.device)
    sinks = None if seen.sinks is None else seen.sinks.view(len(keys), -1)
    best = keys.new_zeros(b - a, dtype=torch.float32)
    for group, (q, k) in enumerate(zip(queries, keys, strict=True)):  # the weights of one key head at a time
        own_sinks = None if sinks is None else sinks[group]
        weights = _weights(q, k, mask, seen.scaling, seen.softcap, own_sinks)
        best = torch.maximum(best, weights[..., : b - a].amax((0, 1)))
    return best


def _layer_mask(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> LayerMask | None:
    """A mask as transformers asks for it, in the self-check."""
    if use_vmap:
        raise TypeError("attention: the model's mask is more than causal, or a window")
    return None if local_size is None else LayerMask(local_size)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(CHECKED_NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(CHECKED_NAME, _layer_mask)
