"""A benchmark here is a contest: calls of the op alternate with those of its rivals, and the table names the goals."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench import measure


@dataclass(frozen=True)
class Goal:
    """At least `value` times as fast as `rival`, or, with unit "MiB", at most so much temporary memory."""

    rival: str
    value: float
    unit: str = "x"


@dataclass
class Result:
    """A row of the table: median milliseconds of each, and the goals with what was reached."""

    name: str
    ours_ms: float
    rivals_ms: dict[str, float]
    goals: list[tuple[Goal, float]]
    notes: list[str] = field(default_factory=list)


RESULTS: list[Result] = []


class Contest:
    """`contest(ours, rivals, goals)`: times `ours` with pytest-benchmark, every round after one call of each rival."""

    def __init__(self, benchmark: Any, name: str) -> None:
        """For one test."""
        self._benchmark, self._name = benchmark, name

    def __call__(
        self,
        ours: Callable[[], Any],
        rivals: Mapping[str, Callable[[], Any]],
        goals: tuple[Goal, ...] = (),
        *,
        seconds: float = 3.0,
    ) -> Result:
        """Run it; about `seconds` in all, 15 to 200 rounds."""
        started = time.perf_counter()
        for call in (ours, *rivals.values()):
            call()
        rounds = max(15, min(200, int(seconds / (time.perf_counter() - started))))
        times: dict[str, list[float]] = {name: [] for name in rivals}

        def turn() -> None:
            for name, call in rivals.items():
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))

        self._benchmark.pedantic(ours, setup=turn, rounds=rounds, warmup_rounds=2)
        ours_ms = 1e3 * self._benchmark.stats.stats.median
        rivals_ms = {name: statistics.median(values) for name, values in times.items()}
        reached = []
        for goal in goals:
            if goal.unit == "MiB":
                reached.append((goal, (measure.temporaries(ours, torch.device("cpu")) or 0) / 2**20))
            else:
                reached.append(
                    (goal, min(ms for name, ms in rivals_ms.items() if name.startswith(goal.rival)) / ours_ms)
                )
        result = Result(self._name, ours_ms, rivals_ms, reached)
        self._benchmark.extra_info.update(rivals_ms=rivals_ms, reached=[(str(goal), value) for goal, value in reached])
        RESULTS.append(result)
        return result


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Contest:
    """Times one op against its rivals."""
    return Contest(benchmark, request.node.name.removeprefix("test_"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The contests in one table: times in ms, goals with what was reached."""
    if not RESULTS:
        return
    terminalreporter.section("contests, median ms, calls in turns")
    for result in RESULTS:
        rivals = ", ".join(f"{name} {ms:.2f}" for name, ms in result.rivals_ms.items())
        terminalreporter.write_line(f"{result.name}: {result.ours_ms:.3f} ms; {rivals}")
        for goal, value in result.goals:
            met = value <= goal.value if goal.unit == "MiB" else value >= goal.value
            wanted = f"<= {goal.value} MiB" if goal.unit == "MiB" else f">= {goal.value}x {goal.rival}"
            terminalreporter.write_line(f"    {wanted}: {value:.2f} {'met' if met else 'MISSED'}")
        for note in result.notes:
            terminalreporter.write_line(f"    {note}")
