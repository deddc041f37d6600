"""Attention over packed sequences, registered with transformers, for the encoder's layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
class Captured:
    """Queries ``[H, T, D]`` and keys ``[G, T, D]`` of a layer after RoPE, and how it makes logits of them."""

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None


@dataclass
class Packing:
    """Sequence boundaries of a pack, as Python integers (the encoder's shapes are known on the host anyway).

    captured: receives what layer ``capture_layer`` attends with. calls: how many layers attended.
    """

    cu_seqlens: list[int]
    causal: bool = True
    capture_layer: int | None = None
    captured: list[Captured] = field(default_factory=list)
    calls: int = 0

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in pairwise(self.cu_seqlens)]


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

    Sequences of one length run as a batch, others one by one: there is no padding, and without softcap and sinks no
    ``[T, T]`` matrix.

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
    packing.calls += 1
    if packing.capture_layer == getattr(module, "layer_idx", None):
        packing.captured.append(Captured(query[0], key[0], scaling, softcap))
    lengths = [n for n in packing.lengths if n]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _window_mask(q.shape[2], sliding_window, packing.causal, q.device)
        if softcap is not None or s_aux is not None:
            return _attend_in_blocks(q, k, v, mask, scaling, packing.causal, softcap, s_aux, dropout)
        causal, grouped = packing.causal and mask is None, k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, scale=scaling, is_causal=causal, enable_gqa=grouped
        )

    if len(set(lengths)) == 1:
        count, n = len(lengths), lengths[0]
        q, k, v = (t[0].unflatten(1, (count, n)).transpose(0, 1) for t in (query, key, value))  # [S, H, n, D]
        return attend(q, k, v).permute(0, 2, 1, 3).flatten(0, 1).unsqueeze(0), None
    split = [t.split(lengths, dim=2) for t in (query, key, value)]
    return torch.cat([attend(q, k, v) for q, k, v in zip(*split, strict=True)], 2).transpose(1, 2), None


def _window_mask(n: int, window: int | None, causal: bool, device: torch.device) -> Tensor | None:
    """``[n, n]`` bool, which tokens each sees where a window hides some; else None."""
    if window is None or window >= n:
        return None
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
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
    if k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
    if mask is None and causal:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    rows = max(1, _BLOCK_BYTES // (4 * sequences * heads * n))
    parts = []
    for start in range(0, n, rows):
        logits = (q[:, :, start : start + rows] @ k.transpose(2, 3)).float() * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask[start : start + rows], -torch.inf)
        if sinks is not None:
            column = sinks.float().view(1, -1, 1, 1).expand(sequences, -1, logits.shape[2], 1)
            logits = torch.cat([logits, column], -1)
        weights = logits.softmax(-1)[..., :n].to(v.dtype)
        parts.append(F.dropout(weights, dropout, training=dropout > 0) @ v)
    return torch.cat(parts, 2)


def _layer_mask(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> LayerMask | None:
    """A mask as transformers asks for it, in the self-check."""
    if use_vmap:
        raise TypeError("attention: the model's mask is more than causal, or a window")
    return None if local_size is None else LayerMask(local_size)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(CHECKED_NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(CHECKED_NAME, _layer_mask)
