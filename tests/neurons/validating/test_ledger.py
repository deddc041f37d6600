"""The ledger: a round is written down whole or not at all, and what is written is what is counted."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from condense_core.neurons.incentive.standing import Standings
from condense_core.neurons.tiers import read_tiers
from condense_core.neurons.validating.board import board
from condense_core.neurons.validating.ledger import FILE, Ledger, LedgerError
from condense_testing.subnets import metagraph_of, played_round

SUPPORT = Path(__file__).resolve().parents[2] / "support"


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    one = played_round({"a": 0.5, "b": 0.0}, body=b"body")
    assert ledger.record(one) == 1
    ledger.close()
    again = Ledger(tmp_path)
    assert again.round(1) == one
    assert again.newest() == again.newest("research") == 1
    assert again.newest("inference_0") is None
    expected = Standings()
    expected.add("research", one.values)
    assert again.standings == expected
    with pytest.raises(ValueError, match="got 2, expected one of 1 to 1"):
        again.round(2)


def test_standings_are_those_of_the_log(tmp_path: Path) -> None:
    ledger, expected = Ledger(tmp_path), Standings()
    for number in range(12):
        one = played_round({"a": 0.9, "b": number / 20, "c": 0.0} if number % 5 else {"a": 0.0, "b": 0.0})
        ledger.record(one)
        expected.add("research", one.values)
    ledger.close()
    reopened = Ledger(tmp_path)
    assert reopened.standings == expected
    recomputed = Standings()
    for number in range(1, 13):
        recomputed.add("research", reopened.round(number).values)
    assert recomputed == expected


def test_a_kill_at_any_moment_loses_the_running_round_at_most(tmp_path: Path) -> None:
    """A process that writes as fast as it can is killed again and again; log and standings always belong together."""
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(SUPPORT)!r})\n"
        "from condense_testing.subnets import played_round\n"
        "from condense_core.neurons.validating.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "print('open', flush=True)\n"
        "while True:\n"
        "    ledger.record(played_round({'a': 0.9, 'b': 0.3}, body=b'x' * 20000)); print('.', end='', flush=True)\n"
    )
    seen = 0
    for delay in (0.0, 0.05, 0.2):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        told = writer.stdout.read().count(".")
        writer.wait(10)
        ledger = Ledger(tmp_path)
        count = ledger.newest() or 0
        assert seen + told <= count <= seen + told + 1
        expected = Standings()
        for _ in range(count):
            expected.add("research", {"a": 0.9, "b": 0.3})
        assert ledger.standings == expected
        assert [row[0] for row in ledger.rows("SELECT number FROM rounds ORDER BY number")] == list(range(1, count + 1))
        seen = count
        ledger.close()
    assert seen > 3


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(played_round({"a": 0.5}))
    before = ledger.standings
    [(pages,)] = ledger.rows("PRAGMA page_count")
    ledger.rows(f"PRAGMA max_page_count = {pages}")  # as if the disk was full
    with pytest.raises(LedgerError, match=r"validator.db cannot be written \(.*full"):
        ledger.record(played_round({"a": 1.0}, body=b"x" * 100_000))
    assert ledger.standings == before
    assert ledger.newest() == 1
    ledger.rows("PRAGMA max_page_count = 1000000")
    assert ledger.record(played_round({"a": 1.0}, body=b"x" * 100_000)) == 2


def test_one_process_writes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(ValueError, match="another validator works in"):
        Ledger(tmp_path)
    ledger.record(played_round({"a": 0.5}))
    reader = Ledger(tmp_path, writes=False)  # beside it
    assert reader.newest() == 1
    reader.close()
    ledger.close()
    Ledger(tmp_path).close()


@pytest.mark.parametrize("content", [b"no database" * 50, b"SQLite format 3\x00" + b"\xff" * 200])
def test_what_is_no_ledger_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"state: .*validator.db cannot be used") as caught:
        Ledger(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"holds no validator\.db"):
        Ledger(tmp_path / "nowhere", writes=False)
    with pytest.raises(ValueError, match="cannot be used"):
        Ledger(tmp_path / FILE / "below")


def test_a_ledger_of_another_version_is_left_as_it_is(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("UPDATE meta SET value = '9' WHERE name = 'schema'")
    with pytest.raises(ValueError, match="is of version 9, expected 1"):
        Ledger(tmp_path)


def test_a_standing_goes_with_its_uid_and_not_with_a_gap_in_the_metagraph(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(played_round({"a": 0.5, "b": 0.6, "c": 0.7}))
    assert ledger.keep(metagraph_of("a", "b")) == []  # the uid 2 is nobody's: a part of the metagraph is missing
    assert ledger.keep(metagraph_of()) == []
    assert ledger.keep(metagraph_of("b", "a", "c")) == []  # other uids
    assert ledger.keep(metagraph_of("a", "new", "c")) == ["b"]
    assert set(ledger.standings.by_tier["research"]) == {"a", "c"}
    ledger.close()
    assert set(Ledger(tmp_path).standings.by_tier["research"]) == {"a", "c"}


def test_bodies_are_kept_within_bounds(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, body_bytes=2500)
    for name in "abcd":
        ledger.record(played_round({name: 0.5}, body=name.encode() * 1000))
    assert [bool(ledger.round(number).bodies) for number in range(1, 5)] == [False, False, True, True]


def test_an_audit_counts_as_a_round(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for _ in range(5):
        ledger.record(played_round({"a": 1.0, "b": 1.0}))
    ledger.count("research", "a", 0, 0.0)
    assert ledger.standings.value("research", "a") < ledger.standings.value("research", "b")
    ledger.close()
    assert Ledger(tmp_path).standings.by_tier["research"]["a"].rounds == 6


def test_the_leaderboard_says_who_earns_what_and_how_that_came(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert board(ledger, read_tiers())["tiers"][0]["miners"] == []
    for _ in range(4):
        ledger.record(played_round({"a": 0.8, "b": 0.4, "c": 0.0}))
    ledger.record(played_round({"a": 0.2}, tier="inference_0"))
    ledger.set_weights(9.0, 5, {"a": 1.0})
    shown = board(ledger, read_tiers(), uid=3)
    research = shown["tiers"][0]
    assert (shown["uid"], research["name"], research["share"]) == (3, "research", 1.0)
    assert [miner["hotkey"] for miner in research["miners"]] == ["a", "b", "c"]
    assert [round(miner["weight"], 3) for miner in research["miners"]] == [0.8, 0.2, 0.0]  # 0.8^2 to 0.4^2
    assert research["miners"][2]["last"]["why"] == "late: 9 s"
    assert research["history"]["rounds"] == [1, 2, 3, 4]
    assert research["history"]["values"]["b"] == [0.4] * 4
    assert shown["weights"] == {"at": 9.0, "block": 5, "weights": {"a": 1.0}}
    other: dict[str, Any] = shown["tiers"][1]
    assert other["history"]["values"] == {"a": [0.2]}
