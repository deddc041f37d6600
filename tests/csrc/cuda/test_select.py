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


def test_arguments_that_do_not_fit_are_refused(emulation: Any) -> None:
    valid = {
        "scores": torch.zeros(2, 3, 9),
        "budget": 4,
        "across_heads": False,
        "protect": torch.zeros(1, 2, 2, dtype=torch.int64),
        "indices": torch.zeros(2, 3, 4, dtype=torch.int64),
        "counts": torch.zeros(2, 3, dtype=torch.int64),
    }
    changes: dict[str, dict[str, Any]] = {
        "scores is float16, expected float32": {"scores": torch.zeros(2, 3, 9).half()},
        "scores has shape [3, 9], expected [any, any, any]": {"scores": torch.zeros(3, 9)},
        "budget is -1, expected 0 or more": {"budget": -1},
        "protect has shape [3, 2, 2], expected [2, any, 2]": {"protect": torch.zeros(3, 2, 2, dtype=torch.int64)},
        "protect is float32, expected int32 or int64": {"protect": torch.zeros(1, 2, 2)},
        "indices has shape [2, 3, 4], expected [2, 12]": {"across_heads": True},
        "indices is int32, expected int64": {"indices": torch.zeros(2, 3, 4, dtype=torch.int32)},
        "counts has shape [2, 2], expected [2, 3]": {"counts": torch.zeros(2, 2, dtype=torch.int64)},
    }
    refused = emulation.refusals([("select", valid | change) for change in ({}, *changes.values())])
    assert refused == {i + 1: f"select: {text}" for i, text in enumerate(changes)}
