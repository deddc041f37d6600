"""A race ends in time with what it wanted, asks no more than it must, and leaves nothing running."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random

import pytest

from condense_core.neurons.routing.race import SPARE, race


@dataclass
class Track:
    """Candidates: seconds until each ends, and whether it succeeds. What was begun, and what runs."""

    runs: dict[int, tuple[float, bool]]
    begun: list[tuple[int, float]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    cancelled: int = 0

    async def attempt(self, number: int) -> int | None:
        self.begun.append((number, asyncio.get_running_loop().time()))
        self.running += 1
        self.most = max(self.most, self.running)
        seconds, good = self.runs[number]
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return number if good else None

    def order(self) -> list[int]:
        return [number for number, _ in self.begun]


def run(track: Track, *, want: int = 1, timeout: float = 5.0, patience: float = 1.0) -> tuple[list[int], float]:
    async def use() -> tuple[list[int], float]:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        found = await race(
            sorted(track.runs),
            track.attempt,
            want=want,
            until=begun + timeout,
            patience=lambda _, left: min(patience, left / 3),
        )
        assert track.running == 0
        assert len(asyncio.all_tasks()) == 1
        return found, loop.time() - begun

    return asyncio.run(use())


def test_the_first_is_enough_where_it_answers() -> None:
    track = Track(dict.fromkeys(range(9), (0.01, True)))
    assert run(track)[0] == [0]
    assert track.order() == [0]


def test_a_failure_is_followed_by_the_next_at_once() -> None:
    track = Track({0: (0.0, False), 1: (0.01, False), 2: (0.0, True), 3: (0.0, True)})
    found, seconds = run(track)
    assert (found, track.order()) == ([2], [0, 1, 2])
    assert seconds < 0.5


def test_beside_a_slow_one_the_next_is_asked_and_the_first_answer_wins() -> None:
    track = Track({0: (60.0, True), 1: (0.0, True), 2: (0.0, True)})
    found, seconds = run(track, patience=0.1)
    assert (found, track.order(), track.cancelled) == ([1], [0, 1], 1)
    assert 0.08 < seconds < 1.0


def test_a_slow_one_still_wins_where_it_is_first() -> None:
    track = Track({0: (0.2, True), 1: (60.0, True)})
    assert run(track, patience=0.05)[0] == [0]
    assert track.order() == [0, 1]


def test_tarpits_are_given_up_so_that_one_behind_them_is_reached_in_time() -> None:
    track = Track(dict.fromkeys(range(9), (60.0, True)) | {9: (0.0, True)})
    found, seconds = run(track, timeout=3.0, patience=0.1)
    assert found == [9]
    assert seconds < 2.5
    assert track.most <= 1 + SPARE + 1  # one more for the moment in which the oldest ends


def test_k_answers_are_waited_for_and_failures_among_them_replaced() -> None:
    track = Track({0: (0.1, True), 1: (0.0, False), 2: (0.05, True), 3: (0.0, True), 4: (0.0, True)})
    assert run(track, want=3)[0] == [3, 2, 0]
    assert track.order() == [0, 1, 2, 3]


def test_at_the_end_of_the_time_what_came_counts() -> None:
    track = Track({0: (0.0, True), 1: (60.0, True), 2: (60.0, True)})
    found, seconds = run(track, want=2, timeout=0.3)
    assert found == [0]
    assert 0.25 < seconds < 0.6


def test_no_candidate_is_no_answer_at_once() -> None:
    assert run(Track({}))[0] == []


def test_a_cancelled_race_leaves_nothing_running() -> None:
    track = Track(dict.fromkeys(range(5), (60.0, True)))

    async def use() -> None:
        task = asyncio.ensure_future(
            race(range(5), track.attempt, want=3, until=asyncio.get_running_loop().time() + 60, patience=lambda *_: 60)
        )
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (track.cancelled, track.running) == (3, 0)

    asyncio.run(use())


@pytest.mark.parametrize("seed", range(8))
def test_whatever_candidates_do_it_ends_in_time_with_what_was_wanted_if_that_was_there(seed: int) -> None:
    rng = Random(seed)
    runs = {n: (rng.choice([0.0, 0.01, 0.05, 60.0]), rng.random() < 0.5) for n in range(rng.randint(1, 12))}
    want = rng.randint(1, 4)
    track = Track(runs)
    found, seconds = run(track, want=want, timeout=0.6, patience=0.03)
    assert seconds < 0.9
    assert len(found) == len(set(found)) <= want
    assert all(runs[number][1] and runs[number][0] < 60 for number in found)
    assert len(track.order()) == len(set(track.order()))
    if (found and len(found) < want) or not found:  # then all were asked, but for those that time or room kept out
        quick = [n for n, (seconds, good) in runs.items() if good and seconds < 60]
        assert len(found) == len(quick) or seconds > 0.5
