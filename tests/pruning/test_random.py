"""Random: scores that depend on nothing but seed, layer, head and position."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from condense_core.pruning import methods
from condense_testing.pruning.method_cases import (
    make_case,
)


def test_random_is_its_own_generator() -> None:
    case, method = make_case(), methods.Random(keep=0.5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    scores = method.score(None, case.q, case.k, case.v, case.ctx)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(method.score(None, case.q, case.k, case.v, case.ctx), scores)
    others = (
        methods.Random(keep=0.5, seed=1).score(None, case.q, case.k, case.v, case.ctx),
        method.score(None, case.q, case.k, case.v, replace(case.ctx, layer_idx=2)),
        scores.flip(1),
    )
    for other in others:
        # Of 32 bits, 24 are compared: equal ones are rare.
        assert (other == scores).double().mean() < 0.01
    left = make_case(padding="left")
    padded = method.score(None, left.q, left.k, left.v, left.ctx)
    start, stop = left.places[0]
    assert torch.equal(padded[0, :, start:], scores[0, :, : stop - start])


def test_random_is_uniform() -> None:
    k = torch.zeros(1, 8, 20_000, 2)
    scores = methods.Random(keep=0.5).score(None, k, k, k, make_case().ctx)
    # 160,000 draws: the mean is within 5 of its standard deviations of 1/2, and so is each tenth's count.
    assert abs(float(scores.mean()) - 0.5) < 5 / math.sqrt(12 * scores.numel())
    counts = scores.histc(10, 0, 1)
    assert (counts - scores.numel() / 10).abs().max() < 5 * math.sqrt(scores.numel() * 0.09)
    # Neither neighbours nor heads go together.
    for a, b in ((scores[..., 1:], scores[..., :-1]), (scores[:, 1:], scores[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(a.numel())
