"""The spool of audits: bounded, for its owner only, each entry taken once, and never in anybody's way."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from condense_core.neurons.judging.audits import AuditSpool
from condense_core.neurons.protocol.messages import Ask

TEXT = "The keeper of the north archive is Hugo Quinmark. "


def ask(number: int = 0) -> Ask:
    return Ask(tier="research", text=f"{TEXT}{number}", ratio=4.0, question="Who?" if number % 2 else None)


def test_what_was_put_is_taken_once_and_in_order(tmp_path: Path) -> None:
    gateway, validator = AuditSpool(tmp_path, clock=lambda: 5.0), AuditSpool(tmp_path)
    for number in range(5):
        assert gateway.put(ask(number), f"hotkey{number}", bytes([number]) * 10, number / 8)
    taken = validator.take(2) + validator.take(100)
    assert [(a.ask, a.hotkey, a.body, a.seconds, a.at) for a in taken] == [
        (ask(number), f"hotkey{number}", bytes([number]) * 10, number / 8, 5.0) for number in range(5)
    ]
    assert validator.take(100) == gateway.take(100) == []


def test_takers_at_once_never_get_the_same(tmp_path: Path) -> None:
    spools = [AuditSpool(tmp_path) for _ in range(3)]
    for number in range(60):
        spools[0].put(ask(number), "hotkey", b"x", 0.1)
    taken: list[str] = []

    def work(spool: AuditSpool) -> None:
        while found := spool.take(4):
            taken.extend(audit.ask.text for audit in found)

    threads = [threading.Thread(target=work, args=(spool,)) for spool in spools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ask(number).text for number in range(60))


def test_the_oldest_make_room_by_number_and_by_bytes(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path / "number", max_entries=3)
    for number in range(10):
        spool.put(ask(number), "hotkey", b"x", 0.1)
    assert [audit.ask for audit in spool.take(10)] == [ask(7), ask(8), ask(9)]

    small = AuditSpool(tmp_path / "bytes", max_bytes=10_000)
    for number in range(50):
        assert small.put(ask(number), "hotkey", bytes(4000), 0.1)
    assert not small.put(ask(), "hotkey", bytes(10_001), 0.1)
    assert [audit.ask for audit in small.take(10)] == [ask(48), ask(49)]
    assert small.path.stat().st_size < 100_000


def test_texts_lie_in_files_of_the_owner_and_are_gone_when_taken(tmp_path: Path) -> None:
    folder = tmp_path / "audits"
    spool = AuditSpool(folder)
    spool.put(ask(), "hotkey", b"x" * 9000, 0.1)
    assert folder.stat().st_mode & 0o077 == 0
    files = sorted(folder.iterdir())
    assert len(files) == 3  # the file, its log and its index
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert any(TEXT.encode() in file.read_bytes() for file in files)
    assert len(spool.take(1)) == 1
    assert not any(TEXT.encode() in file.read_bytes() or b"x" * 50 in file.read_bytes() for file in files)


def test_a_file_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "audits.db").touch(mode=0o644)
    (tmp_path / "audits.db").chmod(0o644)
    assert AuditSpool(tmp_path).path.stat().st_mode & 0o777 == 0o600


def test_entries_of_another_version_are_left_out(tmp_path: Path) -> None:
    spool = AuditSpool(tmp_path)
    spool.put(ask(1), "hotkey", b"x", 0.1)
    spool.put(ask(2), "hotkey", b"x", 0.1)
    with sqlite3.connect(tmp_path / "audits.db") as other:
        other.execute("UPDATE audits SET ask = replace(ask, '\"version\":1', '\"version\":2') WHERE id = 1")
    assert [audit.ask for audit in spool.take(5)] == [ask(2)]
    assert len(spool) == 0


def test_a_file_that_cannot_be_written_loses_the_entry_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = AuditSpool(tmp_path, wait=0.05)
    spool.put(ask(), "hotkey", b"x", 0.1)
    other = sqlite3.connect(tmp_path / "audits.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert [spool.put(ask(n), "hotkey", b"y", 0.1) for n in range(3)] == [False] * 3
    assert spool.take(5) == []
    assert [record.message for record in caplog.records] == ["audits"]
    assert "locked" in caplog.records[0].__dict__["detail"]
    other.execute("ROLLBACK")
    assert spool.put(ask(9), "hotkey", b"z", 0.1)
    assert [audit.ask for audit in spool.take(9)] == [ask(), ask(9)]


@pytest.mark.parametrize("kind", ["no database", "a link", "a file as folder"])
def test_a_spool_that_cannot_be_used_is_one_line(tmp_path: Path, kind: str) -> None:
    folder, file = tmp_path / "audits", tmp_path / "audits" / "audits.db"
    if kind == "a file as folder":
        folder.touch()
    else:
        folder.mkdir()
        (tmp_path / "other").write_text("no database, but text of some length " * 50)
        if kind == "a link":
            file.symlink_to(tmp_path / "other")
        else:
            file.write_bytes((tmp_path / "other").read_bytes())
    with pytest.raises(ValueError, match=r"^audits: .* cannot be used \(.*\)$"):
        AuditSpool(folder)
