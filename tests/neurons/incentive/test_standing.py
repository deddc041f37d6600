"""Standings and weights: of hotkeys, forgetting, soon alike for all validators, and by the tiers' shares."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condense_core.neurons.incentive.standing import DECAY, RIPE, Standing, Standings, weights
from condense_core.neurons.tiers import read_tiers

TIERS = read_tiers()
EVEN = {"research": 0.5, "inference_0": 0.25, "inference_1": 0.25}
HALF_LIFE = math.ceil(math.log(0.5) / math.log(1 - DECAY))


def after(*scores: float) -> Standing:
    standing = Standing()
    for score in scores:
        standing = standing.after(score)
    return standing


def rounds(*scores: dict[str, float], tier: str = "research") -> Standings:
    standings = Standings()
    for each in scores:
        standings.add(tier, each)
    return standings


def test_a_constant_score_is_the_standing_once_it_is_ripe() -> None:
    assert after(*[0.6] * RIPE).value == pytest.approx(0.6)
    assert after(*[0.6] * 100).value == pytest.approx(0.6)
    assert after(0.6).value == pytest.approx(0.6 / RIPE)
    assert Standing().value == 0.0


def test_half_of_the_past_is_forgotten_in_a_half_life() -> None:
    standing = after(*[1.0] * 200, *[0.0] * HALF_LIFE)
    assert 0.4 < standing.value <= 0.5


def test_a_score_out_of_bounds_is_refused() -> None:
    for score in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="score: got"):
            Standing().after(score)


def test_a_validator_who_begins_late_agrees_within_a_half_life() -> None:
    draw = random.Random(0)
    quality = {f"miner {i}": draw.random() for i in range(16)}
    early, late = Standings(), Standings()
    for number in range(100 + HALF_LIFE):
        scores = {name: min(1.0, max(0.0, draw.gauss(mean, 0.05))) for name, mean in quality.items()}
        early.add("research", scores)
        if number >= 100:
            late.add("research", scores)
    for name in quality:
        assert late.value("research", name) == pytest.approx(early.value("research", name), abs=0.05)


def test_a_hotkey_that_is_gone_is_forgotten_and_one_that_moves_keeps_its_own() -> None:
    standings = rounds(*[{"a": 0.5, "b": 0.9}] * RIPE)
    standings.keep(["a"])
    assert standings.value("research", "b") == 0.0
    shares = {"research": 1.0}
    assert weights(standings, {"a": 7, "new": 3}, TIERS, shares) == {7: 1.0, 3: 0.0}  # b's uid is another's


def test_a_round_in_which_nobody_scored_changes_nothing() -> None:
    standings = rounds(*[{"a": 0.5, "b": 0.9}] * 5)
    before = weights(standings, {"a": 0, "b": 1}, TIERS, {"research": 1.0})
    standings.add("research", {"a": 0.0, "b": 0.0})
    assert weights(standings, {"a": 0, "b": 1}, TIERS, {"research": 1.0}) == before


def test_weights_go_with_the_power_of_the_standing() -> None:
    standings = rounds(*[{"a": 0.4, "b": 0.8}] * RIPE)
    found = weights(standings, {"a": 0, "b": 1}, TIERS, {"research": 1.0})
    assert found == pytest.approx({0: 0.2, 1: 0.8})


def test_a_tier_pays_its_share_and_one_without_miners_leaves_it_to_the_others() -> None:
    standings = rounds(*[{"a": 0.5}] * RIPE)
    for _ in range(RIPE):
        standings.add("inference_0", {"b": 0.1})
    found = weights(standings, {"a": 0, "b": 1, "idle": 2}, TIERS, EVEN)
    assert found == pytest.approx({0: 2 / 3, 1: 1 / 3, 2: 0.0})
    assert weights(standings, {"a": 0, "b": 1}, TIERS, {"research": 0.0, "inference_0": 1.0}) == {0: 0.0, 1: 1.0}


def test_without_anything_earned_the_weights_stay() -> None:
    assert weights(Standings(), {"a": 0}, TIERS, EVEN) is None
    assert weights(rounds(*[{"a": 1.0}] * 3), {"b": 0}, TIERS, EVEN) is None


scored = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), min_size=1)


@given(st.lists(st.tuples(st.sampled_from(sorted(EVEN)), scored), min_size=1, max_size=20))
def test_weights_sum_to_1_and_respect_the_shares(played: list[tuple[str, dict[str, float]]]) -> None:
    standings = Standings()
    for tier, scores in played:
        standings.add(tier, scores)
    uids = {hotkey: uid for uid, hotkey in enumerate("abcdefgh")}
    found = weights(standings, uids, TIERS, EVEN)
    if found is None:
        return
    assert math.fsum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0
    paying = [t for t in EVEN if any(standings.value(t, h) ** 2 > 0 for h in uids)]
    for tier in paying:
        alone = [uid for hotkey, uid in uids.items() if standings.value(tier, hotkey) ** 2 > 0]
        assert math.fsum(found[uid] for uid in alone) >= EVEN[tier] / sum(EVEN[t] for t in paying) - 1e-9


@given(scored, st.permutations("abcdefgh"))
def test_the_order_and_the_number_of_others_do_not_change_a_standing(
    scores: dict[str, float], order: list[str]
) -> None:
    together, alone = Standings(), Standings()
    together.add("research", {name: scores[name] for name in order if name in scores} | {"best": 1.0})
    for name, score in scores.items():
        alone.add("research", {name: score, "best": 1.0})
        assert alone.value("research", name) == together.value("research", name)
