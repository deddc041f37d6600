"""CriticalKV against its definition in loops."""

from __future__ import annotations

import pytest
import torch

from condense_core.pruning.base import ScoringPass, Traits
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import (
    AdaKV,
    CriticalKV,
)
from condense_testing.pruning import layers
from condense_testing.pruning.wrapper_cases import (
    DTYPES,
    HEADS,
    INF,
    PADDINGS,
    TOLERANCES,
    Given,
    batch,
    best,
    chosen,
    projection_norms,
    random_scores,
    run,
    shared,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shared_first", [False, True])
def test_values_decide_about_the_second_half(
    padding: str, heads: tuple[int, int], dtype: torch.dtype, shared_first: bool
) -> None:
    layer = batch(padding, heads, dtype)
    base = SnapKV(keep=0.5, window=8)
    method = CriticalKV(AdaKV(base) if shared_first else base)
    scores = base.score(layer.module, layer.q, layer.k, layer.v, layer.context(base))
    actual, kept, _, _ = run(method, layer)
    critical = (scores.double() + 1e-4) * projection_norms(layer)
    for b, budget in enumerate(layer.context(method).budgets):
        half = budget // 2
        rows = scores[b].tolist()
        first = shared(rows, half, max(half // 5, 8)) if shared_first else [best(row, half) for row in rows]
        for g in range(heads[1]):
            assert (actual[b, g] == INF).nonzero().flatten().tolist() == sorted(first[g])
            others = [i for i in layer.real()[b] if i not in first[g]]
            # The op's norm is a sum of fp32 products of the given values, whatever their dtype.
            torch.testing.assert_close(
                actual[b, g, others].double(), critical[b, g, others], rtol=TOLERANCES[dtype], atol=1e-7
            )
            outside = [i for i in range(actual.shape[2]) if i not in layer.real()[b]]
            assert (actual[b, g, outside] == -INF).all()
            own = chosen(layer, kept)[b * heads[1] + g]
            assert set(first[g]) <= set(own)
            assert shared_first or own == best(actual[b, g].tolist(), budget)


@pytest.mark.parametrize(("first_share", "count"), [(0, 0), (0.01, 1), (0.3, 9), (1.0, 30)])
def test_the_first_share_is_the_methods(first_share: float, count: int) -> None:
    layer = layers.build(lengths=(60,))
    scores = random_scores(layer)
    actual, *_ = run(CriticalKV(Given(scores, 30), 0.0, first_share), layer)
    for g in range(2):
        assert (actual[0, g] == INF).nonzero().flatten().tolist() == best(scores[0, g].tolist(), count)
    finite = actual.isfinite()
    expected = (scores.double() * projection_norms(layer))[finite]
    torch.testing.assert_close(actual[finite].double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("padding", PADDINGS)
def test_heads_compete_for_the_second_half_alone(padding: str) -> None:
    """AdaKV outside: the first half is each head's own, the second the layer's."""
    layer = batch(padding)
    scores = random_scores(layer, window=5)
    method = AdaKV(CriticalKV(Given(scores, 0.5, protected=5)), floor=0.1)
    actual, kept, _, _ = run(method, layer)
    for b, budget in enumerate(layer.context(method).budgets):
        rows = actual[b].tolist()
        for g in range(2):
            assert [i for i, s in enumerate(rows[g]) if s == INF] == best(scores[b, g].tolist(), budget // 2)
        assert chosen(layer, kept)[2 * b : 2 * b + 2] == shared(rows, budget, max(int(0.1 * budget), 5))


def test_earlier_scores_are_not_weighed_twice() -> None:
    layer = layers.build(lengths=(40,))
    scores = random_scores(layer)
    method = CriticalKV(Given(scores, 10, traits=Traits(uses_previous=True)))
    assert torch.equal(run(method, layer, final=False)[0], scores)
    assert not torch.equal(run(method, layer)[0], scores)
    assert not torch.equal(run(CriticalKV(Given(scores, 10)), layer, final=False)[0], scores)


def test_the_question_takes_no_place_of_the_first_half() -> None:
    layer = layers.build(lengths=(40,))
    scores = random_scores(layer, window=8)
    method = CriticalKV(Given(scores, 10))
    ctx = layer.context(method, scoring_pass=ScoringPass(prompt_ids=(1,) * 8))
    actual = method.score(layer.module, layer.q[:, :, -8:], layer.k, layer.v, ctx)
    for g in range(2):
        assert (actual[0, g] == INF).nonzero().flatten().tolist() == best(scores[0, g, :32].tolist(), 5)
    assert (actual[:, :, 32:] == -INF).all()
