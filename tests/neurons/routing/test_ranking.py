"""Who is asked first: the best paid or the fastest, failures behind all others, newcomers now and then."""

from __future__ import annotations

from random import Random

from condense_core.neurons.asking.client import Peer
from condense_core.neurons.chain.base import Metagraph, Neuron
from condense_core.neurons.routing.ranking import Ranking

PEERS = [Peer(f"m{n}", "10.0.0.1:1", n) for n in range(6)]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def ranking(*incentives: float, explore: float = 0.0) -> tuple[Ranking, Clock]:
    clock = Clock()
    made = Ranking(explore=explore, clock=clock, rng=Random(1))
    rows = [
        Neuron(n, f"m{n}", "cold", "10.0.0.1:1", False, 0.0, 0.0, True, 0, 0, paid, 0.0, 0.0)
        for n, paid in enumerate(incentives)
    ]
    made.update(Metagraph(1, 0, tuple(rows), 360, 0, None))
    return made, clock


def names(peers: list[Peer]) -> list[int]:
    return [peer.uid for peer in peers]


def test_the_best_paid_come_first_and_equals_share_the_work() -> None:
    made, _ = ranking(0.1, 0.5, 0.2, 0.0, 0.0, 0.0)
    orders = [names(made.best("t", PEERS)) for _ in range(60)]
    assert all(order[:3] == [1, 2, 0] for order in orders)
    assert {order[3] for order in orders} == {3, 4, 5}


def test_the_fastest_come_first_as_measured_in_this_tier() -> None:
    made, _ = ranking(*[0.0] * 6)
    for uid, seconds in ((3, 0.5), (1, 0.1), (2, 0.3)):
        made.answered("t", f"m{uid}", seconds)
    made.answered("other", "m0", 0.01)
    assert names(made.fastest("t", PEERS))[:3] == [1, 2, 3]
    for _ in range(20):
        made.answered("t", "m1", 2.0)
    assert names(made.fastest("t", PEERS))[:3] == [2, 3, 1]


def test_one_that_is_not_measured_leads_now_and_then() -> None:
    made, clock = ranking(*[0.0] * 6, explore=0.2)
    for uid in range(5):
        made.answered("t", f"m{uid}", 0.1 + uid / 100)
    led = [names(made.fastest("t", PEERS))[0] for _ in range(2000)]
    assert set(led) == {0, 5}
    assert 0.15 < led.count(5) / len(led) < 0.25
    clock.now += 601  # what was measured says nothing any more
    assert len({names(made.fastest("t", PEERS))[0] for _ in range(200)}) == 6


def test_who_fails_stands_behind_longer_each_time_and_comes_back() -> None:
    made, clock = ranking(0.9, 0.1, 0.0)
    peers = PEERS[:3]
    paused = []
    for _ in range(10):
        made.failed("t", "m0")
        assert names(made.best("t", peers))[0] == 1
        begun = clock.now
        while names(made.best("t", peers))[0] != 0:
            clock.now += 1
        paused.append(clock.now - begun)
    assert paused[:4] == [5, 10, 20, 40]
    assert paused[-1] == 600
    assert names(made.best("other", peers))[0] == 0


def test_an_answer_forgives_half_of_the_failures() -> None:
    made, clock = ranking(0.9, 0.1)
    for _ in range(4):
        made.failed("t", "m0")
    made.answered("t", "m0", 0.1)
    assert names(made.best("t", PEERS[:2]))[0] == 0
    made.failed("t", "m0")  # the third in effect
    clock.now += 19
    assert names(made.best("t", PEERS[:2]))[0] == 1
    clock.now += 2
    assert names(made.best("t", PEERS[:2]))[0] == 0


def test_one_that_was_given_up_counts_as_slow_and_not_as_faster() -> None:
    made, _ = ranking(0.0, 0.0)
    made.answered("t", "m0", 0.5)
    made.answered("t", "m1", 0.4)
    made.unfinished("t", "m0", 0.01)
    assert made.expected("t", "m0") == 0.5
    made.unfinished("t", "m1", 5.0)
    assert names(made.fastest("t", PEERS[:2])) == [0, 1]


def test_who_leaves_the_subnet_is_forgotten() -> None:
    made, _ = ranking(0.0, 0.0)
    made.answered("t", "m1", 0.5)
    made.update(Metagraph(1, 0, (), 360, 0, None))
    assert made.expected("t", "m1") is None
