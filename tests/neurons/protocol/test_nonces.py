"""Replay protection: once, whichever worker sees it, also after a restart, and never when it cannot be written down."""

from __future__ import annotations

import multiprocessing
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from condense_core.neurons.protocol.nonces import RETENTION, NotWritten, SqliteNonceStore


def test_a_nonce_is_new_once_for_each_hotkey(tmp_path: Path) -> None:
    store = SqliteNonceStore(tmp_path / "nonces.db")
    assert [store.check_and_store("A", 1), store.check_and_store("A", 1)] == [True, False]
    assert store.check_and_store("A", 2)
    assert store.check_and_store("B", 1)


def test_it_outlives_a_restart(tmp_path: Path) -> None:
    store = SqliteNonceStore(tmp_path / "nonces.db")
    assert store.check_and_store("A", 1)
    store.close()
    assert not SqliteNonceStore(tmp_path / "nonces.db").check_and_store("A", 1)


def test_what_is_older_than_the_window_is_forgotten(tmp_path: Path) -> None:
    now = 1000.0
    store = SqliteNonceStore(tmp_path / "nonces.db", clock=lambda: now)
    for nonce in range(100):
        assert store.check_and_store("A", nonce)
    now += RETENTION - 1
    assert not store.check_and_store("A", 0)
    now += 2 + RETENTION / 4
    assert store.check_and_store("A", 100)
    assert len(store) == 1


def accepted(path: Path, count: int) -> int:
    store = SqliteNonceStore(path)
    return sum(store.check_and_store("A", nonce) for nonce in range(count))


def test_workers_accept_a_nonce_once_among_them(tmp_path: Path) -> None:
    path = tmp_path / "nonces.db"
    SqliteNonceStore(path).close()
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        counts = pool.starmap(accepted, [(path, 300)] * 3)
    assert sum(counts) == 300


@pytest.mark.parametrize("nonce", [-1, 2**63, 2**70])
def test_a_number_that_is_no_time_is_refused(nonce: int, tmp_path: Path) -> None:
    assert not SqliteNonceStore(tmp_path / "nonces.db").check_and_store("A", nonce)


def test_what_cannot_be_written_down_is_refused_and_said_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, now = tmp_path / "nonces.db", 1000.0
    store = SqliteNonceStore(path, clock=lambda: now)
    other = sqlite3.connect(path)
    other.execute("DROP TABLE nonces")
    other.commit()
    for seconds in (0, 1, 30, 61):
        now = 1000.0 + seconds
        with pytest.raises(NotWritten, match="nonces: they cannot be written down"):
            store.check_and_store("A", 1)
    told = [record.detail for record in caplog.records]  # type: ignore[attr-defined]
    assert [line.rpartition(", ")[2] for line in told] == ["1 so far", "4 so far"]
    assert all("nonces.db cannot be written (no such table: nonces): all requests are refused" in line for line in told)


def test_a_file_whose_disk_is_full_is_known_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "nonces.db"
    store = SqliteNonceStore(path)
    assert store.check_and_store("A", 1)
    store.close()
    script = (
        "import resource, sys\n"
        "from condense_core.neurons.protocol.nonces import SqliteNonceStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"  # as a full disk: no file may grow
        "try:\n    SqliteNonceStore(sys.argv[1])\nexcept ValueError as error:\n    print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"nonces: .*nonces\.db cannot be used \(.*\)\n", ended.stdout), ended
    assert SqliteNonceStore(path).check_and_store("A", 2)


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match=r"nonces: .*bad.db cannot be used"):
        SqliteNonceStore(tmp_path / "bad.db")
    with pytest.raises(ValueError, match="cannot be used"):
        SqliteNonceStore(tmp_path / "no folder" / "nonces.db")


def test_it_is_fast_enough_for_200_requests_a_second(tmp_path: Path) -> None:
    store = SqliteNonceStore(tmp_path / "nonces.db")
    started = time.process_time()
    for nonce in range(1000):
        store.check_and_store("A", nonce)
    assert time.process_time() - started < 1.0  # a fifth of what 200 a second leave
