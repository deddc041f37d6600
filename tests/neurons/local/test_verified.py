"""What is lost or doubled in a ledger is found from its log alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")

from condense_core.neurons.local.kills import CALM, Kills
from condense_core.neurons.local.verified import counted, problems
from condense_core.neurons.validating.ledger import FILE, Ledger
from condense_testing.subnets import played_round


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a ledger of five rounds, one of which does not count, in two tiers."""
    ledger = Ledger(tmp_path)
    for tier, first, second in (
        ("research", 0.5, 0.1),
        ("inference_0", 0.4, 0.3),
        ("research", 0.0, 0.0),
        ("research", 1 / 3, 0.7),
        ("research", 0.9, 0.0),
    ):
        ledger.record(played_round({"a": first, "b": second}, tier=tier))
    ledger.close()
    return tmp_path


def found(folder: Path, *statements: str) -> list[str]:
    """The problems of the ledger once ``statements`` have changed it."""
    with sqlite3.connect(folder / FILE) as db:
        for statement in statements:
            db.execute(statement)
    ledger = Ledger(folder, writes=False)
    try:
        return problems(ledger, ["a", "b"])
    finally:
        ledger.close()


def test_a_whole_ledger_has_no_problems(folder: Path) -> None:
    assert found(folder) == []
    ledger = Ledger(folder, writes=False)
    assert counted(ledger) == {"rounds": 5, "outcomes": 10, "scored": 7}
    ledger.close()


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE standings SET rounds = rounds + 1 WHERE hotkey = 'a'", "standings: those that are written down"),
        ("UPDATE standings SET total = total + 1e-12 WHERE hotkey = 'b'", "standings: those that are written down"),
        ("DELETE FROM rounds WHERE number = 4", "rounds: 4 are written down, the last has the number 5"),
        ("DELETE FROM outcomes WHERE round = 4 AND hotkey = 'b'", "round 4: b had no outcome"),
        ("UPDATE outcomes SET hotkey = 'c' WHERE round = 4 AND hotkey = 'b'", "round 4: c is no miner"),
        ("UPDATE outcomes SET value = 0.25 WHERE round = 1 AND hotkey = 'a'", "round 1: the value of a is not its"),
        ("UPDATE rounds SET counts = 1 WHERE number = 3", "round 3: is marked as one that counts"),
    ],
)
def test_what_is_lost_or_doubled_is_found(statement: str, expected: str, folder: Path) -> None:
    assert any(problem.startswith(expected) for problem in found(folder, statement)), found(folder)


def test_kills_are_spread_over_the_rounds_and_leave_the_last_ones_calm() -> None:
    for seed in range(50):
        kills = Kills(5, 20, seed=seed)
        assert not kills.is_due(0)
        assert kills.is_due(20 - CALM)
    with pytest.raises(ValueError, match="kills: got 3 rounds"):
        Kills(1, CALM, seed=0)
