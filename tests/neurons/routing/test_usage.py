"""Quotas of days and months hold across restarts, the log has no contents, and a bad disk stops nobody."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest

from condense_core.neurons.routing.usage import FILE, UsageLog, Use, summed
from condense_core.serving.errors import RateLimited, Unauthorized
from condense_core.serving.keys import Keys, new_key


class Clock:
    now = datetime(2026, 11, 28, 23, 0, tzinfo=UTC).timestamp()

    def __call__(self) -> float:
        return self.now


def use(at: float, key: str = "app", code: str = "ok") -> Use:
    return Use(at, key, "research", 1500, 300, 75, "5Miner", 0.25, code)


def spend(log: UsageLog, chars: int, day: float = 1000, month: float = 0, name: str = "app") -> None:
    log.spend(name, chars, per_day=day, per_month=month)


def test_a_day_is_over_at_midnight_and_the_refusal_says_when(tmp_path: Path) -> None:
    clock = Clock()
    log = UsageLog(tmp_path, clock=clock)
    spend(log, 600)
    with pytest.raises(RateLimited, match=r"'app' has sent 600 of its 1,000 characters of 2026-11-28") as refused:
        spend(log, 401)
    assert refused.value.retry_after == 3600
    spend(log, 400)
    spend(log, 1000, name="other")
    clock.now += 3600
    spend(log, 1000)
    log.close()


def test_a_month_counts_its_days_together(tmp_path: Path) -> None:
    clock = Clock()
    log = UsageLog(tmp_path, clock=clock)
    for _ in range(2):
        spend(log, 500, day=600, month=1200)
        clock.now += 86400
    with pytest.raises(RateLimited, match="of 2026-11") as refused:
        spend(log, 500, day=600, month=1200)
    assert refused.value.retry_after == 3600  # of the last day of November
    clock.now += 3600
    spend(log, 500, day=600, month=1200)
    assert log.spent("app") == (500, 500)
    log.close()


def test_what_was_spent_outlives_a_restart_and_refunds_count(tmp_path: Path) -> None:
    clock = Clock()
    log = UsageLog(tmp_path, clock=clock)
    spend(log, 700)
    log.refund("app", 200, clock.now)
    assert log.flush()
    spend(log, 100)
    log.close()
    log = UsageLog(tmp_path, clock=clock)
    assert log.spent("app") == (600, 600)
    with pytest.raises(RateLimited):
        spend(log, 401)
    log.close()


def test_gateways_that_share_a_file_share_quotas(tmp_path: Path) -> None:
    clock = Clock()
    one, other = UsageLog(tmp_path, clock=clock, every=60), UsageLog(tmp_path, clock=clock, every=60)
    spend(one, 600)
    spend(other, 300)
    assert one.flush()
    assert other.flush()
    assert other.spent("app") == (900, 900)
    with pytest.raises(RateLimited):
        spend(other, 101)
    one.close()
    other.close()


def test_the_log_is_summed_by_day_and_key_and_forgets_what_is_old(tmp_path: Path) -> None:
    clock = Clock()
    log = UsageLog(tmp_path, clock=clock, days=3, every=60)
    for each in (use(clock.now), use(clock.now, code="no_answer"), use(clock.now - 86400), use(clock.now, "b")):
        log.record(each)
    log.record(use(clock.now - 4 * 86400))
    assert log.flush()
    rows = summed(tmp_path)
    assert [(row["day"], row["key"], row["requests"], row["answered"]) for row in rows] == [
        ("2026-11-27", "app", 1, 1),
        ("2026-11-28", "app", 2, 1),
        ("2026-11-28", "b", 1, 1),
    ]
    assert (rows[1]["chars"], rows[1]["context_tokens"], rows[1]["soft_tokens"]) == (3000, 600, 150)
    assert rows[1]["mean_seconds"] == 0.25
    log.close()


def test_where_the_file_cannot_be_written_nothing_stops_and_all_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    log = UsageLog(tmp_path, clock=clock, every=60, wait=0.02)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    spend(log, 600)
    log.record(use(clock.now))
    assert [log.flush() for _ in range(3)] == [False] * 3
    with pytest.raises(RateLimited):  # quotas go on in memory
        spend(log, 401)
    assert [record.message for record in caplog.records] == ["usage"]
    assert "going on, and trying again" in caplog.records[0].__dict__["detail"]
    other.execute("ROLLBACK")
    assert log.flush()
    assert log.spent("app") == (600, 600)
    assert [row["requests"] for row in summed(tmp_path)] == [1]
    log.close()


_SPENDING = """
import sys, time
from condense_core.neurons.routing.usage import Use, UsageLog
log = UsageLog(sys.argv[1], every=0.01)
spent = log.spent("app")[1]
print("known", spent, flush=True)
while True:
    log.spend("app", 1, per_day=0, per_month=0)
    log.record(Use(time.time(), "app", "research", 1, 1, 1, "", 0.1, "ok"))
    spent += 1
    if spent % 50 == 0:
        log.flush()
        print("written", spent, flush=True)
"""


def test_a_kill_at_any_moment_loses_the_last_moment_at_most(tmp_path: Path) -> None:
    written, rng = 0, Random(1)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", _SPENDING, tmp_path], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            known = int(child.stdout.readline().split()[1])
            assert written <= known
            for _ in range(rng.randint(1, 8)):
                written = int(child.stdout.readline().split()[1])
            time.sleep(rng.random() / 100)
            child.kill()
            rest = [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
            written = int(rest[-1].split()[1]) if rest else written
    log = UsageLog(tmp_path)
    _, spent = log.spent("app")
    log.close()
    assert written <= spent
    assert [row["requests"] for row in summed(tmp_path)] == [spent]  # the log and the ledger are written together


def test_uses_that_wait_for_a_disk_are_bounded(tmp_path: Path) -> None:
    log = UsageLog(tmp_path, every=600)
    for n in range(20_100):
        log.record(use(float(n) + 1e9))
    log.close()
    with sqlite3.connect(tmp_path / FILE) as db:
        assert db.execute("SELECT count(*), min(at) FROM uses").fetchone()[0] <= 20_000


def test_a_state_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / FILE).write_text("no database, but a text of some length " * 50)
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"^state: .* cannot be used \([^\n]*\)$"):
            UsageLog(folder)
    with pytest.raises(ValueError, match=r"^state: .* cannot be read"):
        summed(tmp_path)
    with pytest.raises(ValueError, match=r"^state: no file "):
        summed(tmp_path / "nowhere")


def test_keys_with_days_need_a_ledger_and_spend_in_it(tmp_path: Path) -> None:
    secret, lines = new_key("app")
    file = tmp_path / "keys.toml"
    file.write_text(lines + "chars_per_day = 1000\nchars_per_month = 1500\n")
    with pytest.raises(ValueError, match=r"'app' has a limit of a day or a month, which only a gateway counts"):
        Keys.load(file)
    log = UsageLog(tmp_path / "state")
    key = Keys.load(file, log).find(f"Bearer {secret}")
    key.spend(900)
    with pytest.raises(RateLimited, match="characters of"):
        key.spend(200)
    assert log.spent("app") == (900, 900)
    with pytest.raises(Unauthorized):
        Keys.load(file, log).find("Bearer ck_other")
    log.close()
