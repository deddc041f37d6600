"""The encoder: the decoder's own embeddings and first layers, run over packed sequences without padding.

The layers are transformers' own modules, so every Llama-shaped model works. They are cloned with shared parameters, to
give them an attention function of their own; only weights that a LoRA adapter changes take memory of their own. The
attention function is registered under a name and chosen in the clone's config: the model itself is never touched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from condense_core.decoder.model import decoder_parts

ATTENTION_NAME = "condense_packed"


@dataclass
class Packing:
    """Sequence boundaries of a pack, as Python integers (the encoder's shapes are known on the host anyway).

    ``captured`` receives (query, key) of layer ``capture_layer`` after RoPE: ``[H, T, D]`` and ``[G, T, D]``.
    """

    cu_seqlens: list[int]
    causal: bool = True
    capture_layer: int | None = None
    captured: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in pairwise(self.cu_seqlens)]


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, G, T, D]
    value: Tensor,  # [1, G, T, D]
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packing: Packing,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each sequence of a pack, through SDPA; returns ``[1, T, H, D]``.

    Sequences of one length run as a batch, others one by one: there is no padding and no ``[T, T]`` mask.
    """
    if packing.capture_layer == getattr(module, "layer_idx", None):
        packing.captured.append((query[0], key[0]))
    lengths = [n for n in packing.lengths if n]
    if len(set(lengths)) == 1:
        count, n = len(lengths), lengths[0]
        q, k, v = (t[0].unflatten(1, (count, n)).transpose(0, 1) for t in (query, key, value))  # [S, H, n, D]
        out = _attend(q, k, v, scaling, packing.causal, sliding_window).permute(0, 2, 1, 3)
        return out.flatten(0, 1).unsqueeze(0), None
    split = [t.split(lengths, dim=2) for t in (query, key, value)]
    outs = [_attend(q, k, v, scaling, packing.causal, sliding_window) for q, k, v in zip(*split, strict=True)]
    return torch.cat(outs, 2).transpose(1, 2), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, window: int | None) -> Tensor:
    n = q.shape[2]
    mask = None
    if window is not None and window < n:
        distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        mask = (distance < window) & (distance >= 0 if causal else distance > -window)
    return F.scaled_dot_product_attention(
        q, k, v, mask, scale=scaling, is_causal=causal and mask is None, enable_gqa=k.shape[1] != q.shape[1]
    )


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)


class Encoder(nn.Module):
    """The first ``num_layers`` layers of ``model`` over packed embeddings: ``[T, d] -> [T, d]``.

    Parameters are shared with ``model`` until ``lora.merge`` or training replaces some. Every sequence has its own
    positions from 0.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int, *, causal: bool = True) -> None:
        super().__init__()
        inner = decoder_parts(model)
        depth = len(inner.layers)
        if not 0 <= num_layers <= depth:
            raise ValueError(
                f"encoder_layers: got {num_layers}, expected 0 to {depth}, the layers of {model.name_or_path!r}"
            )
        config = copy.deepcopy(model.config)
        config._attn_implementation = ATTENTION_NAME
        shared: dict[int, Any] = {id(p): p for p in inner.parameters()} | {id(b): b for b in inner.buffers()}
        shared |= {id(model.config): config}
        self.causal = causal
        self.layers = nn.ModuleList(copy.deepcopy(layer, shared) for layer in inner.layers[:num_layers])
        self.rotary_emb = inner.rotary_emb

    def checkpoint_like(self, model: PreTrainedModel) -> None:
        """Recompute activations in the backward pass, the way ``model.gradient_checkpointing_enable`` set it up."""
        layers: list[Any] = list(self.layers)
        for own, layer in zip(layers, decoder_parts(model).layers, strict=False):
            own.gradient_checkpointing = layer.gradient_checkpointing
            own._gradient_checkpointing_func = layer._gradient_checkpointing_func
        self.train()

    def forward(
        self, embeds: Tensor, cu_seqlens: list[int], *, capture_layer: int | None = None
    ) -> tuple[Tensor, Packing]:
        """Hidden states ``[T, d]`` behind the last layer, and the packing with what was captured."""
        packing = Packing(cu_seqlens, self.causal, capture_layer)
        if not len(self.layers) or not len(embeds):
            return embeds, packing
        positions = torch.cat([torch.arange(n, device=embeds.device) for n in packing.lengths]).unsqueeze(0)
        hidden = embeds.unsqueeze(0)
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotary,
                packing=packing,
            )
        return hidden[0], packing
