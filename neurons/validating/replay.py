"""Computes a round again from its log: whether the scores are what the answers were worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.tiers import Tier
from condense_core.neurons.validating.rounds import Round, again

TOLERANCE = 0.01
"""Of a score: other hardware, or other company in a batch, adds in another order."""


def replayed(played: Round, judge: Judge, tier: Tier) -> list[dict[str, Any]]:
    """For each miner of the round: what was written down, what comes out now, and whether both agree.

    Raises:
        ValueError: an answer that was read is not kept any more.
    """
    lost = [o.hotkey for o in played.outcomes if o.sha256 and o.sha256 not in played.bodies]
    if lost:
        raise ValueError(f"round: the answers of {len(lost)} miners are not kept any more, expected a later round")
    now = {outcome.hotkey: outcome for outcome in again(judge, tier, played)}
    return [
        {
            "uid": then.uid,
            "hotkey": then.hotkey,
            "then": round(then.value, 6),
            "now": round(now[then.hotkey].value, 6),
            "recovered": round(now[then.hotkey].score.recovered, 4),
            "why": now[then.hotkey].score.why,
            "agrees": abs(then.value - now[then.hotkey].value) <= TOLERANCE,
        }
        for then in played.outcomes
    ]


def as_table(number: int, played: Round, rows: Sequence[Mapping[str, Any]]) -> Table:
    """What ``replayed`` found, for a terminal."""
    table = Table(title=f"round {number}, {played.tier}, {len(played.turns)} questions", box=box.SIMPLE)
    for column in ("uid", "hotkey", "then", "now", "recovered", ""):
        table.add_column(column, justify="left" if column in ("hotkey", "") else "right")
    for row in rows:
        told = row["why"] if row["agrees"] else f"differs {row['why']}"
        parts = [f"{row[name]:.4f}" for name in ("then", "now", "recovered")]
        table.add_row(str(row["uid"]), row["hotkey"], *parts, escape(told))
    return table
