"""An attention layer behind a prefill, made by hand: what pruning methods are given, small enough for loops.

Loaded by path (tests are no package): ``layers = load("layers")`` as in ``test_wrappers.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding, apply_rotary_pos_emb

from condense_core.pruning.base import Kept, LayerContext, Method
from condense_core.pruning.rotary import Rotary

Padding = Literal["none", "left", "right"]


@dataclass(frozen=True)
class Layer:
    """B sequences of at most N tokens, H query heads, G key-value heads, D head_dim.

    Attributes:
        q: ``[B, H, N, D]`` after RoPE; k, v: ``[B, G, N, D]``, NaN where there is padding.
        raw: ``[B, G, N, D]`` the keys before RoPE.
        ctx: of a method that keeps half; layer 1 of 4.
    """

    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    raw: Tensor
    ctx: LayerContext

    def context(self, method: Method, **changes: Any) -> LayerContext:
        """What ``method`` is told, with its own budgets."""
        ctx = self.ctx
        budgets = tuple(method.num_kept(n, ctx.layer_idx, ctx.num_layers) for n in ctx.lengths)
        return replace(ctx, budgets=budgets, **changes)

    def real(self) -> list[range]:
        """The columns of each sequence's tokens."""
        if self.ctx.bounds is None:
            return [range(self.k.shape[2])] * self.k.shape[0]
        return [range(start, stop) for start, stop in self.ctx.bounds.tolist()]


def build(
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 8,
    lengths: Sequence[int] = (61,),
    padding: Padding = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    """A random layer; with padding, sequences of ``lengths`` stand at the right or left end of max(lengths) + 3."""
    torch.manual_seed(seed)
    batch, num_tokens = len(lengths), max(lengths) + 3 * (padding != "none")
    config = MistralConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_hidden_layers=4,
        sliding_window=None,
        attn_implementation="sdpa",
    )
    module = MistralAttention(config, 1).to(dtype).eval()
    for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
        torch.nn.init.normal_(projection.weight, std=1.5 * config.hidden_size**-0.5)  # attention that differs by token
    rotary = MistralRotaryEmbedding(config)
    start = torch.tensor([num_tokens - n if padding == "left" else 0 for n in lengths])
    bounds = torch.stack([start, start + torch.tensor(lengths)], 1)
    hidden = torch.randn(batch, num_tokens, config.hidden_size).to(dtype)
    positions = (torch.arange(num_tokens) - start[:, None]).clamp(min=0)
    cos, sin = rotary(hidden, positions)
    with torch.no_grad():
        q, raw, v = (
            projection(hidden).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, raw, cos, sin)
    column = torch.arange(num_tokens)
    outside = ((column < bounds[:, :1]) | (column >= bounds[:, 1:]))[:, None, :, None]
    ctx = LayerContext(
        module=module,
        layer_idx=1,
        num_layers=4,
        budgets=tuple(n // 2 for n in lengths),
        lengths=tuple(lengths),
        bounds=None if padding == "none" else bounds,
        scale=head_dim**-0.5,
        rotary=Rotary(rotary.inv_freq.float()),
        cos=cos,
        sin=sin,
        hidden=hidden,
    )
    if padding != "none":
        k, v = (x.masked_fill(outside, float("nan")) for x in (k, v))
    return Layer(module, q, k.contiguous(), v.contiguous(), raw, ctx)


def columns(kept: Kept, heads: int) -> list[list[int]]:
    """The kept columns of every head n = b*G + g."""
    if kept.cu_seqlens is None:
        return [row for sequence in kept.indices.tolist() for row in sequence]
    assert len(kept.cu_seqlens) == heads + 1
    edges, indices = kept.cu_seqlens.tolist(), kept.indices.tolist()
    assert edges[-1] == len(indices)
    return [indices[a:b] for a, b in pairwise(edges)]


def rows(x: Tensor, kept: Kept) -> list[Tensor]:
    """Compacted keys or values of every head, ``[M, D]`` each."""
    if kept.cu_seqlens is None:
        return list(x.flatten(0, 1))
    return list(x.split(kept.cu_seqlens.diff().tolist()))
