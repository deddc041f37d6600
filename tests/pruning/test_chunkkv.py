"""ChunkKV against its definition in loops."""

from __future__ import annotations

import pytest
import torch

from condense_core.pruning.base import ScoringPass
from condense_core.pruning.wrappers import (
    ChunkKV,
)
from condense_testing.pruning import layers
from condense_testing.pruning.wrapper_cases import (
    INF,
    NAN,
    PADDINGS,
    Given,
    batch,
    best,
    chosen,
    chunk_means,
    random_scores,
    run,
)


@pytest.mark.parametrize("chunk", [1, 4, 20, 100])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_token_scores_what_its_chunk_does(padding: str, chunk: int) -> None:
    layer = batch(padding)
    scores = random_scores(layer, window=6)
    start = [columns.start for columns in layer.real()]
    positions = [[[i - first for i in range(scores.shape[2])]] * 2 for first in start]
    method = ChunkKV(Given(scores, 0.5), chunk)
    actual, kept, _, _ = run(method, layer)
    expected = chunk_means(scores, positions, chunk)
    # One rounding to fp32 of a mean in float64.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    if chunk == 1:
        assert torch.equal(actual, scores)
    for b, budget in enumerate(layer.context(method).budgets):
        for g in range(2):
            assert chosen(layer, kept)[2 * b + g] == best(actual[b, g].tolist(), budget)
            assert set(list(layer.real()[b])[-6:]) <= set(chosen(layer, kept)[2 * b + g])


def test_whole_chunks_stay_and_the_edge_keeps_its_first_tokens() -> None:
    layer = layers.build(lengths=(23,))
    value = torch.tensor([3.0, 1, 4, 2, 5]).repeat_interleave(5)[:23]  # the last chunk has 3 tokens
    scores = (value + torch.tensor([0.1, -0.1, 0.2, -0.2, 0]).repeat(5)[:23]).expand(1, 2, 23).clone()
    scores[0, 1] = scores[0, 1].flip(0)
    _, kept, _, _ = run(ChunkKV(Given(scores, 10), 5), layer)
    assert chosen(layer, kept)[0] == [0, 1, *range(10, 15), 20, 21, 22]


def test_chunks_of_a_pruned_cache_go_by_position() -> None:
    layer = layers.build(lengths=(30,))
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(90, generator=generator)[:30].sort().values for _ in range(2)])[None]
    scores = random_scores(layer)
    actual, *_ = run(ChunkKV(Given(scores, 10), 7), layer, positions=positions)
    torch.testing.assert_close(actual, chunk_means(scores, positions.tolist(), 7), rtol=1e-6, atol=0)


def test_forced_and_broken_scores_do_not_poison_their_chunk() -> None:
    layer = layers.build(lengths=(12,))
    scores = torch.tensor([1.0, INF, 3, 5, NAN, 1, INF, INF, INF, INF, 2, 2]).expand(1, 2, 12).clone()
    actual, *_ = run(ChunkKV(Given(scores, 6), 4), layer)
    expected = torch.tensor([3.0, INF, 3, 3, NAN, 1, INF, INF, INF, INF, 2, 2])
    torch.testing.assert_close(actual[0, 0], expected, rtol=1e-6, atol=0, equal_nan=True)


def test_the_question_is_not_part_of_a_chunk() -> None:
    layer = layers.build(lengths=(12,))
    scores = torch.tensor([1.0] * 8 + [2, 4, 100, INF]).expand(1, 2, 12).clone()
    method = ChunkKV(Given(scores, 6), 4)
    ctx = layer.context(method, scoring_pass=ScoringPass(prompt_ids=(1, 2)))
    actual = method.score(layer.module, layer.q[:, :, -2:], layer.k, layer.v, ctx)
    assert actual[0, 0].tolist() == [1.0] * 8 + [3, 3, -INF, -INF]
