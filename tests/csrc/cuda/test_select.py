"""The CUDA kernel of select in the emulation, against the specification: the same integers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import SelectArgs
from condense_core.ops.cuda.select import select


def drawn(*shape: int) -> Tensor:
    """Few distinct values, so that ties matter, with NaN, infinities and padding."""
    x = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0)).float() / 7
    x[..., 5::17], x[..., 3::29], x[..., 1::31], x[..., 2::37] = float("nan"), float("-inf"), float("inf"), -0.0
    return x


# Sequences, heads, tokens.
SCORES = {
    "no tokens": drawn(2, 3, 0),
    "one token": drawn(2, 3, 1),
    "less than a warp": drawn(2, 3, 31),
    "more than a warp, strided": drawn(2, 33, 3).transpose(1, 2),
    "several tiles": drawn(2, 3, 300),
}


def cases(scores: Tensor) -> list[SelectArgs]:
    """Budgets of nothing, one, a part and all, with and without protected ranges, in both scopes."""
    num_tokens = scores.shape[2]
    ranges = torch.tensor([[[0, 2], [num_tokens - 3, num_tokens + 5]], [[7, 3], [-4, 1]]])
    choices = ((0, None), (min(1, num_tokens), ranges.int()), (num_tokens // 3, ranges[:1]), (num_tokens, None))
    return [
        SelectArgs(scores=scores, budget=budget, across_heads=across_heads, protect=protect)
        for budget, protect in choices
        for across_heads in (False, True)
    ]


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_it_equals_the_reference(scores: Tensor, emulation: Any) -> None:
    calls, expected = [], []
    for args in cases(scores):
        wanted = reference.select(*args)
        outputs = dict(zip(("indices", "counts"), (torch.full_like(t, 77) for t in wanted), strict=True))
        calls.append(("select", args._asdict() | outputs))
        expected.append((outputs, wanted))
    emulation.run_all(calls)
    for outputs, wanted in expected:
        for actual, correct in zip(outputs.values(), wanted, strict=True):
            assert torch.equal(actual, correct)


def test_the_backend_allocates_what_the_kernel_fills(launched: list[str]) -> None:
    args = SelectArgs(scores=drawn(1, 2, 40), budget=7, across_heads=True, protect=None)
    for actual, correct in zip(select(args), reference.select(*args), strict=True):
        assert torch.equal(actual, correct)
    assert launched == ["select"]
