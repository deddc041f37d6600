"""What a local subnet looks like while it runs: the validators' leaderboards, as lines of a table."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from condense_core.neurons.local.subnet import Member

Board = Mapping[str, Any]


class Boards:
    """The latest leaderboard of each validator, which is asked for at most every ``every`` seconds."""

    def __init__(self, validators: Sequence[Member], *, every: float = 0.5) -> None:
        self.validators, self.every = validators, every
        self.latest: dict[str, Board] = {}
        """By the validator's name."""
        self._http = httpx.Client(timeout=2.0)
        self._at = 0.0

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def poll(self) -> bool:
        """Ask those that run, where it is time for it; whether there is anything new. Who does not answer is left."""
        if time.monotonic() - self._at < self.every:
            return False
        new = False
        for validator in self.validators:
            try:
                board = self._http.get(f"{validator.url}/leaderboard.json").raise_for_status().json()
            except (httpx.HTTPError, ValueError):
                continue
            before = self.latest.get(validator.name, {}).get("tiers")
            self.latest[validator.name] = board
            new = new or board["tiers"] != before
        self._at = time.monotonic()
        return new


@dataclass(frozen=True)
class Row:
    """A miner in a tier, as the mean of those validators that have asked it; its latest scores.

    Attributes:
        recovered, seconds, score: None where no validator has a last round with it. why: of a score of 0.
    """

    tier: str
    uid: int
    name: str
    kind: str
    standing: float
    weight: float
    recovered: float | None = None
    seconds: float | None = None
    score: float | None = None
    why: str = ""


def rows(boards: Sequence[Board], members: Sequence[Member], tiers: Sequence[str]) -> list[Row]:
    """Lines for ``tiers``, the best miner of each first."""
    known = {member.hotkey: member for member in members}
    found = []
    for tier in tiers:
        seen: dict[str, list[Mapping[str, Any]]] = {}
        for board in boards:
            for shown in (shown for shown in board["tiers"] if shown["name"] == tier):
                for miner in shown["miners"]:
                    seen.setdefault(miner["hotkey"], []).append(miner)
        found += sorted(
            (_row(tier, known[hotkey], own) for hotkey, own in seen.items() if hotkey in known),
            key=lambda row: (-row.standing, row.uid),
        )
    return found


def _row(tier: str, member: Member, own: Sequence[Mapping[str, Any]]) -> Row:
    last = [miner["last"] for miner in own if miner["last"] is not None]
    return Row(
        tier,
        member.uid,
        member.name,
        member.kind,
        _mean([miner["standing"] for miner in own]),
        _mean([miner["weight"] for miner in own]),
        _mean([each["recovered"] for each in last]) if last else None,
        _mean([each["seconds"] for each in last]) if last else None,
        _mean([each["value"] for each in last]) if last else None,
        next((each["why"] for each in last if each["why"]), ""),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def new_rounds(before: Board | None, now: Board) -> list[tuple[str, int, Mapping[str, float | None]]]:
    """The rounds that ``now`` has and ``before`` has not: tier, number, and values by hotkey."""
    known = {} if before is None else {tier["name"]: set(tier["history"]["rounds"]) for tier in before["tiers"]}
    found = []
    for tier in now["tiers"]:
        history = tier["history"]
        for place, number in enumerate(history["rounds"]):
            if number not in known.get(tier["name"], ()):
                values = {hotkey: own[place] for hotkey, own in history["values"].items()}
                found.append((tier["name"], number, values))
    return sorted(found, key=lambda each: each[1])
