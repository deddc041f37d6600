"""AdaKV against its definition in loops."""

from __future__ import annotations

import pytest
import torch

from condense_core.pruning.wrappers import (
    AdaKV,
)
from condense_testing.pruning.wrapper_cases import (
    HEADS,
    PADDINGS,
    Given,
    batch,
    best,
    chosen,
    random_scores,
    run,
    shared,
)


@pytest.mark.parametrize("floor", [0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_heads_share_the_budget_of_their_layer(padding: str, heads: tuple[int, int], floor: float) -> None:
    layer = batch(padding, heads)
    # Heads of very different scores, so that sharing is far from equal; few levels, so that there are ties.
    scores = random_scores(layer, levels=8) * torch.arange(1, heads[1] + 1)[:, None]
    method = AdaKV(Given(scores, 0.5), floor)
    _, kept, _, _ = run(method, layer)
    expected = []
    for b, budget in enumerate(layer.context(method).budgets):
        expected += shared(scores[b].tolist(), budget, int(floor * budget))
    assert chosen(layer, kept) == expected
    counts = [len(row) for row in expected]
    assert sum(counts) == heads[1] * sum(layer.context(method).budgets)
    assert (len(set(counts[: heads[1]])) > 1) == (floor < 1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("budget", [1, 5, 11, 12, 13, 30])
def test_tokens_forced_in_one_head_take_no_place_of_another(padding: str, budget: int) -> None:
    """With a budget below the window, the first heads would keep all of theirs, and the last ones nothing."""
    layer = batch(padding, (32, 8))
    scores = random_scores(layer, window=12)
    _, kept, _, _ = run(AdaKV(Given(scores, budget + 0.5, protected=12)), layer)
    for n, row in enumerate(chosen(layer, kept)):
        forced = list(layer.real()[n // 8])[-12:]
        assert [i for i in row if i in forced] == forced[: min(budget, 12)]
        assert len(row) == budget if budget <= 12 else len(row) >= 12


def test_between_chunks_heads_keep_equally_many() -> None:
    layer = batch("none")
    scores = random_scores(layer) * torch.tensor([1.0, 9.0])[:, None]
    _, kept, _, _ = run(AdaKV(Given(scores, 20)), layer, final=False)
    assert kept.cu_seqlens is None
    assert chosen(layer, kept) == [best(row, 20) for rows in scores.tolist() for row in rows]
