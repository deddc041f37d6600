"""LeverageScore: keys that the others cannot stand in for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import LayerContext, ScoringMethod, Traits, check_count
from condense_core.pruning.methods.common import between, join_previous, standardize, unrotate

JITTER = 1e-2


@dataclass(frozen=True, kw_only=True, repr=False)
class LeverageScore(ScoringMethod):
    """``score_i = z(x_i' (X'X + 0.01 I)^-1 x_i)``, ``X = (K - mean K) Phi``, K the keys before RoPE.

    Chari and Van Durme, arXiv 2507.08143, the geometric half of Compactor, in kvpress's form: the leverage of the rows
    of X by a Cholesky factor. ``Phi [D, sketch]`` is Gaussian of variance 1 / sketch, its own for every layer and head;
    z is the z-score over the heads and tokens of a sequence.

    A token is scored among those that were read in the same pass and keeps that score later. The rotation of the cached
    keys is undone; kvpress projects the hidden states again, which is the same but for rounding, and draws Phi from the
    global generator in the keys' dtype.

    Attributes:
        sketch: columns of Phi, >= 1.
        seed: of Phi, >= 0.
    """

    name = "leverage"
    summary = "tokens whose keys the other keys cannot replace: a high leverage score"
    paper = "2507.08143"
    traits = Traits(uses_previous=True, prefills_only=True, reads_rotary=True)
    sketch: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("LeverageScore: sketch", self.sketch, minimum=1)
        check_count("LeverageScore: seed", self.seed, minimum=0)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        past = k.shape[2] - q.shape[2]
        phi = projection(self.seed, ctx.layer_idx, (k.shape[1], k.shape[3], self.sketch)).to(k.device)
        bounds = None if ctx.bounds is None else ctx.bounds - past
        fresh = leverage(ctx.rotary.to_halves(k[:, :, past:]), ctx.cos, ctx.sin, phi, bounds)
        return ctx.protect(join_previous("LeverageScore", fresh, ctx, k.shape[2]))


def projection(seed: int, layer_idx: int, shape: tuple[int, int, int]) -> Tensor:
    """Phi of every head, ``[G, D, sketch]`` float32 on the CPU, the same whatever device the keys are on."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + layer_idx) % 2**63)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[2])


def leverage(k: Tensor, cos: Tensor, sin: Tensor, phi: Tensor, bounds: Tensor | None) -> Tensor:
    """Z-scores ``[B, G, n]`` of the approximate leverage of ``k [B, G, n, D]`` among the keys in ``bounds``.

    Args:
        k: with its channels in the order of ``Rotary.to_halves``, which leverage does not depend on.
        cos: ``[B or 1, n, D]``, as ``LayerContext`` has it.
        sin: likewise.
        phi: ``[G, D, sketch]``, as of ``projection``.
        bounds: ``[B, 2]``: keys start <= i < stop are real; None: all.
    """
    keys = unrotate(k, cos, sin)
    scored = between(bounds, k.shape[2])
    if scored is None:
        keys = keys - keys.mean(dim=2, keepdim=True)
    else:
        inside = scored.unsqueeze(-1)
        mean = keys.masked_fill(~inside, 0.0).sum(dim=2, keepdim=True) / inside.sum(dim=2, keepdim=True).clamp(min=1)
        keys = (keys - mean).masked_fill(~inside, 0.0)
    # In float64 the jitter is above any rounding, so the factor exists: no attempt has to be read back. X is narrow.
    x = (keys @ phi).double()
    gram = x.mT @ x
    gram.diagonal(dim1=-2, dim2=-1).add_(JITTER)
    factor = torch.linalg.cholesky_ex(gram).L
    solved = torch.linalg.solve_triangular(factor, x.mT, upper=False)
    return standardize(solved.square().sum(dim=-2), scored).float()
