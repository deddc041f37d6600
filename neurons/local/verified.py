"""Whether a validator's ledger lost or doubled anything, computed from the log of its rounds alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from condense_core.neurons.incentive.standing import Standings
from condense_core.neurons.validating.ledger import Ledger


def problems(ledger: Ledger, miners: Collection[str]) -> list[str]:
    """What is wrong, a line each; empty where all is well. Audits are in no round, so there must have been none.

    miners: hotkeys that may have been asked.
    """
    return list(_problems(ledger, set(miners)))


def _problems(ledger: Ledger, miners: set[str]) -> Iterator[str]:
    played = ledger.rows("SELECT number, tier, counts FROM rounds ORDER BY number")
    numbers = [number for number, _, _ in played]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"rounds: {len(numbers)} are written down, the last has the number {max(numbers, default=0)}"
    outcomes: dict[int, dict[str, float]] = {number: {} for number in numbers}
    for number, hotkey, value, share, score in ledger.rows("SELECT round, hotkey, value, share, score FROM outcomes"):
        if number not in outcomes:
            yield f"round {number}: has an outcome and is not written down"
            continue
        outcomes[number][hotkey] = value
        if value != json.loads(score)["value"] * share:
            yield f"round {number}: the value of {hotkey} is not its score times its share"
    standings = Standings()
    for number, tier, counts in played:
        asked = set(outcomes[number])
        if left_out := set(standings.by_tier.get(tier, {})) - asked:
            yield f"round {number}: {', '.join(sorted(left_out))} had no outcome"
        if unknown := asked - miners:
            yield f"round {number}: {', '.join(sorted(unknown))} is no miner"
        if bool(counts) != any(value > 0 for value in outcomes[number].values()):
            yield f"round {number}: is marked as one that counts, or does not, wrongly"
        standings.add(tier, outcomes[number])
    if standings.by_tier != ledger.standings.by_tier:
        yield "standings: those that are written down are not those that the rounds give"


def counted(ledger: Ledger) -> dict[str, Any]:
    """How much there is of what ``problems`` has looked at."""
    [(rounds,)] = ledger.rows("SELECT count(*) FROM rounds")
    [(outcomes,)] = ledger.rows("SELECT count(*) FROM outcomes")
    [(scored,)] = ledger.rows("SELECT count(*) FROM outcomes WHERE value > 0")
    return {"rounds": rounds, "outcomes": outcomes, "scored": scored}
