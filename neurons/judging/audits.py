"""Audits: organic requests and their answers, which a gateway leaves for a validator of the same host to score.

A miner that answers challenges well and applications badly would be found out by nothing else. What lies here are the
texts of applications, so the file is for its owner only, small, and an entry is gone once it is taken.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from condense_core.neurons.protocol.messages import Ask

_log = logging.getLogger(__name__)
_FILE = "audits.db"
_CREATE = """
CREATE TABLE IF NOT EXISTS audits
(id INTEGER PRIMARY KEY, at REAL, hotkey TEXT, seconds REAL, size INTEGER, ask BLOB, body BLOB)
"""


@dataclass(frozen=True)
class Audit:
    """A request of an application, and what a miner answered.

    Attributes:
        ask: the request. hotkey: of the miner, which signed ``body`` for this request. body: unchecked bytes.
        seconds: until its last byte, as the gateway measured them. at: when, in seconds since the epoch.
    """

    ask: Ask
    hotkey: str
    body: bytes
    seconds: float
    at: float


class AuditSpool:
    """Audits in a file of a folder that a gateway and a validator share; from any thread and several processes.

    What is lost costs nothing but a sample: where the file cannot be written or read, that is logged and not raised.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_entries: int = 256,
        max_bytes: int = 256 * 2**20,
        wait: float = 2.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the spool; ``ValueError`` where that cannot be.

        Args:
            max_entries, max_bytes: of what waits; the oldest make room.
            wait: seconds while another process writes. clock: seconds since the epoch.
        """
        self.path = Path(folder) / _FILE
        self.max_entries, self.max_bytes, self._clock = max_entries, max_bytes, clock
        self._lock, self._complained = threading.Lock(), False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # The file has its mode before it has contents, and SQLite gives it to those beside it.
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            os.fchmod(handle, 0o600)
            os.close(handle)
            self._db = sqlite3.connect(self.path, timeout=wait, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA auto_vacuum=FULL")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA secure_delete=ON")
            self._db.execute(_CREATE)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"audits: {self.path} cannot be used ({error})") from None

    def put(self, ask: Ask, hotkey: str, body: bytes, seconds: float) -> bool:
        """Leave a request and its answer; False where that failed, or it is larger than the whole spool."""
        asked = ask.to_bytes()
        size = len(asked) + len(body)
        if size > self.max_bytes:
            return False
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute(
                    "INSERT INTO audits (at, hotkey, seconds, size, ask, body) VALUES (?, ?, ?, ?, ?, ?)",
                    (self._clock(), hotkey, seconds, size, asked, body),
                )
                self._db.execute(
                    "DELETE FROM audits WHERE id IN (SELECT id FROM (SELECT id, "
                    "row_number() OVER newest AS count, sum(size) OVER newest AS bytes FROM audits "
                    "WINDOW newest AS (ORDER BY id DESC)) WHERE count > ? OR bytes > ?)",
                    (self.max_entries, self.max_bytes),
                )
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._failed(error)
                return False
            self._complained = False
            return True

    def take(self, limit: int) -> list[Audit]:
        """At most ``limit`` audits, the oldest first. They are the caller's alone, and gone from the file."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                rows = self._db.execute(
                    "SELECT id, ask, hotkey, body, seconds, at FROM audits ORDER BY id LIMIT ?", (max(0, limit),)
                ).fetchall()
                self._db.executemany("DELETE FROM audits WHERE id = ?", [row[:1] for row in rows])
                self._db.execute("COMMIT")
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log has the texts as well
            except sqlite3.Error as error:
                self._failed(error)
                return []
            self._complained = False
        taken = []
        for _, asked, hotkey, body, seconds, at in rows:
            try:
                taken.append(Audit(Ask.model_validate_json(asked), hotkey, body, seconds, at))
            except ValidationError:  # of another version of the protocol
                continue
        return taken

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM audits").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _failed(self, error: sqlite3.Error) -> None:
        """Undo what was begun, and say so once."""
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error:
            pass
        if not self._complained:
            _log.warning("audits", extra={"detail": f"{self.path} cannot be used ({error}); going on without"})
        self._complained = True
