"""Replay protection: once, whichever worker sees it, also after a restart, and never when it cannot be written down."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from pathlib import Path

import pytest

from condense_core.neurons.protocol.nonces import RETENTION, SqliteNonceStore


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


def test_what_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nonces.db"
    store = SqliteNonceStore(path)
    other = sqlite3.connect(path)
    other.execute("DROP TABLE nonces")
    other.commit()
    assert not store.check_and_store("A", 1)


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
