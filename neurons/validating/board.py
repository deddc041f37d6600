"""What a validator shows: who earns what in each tier, and how that came about."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from condense_core.neurons.incentive.standing import weights
from condense_core.neurons.tiers import Tiers
from condense_core.neurons.validating.ledger import Ledger

ROUNDS = 120
"""Of each tier, that the history shows."""
_PARTS = ("recovered", "correctness", "quality", "efficiency", "ratio", "seconds", "why")


def board(ledger: Ledger, tiers: Tiers, **facts: Any) -> dict[str, Any]:
    """The leaderboard as JSON; facts: of the validator, beside it.

    ``tiers`` has, for each, its share and its miners by standing, with what each got last, and ``history`` its latest
    rounds: numbers, times, and by hotkey the values, null where a miner was not asked. ``weights`` is the row that was
    last set on the chain, and ``next_weights`` the one that would be set now, by hotkey.
    """
    shares = tiers.shares(datetime.now(UTC))
    rows = ledger.rows("SELECT tier, hotkey, uid, rounds FROM standings")
    uids = {hotkey: uid for _, hotkey, uid, _ in rows}
    coming = weights(ledger.standings, uids, tiers, shares) or {}
    due = {hotkey: coming.get(uid, 0.0) for hotkey, uid in uids.items()}
    set_rows = ledger.rows("SELECT at, block, weights FROM weights ORDER BY number DESC LIMIT 1")
    shown = []
    for name, tier in tiers.tiers.items():
        history = _history(ledger, name)
        last = _last(ledger, history["rounds"][-1]) if history["rounds"] else {}
        miners = [
            {
                "uid": uid,
                "hotkey": hotkey,
                "standing": round(ledger.standings.value(name, hotkey), 4),
                "rounds": rounds,
                "weight": round(due[hotkey], 6),
                "last": last.get(hotkey),
            }
            for own, hotkey, uid, rounds in rows
            if own == name
        ]
        miners.sort(key=lambda miner: (-miner["standing"], miner["uid"]))
        shown.append({"name": name, "model": tier.model, "share": shares[name], "miners": miners, "history": history})
    set_last = [{"at": at, "block": block, "weights": json.loads(row)} for at, block, row in set_rows]
    return {
        **facts,
        "at": time.time(),
        "tiers": shown,
        "weights": set_last[0] if set_last else None,
        "next_weights": {hotkey: round(weight, 6) for hotkey, weight in due.items()},
    }


def _history(ledger: Ledger, tier: str) -> dict[str, Any]:
    rounds = ledger.rows(
        "SELECT number, began, counts FROM rounds WHERE tier = ? ORDER BY number DESC LIMIT ?", tier, ROUNDS
    )[::-1]
    if not rounds:
        return {"rounds": [], "began": [], "counts": [], "values": {}}
    places = {number: place for place, (number, _, _) in enumerate(rounds)}
    values: dict[str, list[float | None]] = {}
    for number, hotkey, value in ledger.rows(
        "SELECT o.round, o.hotkey, o.value FROM outcomes o JOIN rounds r ON r.number = o.round "
        "WHERE r.tier = ? AND o.round >= ?",
        tier,
        rounds[0][0],
    ):
        values.setdefault(hotkey, [None] * len(rounds))[places[number]] = round(value, 4)
    return {
        "rounds": [number for number, _, _ in rounds],
        "began": [began for _, began, _ in rounds],
        "counts": [bool(counts) for _, _, counts in rounds],
        "values": values,
    }


def _last(ledger: Ledger, number: int) -> Mapping[str, dict[str, Any]]:
    found = {}
    for hotkey, value, share, score in ledger.rows(
        "SELECT hotkey, value, share, score FROM outcomes WHERE round = ?", number
    ):
        parts = json.loads(score)
        told = {name: round(parts[name], 4) if isinstance(parts[name], float) else parts[name] for name in _PARTS}
        found[hotkey] = {"round": number, "value": round(value, 4), "share": round(share, 4), **told}
    return found
