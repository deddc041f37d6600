"""Merge: the values of evicted tokens live on in their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condense_core.pruning.base import Kept, LayerContext, Wrapper
from condense_core.pruning.wrappers.kept import kept_mask

_BLOCK = 2048  # columns at a time: float32 copies of a long cache would take more memory than the cache


@dataclass(frozen=True, repr=False)
class Merge(Wrapper):
    """Each evicted token i is folded into the value of its nearest kept neighbour c in the same head.

        ``v_c' = (v_c + sum_i w_i v_i) / (1 + sum_i w_i)``, ``w_i = min(1, exp(scale * (<k_i, k_c> - <k_c, k_c>)))``

    w_i is what a query along k_c would attend to i for 1 of attention to c. Nearest is by position, of two equally near
    ones the earlier; keys stay as they are. Sums are float32. Merged once more, in the next chunk or step, a token
    counts as one again.

    The idea is CaM's (Zhang et al., ICML 2024) and D2O's (Wan et al., arXiv 2406.13035). CaM adds a value to several
    later tokens, or does not, by a draw whose odds are a ratio of attention scores; D2O averages keys too, with the
    kept token of the most similar key, above a moving threshold. Neither draw nor search here: it takes O(N) memory.
    On a GPU the order of the sums, and with it their last bit, may vary.
    """

    name = "merge"
    summary = "adds the values of evicted tokens to their kept neighbours"
    paper = "2406.13035"

    def compact(self, k: Tensor, v: Tensor, kept: Kept, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        keys, values = self.method.compact(k, v, kept, ctx)
        if not kept.indices.numel():
            return keys, values
        batch, heads, num_tokens, head_dim = k.shape
        mask = kept_mask(kept, batch, heads, num_tokens).flatten(0, 1)
        neighbour = _nearest(mask, None if ctx.positions is None else ctx.positions.flatten(0, 1))
        folded = ~mask & (neighbour >= 0)
        if ctx.bounds is not None:
            column = torch.arange(num_tokens, device=k.device)
            start, stop = (edge.repeat_interleave(heads)[:, None] for edge in ctx.bounds.unbind(1))
            folded &= (column >= start) & (column < stop)
        neighbour = neighbour.clamp(min=0)
        if kept.cu_seqlens is None:
            first = torch.arange(batch * heads, device=k.device) * kept.indices.shape[2]
        else:
            first = kept.cu_seqlens[:-1].long()
        # Where the neighbour's row is in the result; row 0 takes the nothing that the others add.
        row = (first[:, None] + mask.cumsum(1).gather(1, neighbour) - 1).masked_fill(~folded, 0)

        sums = torch.zeros(kept.indices.numel(), head_dim, device=k.device)
        mass = torch.zeros(kept.indices.numel(), 1, device=k.device)
        all_keys = k.flatten(0, 1)
        for begin in range(0, num_tokens, _BLOCK):
            block = slice(begin, begin + _BLOCK)
            chosen = neighbour[:, block, None].expand(-1, -1, head_dim)
            kept_key = all_keys.gather(1, chosen).float()
            logit = ((all_keys[:, block].float() - kept_key) * kept_key).sum(-1, keepdim=True) * ctx.scale
            use = folded[:, block, None]
            weight = logit.clamp(max=0).exp().where(use, 0)
            value = (weight * v[:, :, block].flatten(0, 1).float()).where(use, 0)  # padding may hold NaN
            rows = row[:, block].flatten()
            sums.index_add_(0, rows, value.flatten(0, 1))
            mass.index_add_(0, rows, weight.flatten(0, 1))
        merged = (values.reshape(-1, head_dim).float() + sums) / (1 + mass)
        return keys, merged.to(values.dtype).view(values.shape)


def _nearest(mask: Tensor, positions: Tensor | None) -> Tensor:
    """``[B*G, N]`` the column of ``mask`` nearest to each column by position, the earlier of two; -1: it has none."""
    num_tokens = mask.shape[1]
    column = torch.arange(num_tokens, device=mask.device).expand(mask.shape)
    positions = column if positions is None else positions
    before = column.where(mask, -1).cummax(1).values
    after = column.where(mask, num_tokens).flip(1).cummin(1).values.flip(1)
    back = positions - positions.gather(1, before.clamp(min=0))
    ahead = positions.gather(1, after.clamp(max=num_tokens - 1)) - positions
    return after.where((after < num_tokens) & ((before < 0) | (ahead < back)), before)
