"""A score is absolute, bounded, and never better for a worse answer; what needs no work is worth nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condense_core.neurons.incentive.score import Reading, Reference, failed, score
from condense_core.neurons.tiers import read_tiers

TIER = read_tiers().tiers["research"]  # ratios 2 to 16, 8 s, floor 0.5, weight of efficiency 0.2
FULL, NONE = Reading((1.0, 2.0), (1.0, 1.0)), Reading((5.0, 6.0), (0.0, 0.0))
REFERENCE = Reference(FULL, NONE)


def value(reading: Reading, reference: Reference = REFERENCE, rows: int = 250, seconds: float = 1.0) -> float:
    return score(reading, reference, TIER, context_tokens=1000, soft_tokens=rows, seconds=seconds).value


def test_the_score_of_a_good_answer_is_what_the_formula_gives() -> None:
    found = score(Reading((2.0, 3.0), (1.0, 0.5)), REFERENCE, TIER, context_tokens=1000, soft_tokens=250, seconds=2.0)
    assert found.recovered == pytest.approx(0.75)  # 6 of 8 nats
    assert found.correctness == pytest.approx(0.75)
    assert found.quality == pytest.approx(0.5625)
    assert found.efficiency == pytest.approx((math.log(2) / math.log(8) + 0.75) / 2)  # 4x of 2x to 16x; 2 of 8 s
    assert found.value == pytest.approx(0.5625 * (0.8 + 0.2 * found.efficiency))


def test_the_full_context_itself_is_worth_its_quality_and_nothing_is_worth_nothing() -> None:
    assert value(FULL, rows=500, seconds=8.0) == pytest.approx(0.8)
    assert value(NONE) == 0.0


def test_below_the_floor_of_quality_efficiency_is_worth_nothing() -> None:
    poor = Reading((3.0, 4.0), (0.0, 1.0))  # recovered 0.5, correctness 0.5
    assert value(poor, rows=63, seconds=0.0) == value(poor, rows=500, seconds=7.9) == pytest.approx(0.25 * 0.8)


def test_what_a_trivial_compression_gives_is_worth_nothing() -> None:
    trivial = Reading((3.0, 4.0), (0.5, 0.5))
    reference = replace(REFERENCE, trivial=(trivial, Reading((4.0, 4.0), (0.0, 0.0))))
    assert value(trivial, reference) == 0.0
    assert value(Reading((3.5, 4.5), (0.5, 0.5)), reference) == 0.0
    assert value(FULL, reference, rows=500, seconds=8.0) == pytest.approx(0.8)  # all that can be had beyond it
    assert 0 < value(Reading((2.0, 3.0), (1.0, 1.0)), reference) < value(Reading((2.0, 3.0), (1.0, 1.0)))


def test_a_challenge_that_a_trivial_compression_solves_tells_nothing() -> None:
    assert replace(REFERENCE, trivial=(NONE,)).is_telling
    solved = replace(REFERENCE, trivial=(NONE, FULL))
    assert (solved.free, solved.is_telling) == (1.0, False)
    with pytest.raises(ValueError, match="telling"):
        value(FULL, solved)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_worth_nothing(loss: float) -> None:
    assert value(Reading((loss, 1.0), (1.0, 1.0))) == 0.0


def test_a_loss_below_the_full_contexts_is_worth_no_more_than_it() -> None:
    assert value(Reading((0.0, 0.0), (1.0, 1.0))) == value(FULL)


@pytest.mark.parametrize(
    "none", [Reading((1.0, 2.0), (1.0, 1.0)), Reading((0.5, 1.0), (0.0, 0.0)), Reading((math.inf, 1.0), (0.0, 0.0))]
)
def test_a_context_that_does_not_help_scores_nobody(none: Reading) -> None:
    reference = Reference(FULL, none)
    assert not reference.is_telling
    with pytest.raises(ValueError, match="expected a challenge that is telling"):
        value(FULL, reference)


def test_where_the_llm_gets_nothing_right_with_the_full_context_nobody_scores() -> None:
    """Vectors that make answers likely in general have low losses, and no answer right."""
    reference = Reference(replace(FULL, correct=(0.0, 0.0)), NONE)
    assert not reference.is_telling
    assert value(replace(FULL, correct=(0.0, 0.0))) == 0.0


def test_readings_must_be_of_the_same_questions() -> None:
    with pytest.raises(ValueError, match="reading: of 1 questions, expected 2"):
        value(Reading((1.0,), (1.0,)))
    with pytest.raises(ValueError, match="got 2 and 1, expected one of each a question"):
        Reading((1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match="expected numbers in"):
        Reading((1.0,), (1.5,))


def test_a_failure_says_why() -> None:
    assert failed("late", 8.1).value == 0.0
    assert failed("late", 8.1).why == "late"


# -- properties --------------------------------------------------------------------------------------------------------

losses = st.floats(0, 20)
shares = st.floats(0, 1)
rows, times = st.integers(1, 1000), st.floats(0, 8)


@st.composite
def readings(draw: st.DrawFn, count: int = 3) -> Reading:
    return Reading(tuple(draw(losses) for _ in range(count)), tuple(draw(shares) for _ in range(count)))


@st.composite
def references(draw: st.DrawFn) -> Reference:
    full, trivial = draw(readings()), tuple(draw(st.lists(readings(), max_size=3)))
    full = replace(full, correct=(1.0, *full.correct[1:]))  # something is right
    none = Reading(tuple(x + draw(st.floats(0.2, 10)) for x in full.losses), draw(readings()).correct)
    made = Reference(full, none, trivial)
    return made if made.is_telling else Reference(full, none)


@given(readings(), references(), rows, times)
def test_a_score_and_its_parts_lie_in_0_to_1(reading: Reading, reference: Reference, k: int, s: float) -> None:
    found = score(reading, reference, TIER, context_tokens=1000, soft_tokens=k, seconds=s)
    for part in (found.value, found.recovered, found.correctness, found.quality, found.efficiency):
        assert 0 <= part <= 1


@given(readings(), references(), rows, times, st.integers(0, 2), st.floats(0, 5), shares)
def test_a_worse_loss_or_a_wronger_answer_never_pays(
    reading: Reading, reference: Reference, k: int, s: float, at: int, more: float, less: float
) -> None:
    worse_losses = tuple(x + more * (i == at) for i, x in enumerate(reading.losses))
    worse_correct = tuple(c * less if i == at else c for i, c in enumerate(reading.correct))
    worse = value(Reading(worse_losses, worse_correct), reference, k, s)
    assert worse <= value(reading, reference, k, s) + 1e-12


@given(readings(), references(), rows, times, times, rows)
def test_more_soft_tokens_and_more_time_never_pay(
    reading: Reading, reference: Reference, k: int, s: float, later: float, more: int
) -> None:
    assert value(reading, reference, k + more, s + later) <= value(reading, reference, k, s) + 1e-12
