"""Which requests were seen before: replay protection that all workers of a neuron share and that outlives a restart."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)
RETENTION = 60.0
"""Seconds; the SDK takes requests that are up to 10 s old or 2 s early."""
_TELL_EVERY = 60.0


class NotWritten(Exception):
    """Whether a nonce is new is not known, since it cannot be written down: a disk is full, or a file is gone."""


class SqliteNonceStore:
    """A ``NonceStore`` of the SDK in a file.

    Processes that open the same file accept a nonce once among them, also after a restart. A request that cannot be
    written down must be refused, as it may be a replay.
    """

    retention: float

    def __init__(
        self, path: str | Path, *, retention: float = RETENTION, clock: Callable[[], float] = time.time
    ) -> None:
        """Open or create the file; ``ValueError`` where that cannot be.

        Args:
            retention: seconds for which a nonce is remembered, at least the window in which requests are taken.
            clock: seconds since the epoch, the same for all processes.
        """
        self.retention, self._clock = retention, clock
        self._lock = threading.Lock()
        self._purge_at = self._tell_at = 0.0
        self.path, self.failures = path, 0
        try:
            self._db = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            # A crash of the machine may lose the last moments, which are older than the window once it is up again.
            self._db.execute("PRAGMA synchronous=OFF")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS nonces "
                "(hotkey TEXT, nonce INTEGER, until REAL, PRIMARY KEY (hotkey, nonce)) WITHOUT ROWID"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS nonces_until ON nonces (until)")
            # Written and taken away again: a file that was there may be read-only, or its disk full.
            self._db.execute("INSERT OR REPLACE INTO nonces VALUES ('', 0, 0)")
            self._db.execute("DELETE FROM nonces WHERE hotkey = ''")
        except sqlite3.Error as error:
            raise ValueError(f"nonces: {path} cannot be used ({error})") from None

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        """Whether this pair is new; it is not any more then.

        Raises:
            NotWritten: it could not be written down. The log says why, once a minute at most.
        """
        if not 0 <= nonce_ns < 2**63:
            return False
        now = self._clock()
        with self._lock:
            try:
                if now >= self._purge_at:
                    self._db.execute("DELETE FROM nonces WHERE until < ?", (now,))
                    self._purge_at = now + self.retention / 4
                found = self._db.execute(
                    "INSERT OR IGNORE INTO nonces VALUES (?, ?, ?)", (hotkey_ss58, nonce_ns, now + self.retention)
                )
            except sqlite3.Error as error:
                self._tell(now, error)
                raise NotWritten("nonces: they cannot be written down, expected another try later") from None
            return found.rowcount == 1

    def _tell(self, now: float, error: sqlite3.Error) -> None:
        self.failures += 1
        if now >= self._tell_at:
            self._tell_at = now + _TELL_EVERY
            detail = f"{self.path} cannot be written ({error}): all requests are refused, {self.failures} so far"
            _log.error("nonces", extra={"detail": detail})

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM nonces").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
