"""Rerotate: the kept keys move together, as if the dropped tokens had never been there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import Kept, LayerContext, Method, Traits, Wrapper
from condense_core.pruning.wrappers.kept import rows_of_heads
from condense_core.pruning.wrappers.nesting import innermost, wrappers_of


@dataclass(frozen=True, repr=False)
class Rerotate(Wrapper):
    """The M kept keys of a head move to the positions 0 to M-1 of their sequence, at the end of the prefill.

    A key at position p that becomes the j-th is turned by ``j - p`` positions of the rotary embedding (arXiv
    2104.09864), in float32; values stay. The next token then has position M, so every head of every layer must keep
    the same M. StreamingLLM (arXiv 2309.17453) counts positions inside its cache in this way, FINCH (TACL 2024, "FINCH:
    Prompt-guided Key-Value Cache Compression") moves keys as here; kvpress 0.5.5 rounds the turn's cosine and sine to
    the dtype of the keys first.
    """

    name = "rerotate"
    summary = "moves the kept keys to consecutive positions"
    paper = "2104.09864"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.traits.ragged or not self.method.traits.bounded:
            raise ValueError(
                f"Rerotate: method is {self.method!r}, whose heads keep different numbers of tokens, so that the next "
                "one would have a different position in each; expected a method with the same number in every head, "
                "such as SnapKV(keep=0.25) without AdaKV or Threshold"
            )
        if self.method.traits.layers_differ:
            raise ValueError(
                f"Rerotate: method is {self.method!r}, whose layers keep different numbers of tokens, so that the next "
                "one would have a different position in each; expected a method with one budget for all layers, "
                "without PyramidKV or PerLayer"
            )
        if self.method.traits.rotates:
            raise ValueError(
                f"Rerotate: method is {self.method!r}, which moves the keys already; expected one Rerotate"
            )

        if self.method.traits.decodes:
            raise ValueError(
                f"Rerotate: method is {self.method!r}, which evicts from text that is being generated, where positions "
                "count on; expected a method without Decoding"
            )

    @property
    def traits(self) -> Traits:
        return replace(self.method.traits, rotates=True)

    def compact(self, k: Tensor, v: Tensor, kept: Kept, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        if not ctx.final:
            return self.method.compact(k, v, kept, ctx)
        if not ctx.rotary.turns:  # a layer without rotary embedding: its keys are the same at every position
            return self.method.compact(k, v, kept, ctx)
        batch, heads, num_tokens, _ = k.shape
        start = None if ctx.bounds is None else ctx.bounds[:, 0].repeat_interleave(heads)
        if ctx.positions is None and ctx.rotary.in_halves and self._only_copies:
            table = ctx.rotary.table(torch.arange(num_tokens, device=k.device))
            keys, values = ops.compact(k, v, kept.indices, cu_indices=kept.cu_seqlens, rotate=table, first=start)
            return keys, values
        keys, values = self.method.compact(k, v, kept, ctx)
        if not kept.indices.numel():
            return keys, values
        head, place = rows_of_heads(kept)
        head, column = head.clamp(max=batch * heads - 1), kept.indices.clamp(min=0)
        if ctx.positions is not None:
            position = ctx.positions.flatten()[head * num_tokens + column]
        else:
            position = column if start is None else column - start[head]
        return ctx.rotary.move(keys, (place - position).masked_fill(kept.indices < 0, 0)), values

    @property
    def _only_copies(self) -> bool:
        """Whether nothing inside does more than to copy rows."""
        passed_on = all(type(wrapper).compact is Wrapper.compact for wrapper in wrappers_of(self.method))
        return passed_on and type(innermost(self.method)).compact is Method.compact
