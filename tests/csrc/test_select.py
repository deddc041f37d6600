"""The CPU kernel of select against the specification: the same integers, whatever the scores."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from condense_core.ops import native, reference
from condense_core.ops.arguments import SelectArgs
from condense_core.ops.cpu.select import select

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Nothing to round: the result is a choice.
TOLERANCES = {"rtol": 0, "atol": 0}
INFINITY, NAN = float("inf"), float("nan")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(scores: Tensor, budget: int, protect: Tensor | None = None) -> None:
    """In both scopes."""
    for across_heads in (False, True):
        args = SelectArgs(scores=scores, budget=budget, across_heads=across_heads, protect=protect)
        for mine, theirs in zip(select(args), reference.select(*args), strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape
            torch.testing.assert_close(mine, theirs, **TOLERANCES)


# [B, G, N]
SHAPES = {
    "one token": (1, 1, 1),
    "less than a vector": (2, 3, 7),
    "whole vectors": (1, 2, 160),
    "a rest": (2, 1, 333),
    "more than a block of keys": (1, 2, 9001),
    "no tokens": (1, 2, 0),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: tuple[int, ...]) -> None:
    n = shape[2]
    for budget in sorted({0, 1, n // 3, n // 2, max(n - 1, 0), n, n + 5}):
        check(drawn(*shape), budget)


SCORES = {
    "different in their last bits": 1.0 + torch.arange(2 * 500).remainder(37).view(1, 2, 500) * 2.0**-23,
    "equal": torch.full((1, 3, 100), -2.5),
    "zeros of both signs": drawn(1, 2, 300).sign() * 0.0,
    "denormal": drawn(1, 2, 300) * 1e-40,
    "of every size": drawn(1, 2, 300) * 10.0 ** (38 * drawn(1, 2, 300, seed=1).clamp(-1, 1)),
    "ranks of chunks": drawn(1, 2, 16, 64).argsort(-1).flatten(2) / 64,
    "norms": -(11 + 0.1 * drawn(2, 2, 2000)),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_scores_that_are_close_or_far_apart(scores: Tensor) -> None:
    for budget in (1, 33, scores.shape[2] // 2):
        check(scores, budget)


# Few values, so that ties, infinities, NaN and both zeros meet often.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-23, 1e-40, INFINITY, -INFINITY, NAN, -NAN])


@pytest.mark.usefixtures("isa")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_scores_any_budget_any_ranges(data: st.DataObject) -> None:
    batch, heads, num_tokens = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40))
    values = data.draw(st.lists(VALUES, min_size=batch * heads * num_tokens, max_size=batch * heads * num_tokens))
    ends = st.integers(-3, num_tokens + 3)
    ranges = data.draw(st.lists(st.tuples(ends, ends), max_size=3))
    protect = torch.tensor(ranges, dtype=torch.int64).view(1, -1, 2) if data.draw(st.booleans()) else None
    check(torch.tensor(values).view(batch, heads, num_tokens), data.draw(st.integers(0, num_tokens + 2)), protect)


@pytest.mark.usefixtures("isa")
def test_infinities_and_nan_in_long_rows() -> None:
    scores = drawn(2, 3, 400)
    kind = torch.randint(0, 8, scores.shape, generator=torch.Generator().manual_seed(2))
    for code, value in enumerate((INFINITY, -INFINITY, NAN, -NAN, -0.0)):
        scores[kind == code] = value
    scores[0, 1] = -INFINITY
    scores[1, 2] = NAN
    protect = torch.tensor([[[3, 60], [50, 90], [395, 1000]], [[-5, 20], [30, 10], [0, 400]]])
    for budget in (1, 20, 100, 250, 300, 390, 400):
        check(scores, budget)
        check(scores, budget, protect)


RANGES = {
    "of all sequences": [[[0, 4], [8000, 9000]]],
    "of each sequence": [[[5, 6]], [[4090, 4100]]],
    "empty and falling": [[[20, 20]], [[9, 3]]],
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_protected_ranges(ranges: list[list[list[int]]], index: torch.dtype) -> None:
    for budget in (3, 1000, 4500):
        check(drawn(2, 2, 9000), budget, torch.tensor(ranges, dtype=index))


STRIDES = {
    "tokens apart": drawn(3, 200, 2).transpose(1, 2),
    "every other token": drawn(2, 3, 400)[..., ::2],
    "one sequence twice": drawn(1, 3, 200).expand(2, 3, 200),
    "a part of each row": drawn(2, 3, 400)[:, :, 7:133],
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scores", STRIDES.values(), ids=STRIDES)
def test_strides_do_not_matter(scores: Tensor) -> None:
    check(scores, 50)
    check(scores, 40, torch.tensor([[[1, 9, 10, 30]]])[..., ::2])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("across_heads", [False, True], ids=["per head", "across heads"])
def test_threads_do_not_change_it(across_heads: bool, threads_agree: Callable[..., None]) -> None:
    args = SelectArgs(scores=drawn(2, 5, 3000), budget=1000, across_heads=across_heads, protect=None)
    threads_agree(lambda: select(args), 1, 2, 7)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("budget", [1, 7, 16, 50])
def test_it_writes_only_its_own(budget: int) -> None:
    scores, guarded = drawn(1, 3, 100), torch.full((3 * budget + 64,), -7)
    indices = guarded[32 : 32 + 3 * budget].view(1, 3, budget)
    native.call(
        "select",
        scores=scores,
        budget=budget,
        across_heads=False,
        protect=None,
        indices=indices,
        counts=torch.empty(1, 3, dtype=torch.int64),
    )
    assert torch.equal(indices, reference.select(scores, budget)[0])
    assert (guarded[:32] == -7).all()
    assert (guarded[-32:] == -7).all()


# By hand: an infinite score ranks above the largest number, NaN below the smallest, protected tokens first.
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("protect", "kept"),
    [
        (None, {1: [2], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3]}),
        (torch.tensor([[[3, 5]]]), {1: [2], 2: [2, 3], 3: [2, 3, 4], 4: [0, 2, 3, 4]}),
    ],
    ids=["free", "the last two protected"],
)
def test_an_infinite_score_ranks_above_the_largest_number(protect: Tensor | None, kept: dict[int, list[int]]) -> None:
    most = torch.finfo(torch.float32).max
    scores = torch.tensor([[[most, 0.0, INFINITY, -most, NAN]]])
    for budget, expected in kept.items():
        args = SelectArgs(scores=scores, budget=budget, across_heads=False, protect=protect)
        assert select(args)[0].flatten().tolist() == expected
