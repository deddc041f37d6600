"""The CPU kernel of select against the specification: the same integers, whatever the scores."""

import pytest
import torch
from torch import Tensor

from condense_core.ops import native, reference
from condense_core.ops.arguments import SelectArgs
from condense_core.ops.cpu.select import select

# Nothing to round: the result is a choice.
TOLERANCES = {"rtol": 0, "atol": 0}
INFINITY, NAN = float("inf"), float("nan")


def check(scores: Tensor, budget: int, protect: Tensor | None = None) -> None:
    for across_heads in (False, True):
        actual = select(SelectArgs(scores, budget, across_heads, protect))
        expected = reference.select(scores, budget, across_heads, protect)
        for mine, theirs in zip(actual, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape
            torch.testing.assert_close(mine, theirs, **TOLERANCES)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# One token, less than a vector, whole vectors and a rest, more than a block of keys; none.
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 2, 160), (2, 1, 333), (1, 2, 9001), (1, 2, 0)], ids=str)
def test_it_equals_the_reference(shape: tuple[int, ...]) -> None:
    n = shape[2]
    for budget in sorted({0, 1, n // 3, n // 2, max(n - 1, 0), n, n + 5}):
        check(drawn(*shape), budget)


# Scores that differ in their last bits only, or not at all; of both signs, denormal, huge; ranks of chunks.
SCORES = {
    "last bits": 1.0 + torch.arange(2 * 500).remainder(37).view(1, 2, 500) * 2.0**-23,
    "equal": torch.full((1, 3, 100), -2.5),
    "zeros": drawn(1, 2, 300).sign() * 0.0,
    "denormal": drawn(1, 2, 300) * 1e-40,
    "wide": drawn(1, 2, 300) * 10.0 ** (38 * drawn(1, 2, 300, seed=1).clamp(-1, 1)),
    "ranks": drawn(1, 2, 16, 64).argsort(-1).flatten(2) / 64,
    "norms": -(11 + 0.1 * drawn(2, 2, 2000)),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_scores_that_are_close_or_far_apart(scores: Tensor) -> None:
    for budget in (1, 33, scores.shape[2] // 2):
        check(scores, budget)


@pytest.mark.usefixtures("isa")
def test_infinities_and_nan() -> None:
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
    check(torch.full((2, 2, 50), -INFINITY), 20, torch.tensor([[[0, 9]]]))
    check(torch.full((2, 2, 50), NAN), 20, torch.tensor([[[40, 45]]]))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_protected_ranges(index: torch.dtype) -> None:
    scores = drawn(2, 2, 9000)
    for ranges in ([[[0, 4], [8000, 9000]]], [[[5, 6]], [[4090, 4100]]], [[[20, 20]], [[9, 3]]]):
        protect = torch.tensor(ranges, dtype=index)
        for budget in (3, 1000, 4500):
            check(scores, budget, protect)
    check(scores, 100, torch.zeros(1, 0, 2, dtype=index))
    check(scores, 40, torch.tensor([[[1, 9, 10, 30]]], dtype=index)[..., ::2])


@pytest.mark.usefixtures("isa")
def test_strides_do_not_matter() -> None:
    scores = drawn(3, 200, 2)
    check(scores.transpose(1, 2), 50)
    check(drawn(2, 3, 400)[..., ::2], 50)
    check(drawn(1, 3, 200).expand(2, 3, 200), 50)
    check(drawn(2, 3, 400)[:, :, 7:133], 50)


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_it() -> None:
    scores, before = drawn(2, 5, 3000), torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            check(scores, 1000)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
def test_it_writes_only_its_own() -> None:
    scores = drawn(1, 3, 100)
    for budget in (1, 7, 16, 50):
        guarded = torch.full((3 * budget + 64,), -7)
        indices, counts = guarded[32 : 32 + 3 * budget].view(1, 3, budget), torch.empty(1, 3, dtype=torch.int64)
        native.call(
            "select",
            scores=scores,
            budget=budget,
            across_heads=False,
            protect=None,
            indices=indices,
            counts=counts,
        )
        assert torch.equal(indices, reference.select(scores, budget)[0])
        assert (guarded[:32] == -7).all()
        assert (guarded[-32:] == -7).all()


@pytest.mark.usefixtures("isa")
def test_an_infinite_score_ranks_above_the_largest_number() -> None:
    scores = torch.tensor([[[torch.finfo(torch.float32).max, 0.0, INFINITY, torch.finfo(torch.float32).min, NAN]]])
    for budget, kept in ((1, [2]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])):
        assert select(SelectArgs(scores, budget, False, None))[0].flatten().tolist() == kept
    protect = torch.tensor([[[3, 5]]])
    for budget, kept in ((1, [2]), (2, [2, 3]), (3, [2, 3, 4]), (4, [0, 2, 3, 4])):
        assert select(SelectArgs(scores, budget, False, protect))[0].flatten().tolist() == kept
