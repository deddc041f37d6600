"""Who may ask a miner, how often, and with which priority."""

from __future__ import annotations

from dataclasses import replace

import pytest

from condense_core.neurons.chain.base import Metagraph, Neuron
from condense_core.neurons.mining.gate import Forbidden, Gate, GateSettings, NotReady
from condense_core.serving.errors import RateLimited

ROW = Neuron(0, "big", "cold", None, True, 3000.0, 0.0, True, 0, 0, 0.0, 0.0, 0.0)
ROWS = (
    ROW,
    replace(ROW, uid=1, hotkey="small", stake=1000.0),
    replace(ROW, uid=2, hotkey="miner", validator_permit=False),
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def gate(rows: tuple[Neuron, ...] = ROWS, clock: Clock | None = None, **settings: object) -> Gate:
    made = Gate(GateSettings(**settings), clock=clock or Clock())  # type: ignore[arg-type]
    made.update(Metagraph(1, 0, rows, 360, 0, None))
    return made


def asked(one: Gate, hotkey: str, tier: str = "research") -> int:
    """How many requests come through at once."""
    for count in range(10_000):
        try:
            one.check(hotkey)
            one.spend(hotkey, tier)
        except RateLimited:
            return count
    raise AssertionError("no end")


def test_validators_with_a_permit_come_through_by_stake() -> None:
    one = gate()
    assert (one.check("big"), one.check("small")) == (9, 3)
    for hotkey in ("miner", "stranger", ""):
        with pytest.raises(Forbidden, match="expected a validator with a permit and enough stake"):
            one.check(hotkey)


def test_settings_decide_about_permits_stake_and_single_hotkeys() -> None:
    assert gate(require_permit=False).check("miner") == 9
    with pytest.raises(Forbidden):
        gate(min_stake=2000.0).check("small")
    assert gate(min_stake=2000.0, allow=frozenset({"small", "friend"})).check("friend") == 0
    with pytest.raises(Forbidden):
        gate(deny=frozenset({"big"})).check("big")
    with pytest.raises(Forbidden):
        gate(allow=frozenset({"big"}), deny=frozenset({"big"})).check("big")


def test_quotas_go_by_stake_beside_an_even_share() -> None:
    one = gate(requests_per_minute=600.0, even_share=0.2, burst_seconds=60.0)
    assert asked(one, "big") == 420  # 600 * (0.1 + 0.8 * 0.75)
    assert asked(one, "small") == 180  # 600 * (0.1 + 0.8 * 0.25)
    assert asked(one, "small", "inference_0") == 180  # a tier has a quota of its own


def test_a_quota_fills_up_again_and_says_when() -> None:
    clock = Clock()
    one = gate(
        clock=clock, requests_per_minute=60.0, even_share=1.0, burst_seconds=10.0
    )  # half a request a second each
    assert asked(one, "small") == 5
    with pytest.raises(RateLimited, match="30 requests a minute in tier 'research' are over") as caught:
        one.spend("small", "research")
    assert caught.value.retry_after == pytest.approx(2.0)
    clock.now += 2.0
    one.spend("small", "research")
    clock.now += 10_000.0
    one.update(Metagraph(1, 0, ROWS, 360, 0, None))
    assert asked(one, "small") == 5  # no more than a burst is saved up


def test_without_any_stake_callers_are_alike() -> None:
    rows = tuple(replace(row, stake=0.0) for row in ROWS)
    one = gate(rows, requests_per_minute=60.0, burst_seconds=60.0)
    assert (asked(one, "big"), asked(one, "small"), one.check("big")) == (30, 30, 0)


def test_a_caller_that_lost_its_permit_is_refused_at_the_next_look() -> None:
    one = gate()
    one.check("small")
    one.update(Metagraph(1, 1, ROWS[:1], 360, 0, None))
    with pytest.raises(Forbidden):
        one.check("small")


def test_before_the_chain_was_heard_and_long_after_nobody_comes_through() -> None:
    clock = Clock()
    one = Gate(GateSettings(max_age=100.0), clock=clock)
    with pytest.raises(NotReady, match="the chain has not been heard yet"):
        one.check("big")
    one.update(Metagraph(1, 0, ROWS, 360, 0, None))
    assert one.is_ready
    clock.now = 101.0
    assert not one.is_ready
    with pytest.raises(NotReady):
        one.check("big")


@pytest.mark.parametrize(
    "settings", [{"min_stake": -1.0}, {"even_share": 1.1}, {"burst_seconds": float("nan")}, {"max_age": float("inf")}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GateSettings(**settings)  # type: ignore[arg-type]
