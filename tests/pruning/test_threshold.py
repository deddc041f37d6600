"""Threshold against its definition in loops."""

from __future__ import annotations

import pytest
import torch

from condense_core.pruning.wrappers import (
    Threshold,
)
from condense_testing.pruning import layers
from condense_testing.pruning.wrapper_cases import (
    NAN,
    PADDINGS,
    Given,
    batch,
    best,
    chosen,
    random_scores,
    run,
)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 10), (3, 0), (50, 50)])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.75, 2.0])
def test_what_scores_enough_stays(padding: str, threshold: float, sink: int, window: int) -> None:
    layer = batch(padding)
    scores = random_scores(layer, levels=8)  # 0.5 and 0.75 are reached exactly
    scores[0, 0, 20] = NAN
    _, kept, keys, values = run(Threshold(Given(scores, 0.5), threshold, sink, window), layer)
    expected = []
    for b, real in enumerate(layer.real()):
        forced = {*real[:sink], *(real[-window:] if window else ())}
        for g in range(2):
            own = [i for i in real if i in forced or scores[b, g, i] >= threshold]
            expected.append(own or best(scores[b, g].tolist(), 1))  # no head is left with nothing
    assert chosen(layer, kept) == expected
    for n, own in enumerate(expected):
        assert torch.equal(layers.rows(keys, kept)[n], layer.k[n // 2, n % 2, own])
        assert torch.equal(layers.rows(values, kept)[n], layer.v[n // 2, n % 2, own])


@pytest.mark.parametrize("padding", PADDINGS)
def test_between_chunks_all_stay(padding: str) -> None:
    layer = batch(padding)
    method = Threshold(Given(random_scores(layer), 0.5), 2.0)
    _, kept, _, _ = run(method, layer, final=False)
    assert chosen(layer, kept) == [list(real) for real in layer.real() for _ in range(2)]
    assert (kept.cu_seqlens is None) == (padding == "none")
    assert method.traits.ragged
    assert not method.traits.bounded
    assert method.protected == 68
