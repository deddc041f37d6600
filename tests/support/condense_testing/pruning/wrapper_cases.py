"""Layers and methods with given scores, on which wrappers are held against their definitions in loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.base import Kept, LayerContext, Method, Traits
from condense_testing.pruning import layers

INF, NAN = math.inf, math.nan
LENGTHS = (61, 47, 55)
PADDINGS = ("none", "left", "right")
HEADS = [(8, 2), (32, 8)]
DTYPES = [torch.float32, torch.bfloat16]
# Relative to an oracle in float64 of the same inputs. fp32: sums of some hundred products, each rounded to 2^-24. bf16:
# the result is rounded to 2^-9 once; the rest, in fp32, is far below that.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2**-8}


class Given(Method):
    """A method whose scores are given: an oracle can be exact."""

    def __init__(self, scores: Tensor, budget: float, protected: int = 0, traits: Traits | None = None) -> None:
        self.scores, self.budget, self._protected, self._traits = scores, budget, protected, traits or Traits()

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return self.scores

    def num_kept(self, num_tokens: int, layer_idx: int, num_layers: int) -> int:
        return min(num_tokens, int(self.budget if self.budget > 1 else self.budget * num_tokens))

    @property
    def protected(self) -> int:
        return self._protected

    @property
    def traits(self) -> Traits:
        return self._traits


def batch(padding: str, heads: tuple[int, int] = (8, 2), dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    lengths = LENGTHS if padding != "none" else (61, 61)
    return layers.build(heads=heads[0], kv_heads=heads[1], lengths=lengths, padding=padding, dtype=dtype, **options)


def random_scores(layer: Any, *, window: int = 0, levels: int | None = None) -> Tensor:
    """Scores >= 0, of few ``levels`` where ties are wanted, a window at +inf, padding at -inf."""
    scores = torch.rand(layer.k.shape[:3], generator=torch.Generator().manual_seed(1))
    if levels:
        scores = (scores * levels).floor() / levels
    return layer.ctx.protect(scores, window=window)


def run(method: Method, layer: Any, **changes: Any) -> tuple[Tensor, Kept, Tensor, Tensor]:
    """Scores, selection, keys and values, as a session calls for them."""
    ctx = layer.context(method, **changes)
    scores = method.score(layer.module, layer.q, layer.k, layer.v, ctx)
    kept = method.select(scores, ctx)
    return scores, kept, *method.compact(layer.k, layer.v, kept, ctx)


def chosen(layer: Any, kept: Kept) -> list[list[int]]:
    return layers.columns(kept, layer.k.shape[0] * layer.k.shape[1])


def ranking(scores: list[float]) -> list[int]:
    """Columns from the best to the worst, without padding."""
    real = [i for i, score in enumerate(scores) if score != -INF]
    return sorted(real, key=lambda i: (math.isnan(scores[i]), -scores[i] if not math.isnan(scores[i]) else 0, i))


def best(scores: list[float], count: int) -> list[int]:
    return sorted(ranking(scores)[:count])


def shared(scores: list[list[float]], budget: int, least: int) -> list[list[int]]:
    """Each head its own best ``least``; the other places of the layer to the highest scores, the earlier head first."""
    own = [ranking(row)[:least] for row in scores]
    rest = [(-score, g, i) for g, row in enumerate(scores) for i, score in enumerate(row) if i not in own[g]]
    for _, g, i in sorted(entry for entry in rest if entry[0] != INF)[: len(scores) * (budget - least)]:
        own[g].append(i)
    return [sorted(row) for row in own]


def chunk_means(scores: Tensor, positions: list[list[list[int]]], chunk: int) -> Tensor:
    """Over the finite scores of the real tokens at positions of one chunk."""
    result = scores.clone()
    for b, rows in enumerate(scores.tolist()):
        for g, row in enumerate(rows):
            for i, score in enumerate(row):
                if math.isfinite(score):
                    number = positions[b][g][i] // chunk
                    members = [s for s, p in zip(row, positions[b][g], strict=True) if p // chunk == number]
                    members = [s for s in members if math.isfinite(s)]
                    result[b, g, i] = sum(members) / len(members)
    return result


def projection_norms(layer: Any) -> Tensor:
    """||W_h v||_1, averaged over the query heads h of a group, in float64."""
    weight, v = layer.module.o_proj.weight.detach().double(), layer.v.double()
    group, head_dim = layer.q.shape[1] // v.shape[1], v.shape[3]
    norms = torch.zeros(v.shape[:3], dtype=torch.float64)
    for h in range(layer.q.shape[1]):
        norms[:, h // group] += (v[:, h // group] @ weight[:, h * head_dim : (h + 1) * head_dim].T).abs().sum(-1)
    return norms / group


def turned(keys: Tensor, distance: Tensor, rotary: Any) -> Tensor:
    """Keys as complex numbers, times e^(i * distance * frequency), in float64."""
    low, high = keys.double().chunk(2, -1)
    angle = distance.double()[..., None] * rotary.inv_freq.double()
    moved = torch.complex(low, high) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([moved.real, moved.imag], -1)


def check_rotation(
    layer: Any, kept: Kept, keys: Tensor, values: Tensor | None, positions: list[list[int]] | None = None
) -> None:
    """Key j of each head is the kept one, moved to position j; rows in the order of columns."""
    kv_heads, dtype = layer.k.shape[1], layer.k.dtype
    for n, own in enumerate(chosen(layer, kept)):
        b, g = divmod(n, kv_heads)
        place = positions[n] if positions else [i - layer.real()[b].start for i in range(layer.k.shape[2])]
        distance = torch.arange(len(own)) - torch.tensor([place[i] for i in own])
        expected = turned(layer.k[b, g, own], distance, layer.ctx.rotary)
        # The angle of up to 100 radians is rounded to 2^-18 in fp32; keys are below 8.
        actual = layers.rows(keys, kept)[n].double()
        torch.testing.assert_close(actual, expected, rtol=TOLERANCES[dtype], atol=1e-4 if dtype.itemsize == 4 else 1e-2)
        if values is not None:
            assert torch.equal(layers.rows(values, kept)[n], layer.v[b, g, own])
