"""Intervals and comparisons: against formulas, against resampling one by one, and on data with a known answer."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from condense_core.tasks.confidence import compare, mean_interval, ratio_interval, share_interval
from condense_core.tasks.generators import Turn
from condense_core.tasks.tally import Tally

# Two bootstraps of 10,000 and 4,000 resamples: their bounds differ by some percent of the interval's width.
TOLERANCE = 0.01


def clustered(num_contexts: int, each: int, *, seed: int, spread: float) -> tuple[list[float], list[int]]:
    """Right and wrong answers; ``spread``: how much more likely one context's are right than another's."""
    rng = random.Random(seed)
    chances = [min(max(0.5 + rng.gauss(0, spread), 0.0), 1.0) for _ in range(num_contexts)]
    return [float(rng.random() < p) for p in chances for _ in range(each)], [
        c for c in range(num_contexts) for _ in range(each)
    ]


def test_contexts_are_what_is_resampled() -> None:
    """Written as a loop: draw contexts, take all of their questions, average."""
    values, contexts = clustered(20, 5, seed=0, spread=0.3)
    by_context = [[v for v, c in zip(values, contexts, strict=True) if c == context] for context in range(20)]
    rng = random.Random(1)
    means = sorted(statistics.fmean(v for one in rng.choices(by_context, k=20) for v in one) for _ in range(4000))
    low, high = share_interval(values, contexts) or (0.0, 0.0)
    assert low == pytest.approx(means[100], abs=TOLERANCE)
    assert high == pytest.approx(means[-100], abs=TOLERANCE)


def test_questions_about_one_context_count_for_less_than_as_many_about_different_ones() -> None:
    values = [1.0] * 30 + [0.0] * 30
    together = share_interval(values, [i // 10 for i in range(60)])
    apart = share_interval(values, list(range(60)))
    assert together is not None
    assert apart is not None
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        values, contexts = clustered(30, 10, seed=seed, spread=0.2)
        low, high = share_interval(values, contexts) or (1.0, 0.0)
        held += low <= 0.5 <= high
    assert 0.88 <= held / 200 <= 0.99  # 95% less what a percentile interval of 30 clusters lacks


def test_a_ratio_of_two_methods_is_resampled_in_pairs() -> None:
    """Half of the full context's right answers in every context: the contexts vary, the share does not."""
    full = [float(n) for n in (2, 4, 6, 8, 10)]
    low, high = ratio_interval([n / 2 for n in full], full) or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("above", "below"),
    [([1.0], [2.0]), ([1.0, float("nan")], [2.0, 2.0]), ([1.0, 1.0], [0.0, 0.0]), ([1.0, 1.0], [1.0, -1.0])],
    ids=["one context", "not finite", "nothing to compare with", "a denominator of either sign"],
)
def test_where_there_is_no_interval(above: list[float], below: list[float]) -> None:
    assert ratio_interval(above, below) is None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_answers_are_alike_the_interval_is_not_empty(value: float) -> None:
    low, high = share_interval([value] * 100, [i // 10 for i in range(100)]) or (0.0, 0.0)
    assert (low == 0.0) == (value == 0.0)
    assert (high == 1.0) == (value == 1.0)
    assert high - low == pytest.approx(1 - 0.025 ** (1 / 100))  # 0 of 100 has probability 2.5% at this share


def test_intervals_are_the_same_every_time() -> None:
    values, contexts = clustered(30, 10, seed=3, spread=0.2)
    before = torch.random.get_rng_state()
    assert mean_interval(values, contexts) == mean_interval(values, contexts)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- comparisons -------------------------------------------------------------------------------------------------------


def test_a_method_that_is_better_on_every_context() -> None:
    values, contexts = clustered(12, 10, seed=0, spread=0.1)
    better = [min(v + float(i % 10 == 0), 1.0) for i, v in enumerate(values)]
    found = compare(better, [0.0] * 120, contexts)
    assert found.p == pytest.approx(2 / 2**12)  # of all 4,096 swaps the data and their reverse
    assert found.interval is not None
    assert found.interval[0] > 0
    assert found.first_better == sum(better)
    assert (found.second_better, found.num_questions, found.num_contexts) == (0, 120, 12)
    assert found.difference == pytest.approx(found.first - found.second)


def test_the_order_of_two_methods_changes_the_sign_alone() -> None:
    first, contexts = clustered(30, 10, seed=1, spread=0.1)
    second, _ = clustered(30, 10, seed=2, spread=0.1)
    one, other = compare(first, second, contexts), compare(second, first, contexts)
    assert one.difference == pytest.approx(-other.difference)
    assert one.p == pytest.approx(other.p)
    assert (one.first_better, one.second_better) == (other.second_better, other.first_better)


def test_methods_that_do_not_differ_are_rarely_found_to() -> None:
    found = 0
    for seed in range(100):
        first, contexts = clustered(30, 5, seed=seed, spread=0.2)
        rng = random.Random(seed)
        swaps = [rng.random() < 0.5 for _ in range(30)]
        second = [float(rng.random() < 0.5) for _ in first]
        pairs = [(b, a) if swaps[c] else (a, b) for a, b, c in zip(first, second, contexts, strict=True)]
        found += compare([a for a, _ in pairs], [b for _, b in pairs], contexts).p < 0.05
    assert found <= 13  # 5 expected; 4 standard deviations


def test_equal_methods_and_one_context() -> None:
    same = compare([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0, 0, 1])
    assert (same.difference, same.p) == (0.0, 1.0)
    one = compare([1.0, 1.0], [0.0, 0.0], [0, 0])
    assert (one.interval, one.p) == (None, 1.0)


def test_bad_input() -> None:
    for lists in (([], [], []), ([1.0], [1.0, 2.0], [0]), ([1.0], [1.0], [0, 1])):
        with pytest.raises(ValueError, match="first, second, clusters: got"):
            compare(*lists)


# -- of a row ----------------------------------------------------------------------------------------------------------


def tally_of(answers: list[list[str]], losses: float) -> Tally:
    """Of ten questions about each context, whose answer is ``yes``."""
    tally = Tally()
    tally.answer_ms.append(1.0)
    for tally.context, said in enumerate(answers):
        for answer in said:
            tally.add(Turn("?", "yes", "kind"), answer, losses + 0.1 * tally.context)
    return tally


def test_the_scores_of_a_row_have_intervals() -> None:
    full = tally_of([["yes"] * 8 + ["no"] * 2] * 4, 1.0)
    half = tally_of([["yes"] * 4 + ["no"] * 6] * 4, 2.0)
    none = tally_of([["no"] * 10] * 4, 3.0)
    scores = half.scores(none, full)
    assert scores["share_of_full"] == 0.5
    assert scores["intervals"]["share_of_full"] == pytest.approx([0.5, 0.5])
    assert scores["recovered"] == pytest.approx(0.5)
    assert scores["intervals"]["recovered"] == pytest.approx([0.5, 0.5])
    assert scores["intervals"]["contained"] == pytest.approx([0.4, 0.4])
    low, high = scores["intervals"]["loss"]
    assert 2.0 <= low < 2.15 < high <= 2.3
    assert scores["answers"]["contained"] == half.contained
    assert none.scores(none, full)["intervals"]["contained"][1] > 0.05


def test_a_row_without_controls_and_one_that_has_begun() -> None:
    half = tally_of([["yes"] * 5 + ["no"] * 5] * 3, 2.0)
    scores = half.scores(None, None)
    assert scores["share_of_full"] is None
    assert scores["intervals"]["recovered"] is scores["intervals"]["share_of_full"] is None
    full, begun = tally_of([["yes"] * 10] * 3, 1.0), tally_of([["yes"] * 5 + ["no"] * 5], 2.0)
    assert begun.scores(full, full)["share_of_full"] == 0.5  # of the contexts that both have
    wrong = tally_of([["no"] * 10] * 3, 2.0)
    assert half.scores(wrong, wrong)["share_of_full"] is None
