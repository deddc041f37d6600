"""What a measurement should reach: one notion of a goal for ops, layers, decode steps, prefills, memory and serving."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# How each kind of goal is written, with `value`, `over` and, behind the colon, what was `reached`.
_AT_LEAST = {
    "speed-up": ("at least {value:.3g}x {over}", "{reached:.2f}x"),
    "bandwidth": ("at least {value:.0%} of a copy's bandwidth", "{reached:.0%}"),
    "floor": ("at least {value:.0%} of the floor", "{reached:.0%}"),
    "llm": ("at least {value:.0%} of wall time in the LLM", "{reached:.1%}"),
    "rate": ("at least {value:.0f} {over} a second", "{reached:,.0f}"),
}
_AT_MOST = {
    "us": ("at most {value:.3g} us", "{reached:.1f} us"),
    "temporaries": ("at most {value:.3g} MiB of temporaries", "{reached:.2f} MiB"),
    "layer": ("at most {value:.0%} of a layer's prefill", "{reached:.1%}"),
    "overhead": ("at most {value:.0%} of the prefill", "{reached:.1%}"),
    "peak": ("at most {value:.0%} of the peak of {over}", "{reached:.0%}"),
    "ms": ("at most {value:.3g} ms {over}", "{reached:.2f} ms"),
    "count": ("at most {value:.0f} {over}", "{reached:.0f}"),
    "activations": ("at most {value:.3g}x one layer's activations beside the weights", "{reached:.2f}x"),
    "growth": ("at most {value:.3g} MB a minute", "{reached:+.2f} MB"),
}


@dataclass(frozen=True)
class Goal:
    """`value` of `kind`, to be reached or kept below.

    Attributes:
        kind: at least: "speed-up", a ratio of median times, over the fastest variant whose name starts with `over`;
            "bandwidth", a share of what a large copy moves a second, read and written bytes counted; "floor", of the
            least time that the operations take over the measured one; "llm", of wall time inside the LLM; "rate", how
            many of `over` a second. At most: "us", microseconds; "temporaries", MiB beyond inputs and outputs; "layer",
            a share of a layer's time in the prefill; "overhead", a share of the whole prefill's time; "peak", a share
            of the peak memory of `over`; "ms", milliseconds of `over`; "count", how many of `over`; "activations", peak
            memory beside the weights over the activations of one layer; "growth", MB of memory a minute.
        value: a ratio or share as a number (0.5 for 50%), or a number of the unit.
        over: the rival, where the kind has one.
    """

    kind: str
    value: float
    over: str = ""

    def __post_init__(self) -> None:
        """Refuse a kind that nobody would judge."""
        if self.kind not in _AT_LEAST | _AT_MOST:
            raise ValueError(f"kind: {self.kind!r}, expected one of {', '.join(_AT_LEAST | _AT_MOST)}")

    def judge(self, reached: float | None) -> dict[str, Any]:
        """The goal's fields with `reached` and `met`; both None where nothing was measured."""
        met = None if reached is None else reached <= self.value if self.kind in _AT_MOST else reached >= self.value
        return {**asdict(self), "reached": reached, "met": met}


def judged(goals: tuple[Goal, ...], speed_ups: Mapping[str, float], reached: Mapping[str, float | None]) -> list[Any]:
    """All goals with what was reached: speed-ups over rivals by name, of other kinds what `reached` has."""
    verdicts = []
    for goal in goals:
        if goal.kind == "speed-up":
            verdicts.append(goal.judge(min((r for n, r in speed_ups.items() if n.startswith(goal.over)), default=None)))
        else:
            verdicts.append(goal.judge(reached.get(goal.kind)))
    return verdicts


def sentence(verdict: Mapping[str, Any]) -> str:
    """A judged goal in words, such as `at least 6x topk + sort: 10.93x, met`."""
    wanted, reached = (_AT_LEAST | _AT_MOST)[verdict["kind"]]
    if verdict["reached"] is None:
        return f"{wanted.format(**verdict)}: not measured"
    return f"{wanted.format(**verdict)}: {reached.format(**verdict)}, {'met' if verdict['met'] else 'MISSED'}"
