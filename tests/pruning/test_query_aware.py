"""QueryAware: the question scores, and is not kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.pruning.base import ScoringPass
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import (
    ChunkKV,
    QueryAware,
)
from condense_testing.pruning import layers
from condense_testing.pruning.wrapper_cases import (
    DTYPES,
    HEADS,
)


def question_scores(layer: Any, width: int, kernel: int) -> Tensor:
    """The attention of the last ``width`` queries to the columns before them, averaged over queries and neighbours."""
    q, k = layer.q.double(), layer.k.double()
    kv_heads, num_tokens = k.shape[1:3]
    group, context = q.shape[1] // kv_heads, num_tokens - width
    scores = torch.zeros(1, kv_heads, context, dtype=torch.float64)
    for h in range(q.shape[1]):
        for t in range(context, num_tokens):
            logits = layer.ctx.scale * (k[0, h // group, : t + 1] @ q[0, h, t])
            scores[0, h // group] += logits.softmax(0)[:context] / (width * group)
    reach = kernel // 2
    padded = torch.nn.functional.pad(scores, (reach, reach))
    return torch.stack([padded[..., i : i + kernel].sum(-1) / kernel for i in range(context)], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("length", "window"), [(5, 64), (5, 5), (12, 8)])
def test_the_question_scores_and_protects_nothing_else(
    heads: tuple[int, int], dtype: torch.dtype, length: int, window: int
) -> None:
    layer = layers.build(heads=heads[0], kv_heads=heads[1], lengths=(60,), dtype=dtype)
    question = tuple(range(length))
    method = QueryAware(SnapKV(keep=0.5, window=window), question)
    assert method.scoring_passes(50) == [ScoringPass(prompt_ids=question)]
    assert method.protected == 0
    ctx = layer.context(method, scoring_pass=method.scoring_passes(50)[0])
    actual = method.score(layer.module, layer.q[:, :, -length:], layer.k, layer.v, ctx)
    width = min(length, window)
    expected = question_scores(layer, width, 5)[..., : 60 - length]
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3  # logits of bf16 products, in fp32; the softmax's sums too
    torch.testing.assert_close(actual[..., : 60 - length].double(), expected, rtol=tolerance, atol=1e-7)
    # Any wrapper inside it is kept; the same in an eviction without the question is the method alone.
    within = QueryAware(ChunkKV(SnapKV(keep=0.5, window=window), 1), question)
    again = within.score(layer.module, layer.q[:, :, -length:], layer.k, layer.v, ctx)
    assert torch.equal(again[..., : 60 - length], actual[..., : 60 - length])
    alone = method.score(layer.module, layer.q, layer.k, layer.v, replace(ctx, scoring_pass=None))
    assert torch.equal(
        alone, method.method.score(layer.module, layer.q, layer.k, layer.v, replace(ctx, scoring_pass=None))
    )
