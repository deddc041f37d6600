"""QFilter: how far a key lies on the side of the queries, by a direction that was found once for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext
from condense_core.pruning.methods.fitted import FittedMethod, load_fitted, save_fitted


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class QFilter(FittedMethod):
    """``score_i = -<k_i, f>``, f the filter of the layer and KV head. Godey et al., arXiv 2503.02812.

    ``f`` is minus the mean over a group's query heads of ``v_1``, the first right singular vector of the head's queries
    (after RoPE), its sign such that the queries project on it positively on average: a key on their side scores high.
    The minus is how the authors publish their filters, ``nthngdy/<model>_qfilt``, which can be used as they are.

    Attributes:
        filters: ``[L, G, D]`` for L layers, a float tensor, or the path of a safetensors file that holds one, as
            ``save_filters`` and the authors write it. It must not be changed afterwards.
    """

    name = "qfilter"
    summary = "tokens whose keys lie along the main direction of the queries, calibrated once for a model"
    paper = "2503.02812"
    needs = "filters"
    axes = "[L, G, D]"
    maker = "calibrate()"
    filters: Tensor | str | Path | None = None

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        if self.fitted.shape != (ctx.num_layers, k.shape[1], k.shape[3]):
            raise ValueError(
                f"QFilter: filters has shape {list(self.fitted.shape)}, expected [L, G, D] = "
                f"{[ctx.num_layers, k.shape[1], k.shape[3]]} for this model"
            )
        filters = self.fitted[ctx.layer_idx].to(device=k.device, dtype=torch.float32)
        return ctx.protect(-(k.float() @ filters.unsqueeze(-1)).squeeze(-1))


def calibrate(queries: Sequence[Tensor], num_kv_heads: int) -> Tensor:
    """Filters ``[L, G, D]`` float32 on the CPU from queries that a model made of ordinary text.

    Args:
        queries: for each of L layers ``[H, T, D]`` or ``[B, H, T, D]``, after RoPE and without padding, as attention
            sees them; some thousand tokens are enough.
        num_kv_heads: G, a divisor of H.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    if isinstance(queries, Tensor) or not isinstance(queries, Sequence) or not queries:
        raise TypeError(f"queries is {type(queries).__name__}, expected a sequence with a tensor for each layer")
    return torch.stack([_layer_filters(f"queries[{i}]", x, num_kv_heads) for i, x in enumerate(queries)])


def _layer_filters(name: str, queries: Tensor, num_kv_heads: int) -> Tensor:
    if not isinstance(queries, Tensor) or queries.dim() not in (3, 4) or queries.numel() == 0:
        shape = list(queries.shape) if isinstance(queries, Tensor) else type(queries).__name__
        raise ValueError(f"{name} is {shape}, expected a tensor [H, T, D] or [B, H, T, D] with tokens")
    if queries.dim() == 4:
        queries = queries.transpose(0, 1).flatten(1, 2)
    if num_kv_heads < 1 or queries.shape[0] % num_kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}, expected a divisor of {name}'s {queries.shape[0]} heads")
    x = queries.double()
    # Right singular vectors of x are eigenvectors of x'x, which is small; eigh sorts upwards.
    first = torch.linalg.eigh(x.mT @ x).eigenvectors[..., -1]  # [H, D]
    side = torch.where((x.mean(dim=1) * first).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    return -(side * first).unflatten(0, (num_kv_heads, -1)).mean(dim=1).float().cpu()


def save_filters(filters: Tensor, path: str | Path) -> None:
    """Write ``filters [L, G, D]`` to a safetensors file under the authors' name, ``q_filters``."""
    save_fitted("q_filters", filters, path)


def load_filters(path: str | Path) -> Tensor:
    """The only tensor of a safetensors file, on the CPU; ``ValueError`` where there is no such file or tensor."""
    return load_fitted("QFilter", "filters", path)
