"""What applications have used: a log of requests without their contents, and what each key has spent of its quota.

Both lie in one SQLite file and are written by a thread of their own, so that no request waits for a disk. Where the
disk is full or the file cannot be written, requests are served all the same: quotas go on in memory, and what is
logged waits, up to a bound, until there is room again.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import astuple, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from condense_core.serving.errors import RateLimited

FILE = "usage.db"
_log = logging.getLogger(__name__)
_MOST_WAITING = 20_000  # uses that wait for a disk
_TIDY = 3600.0
_CREATE = """
CREATE TABLE IF NOT EXISTS uses
(at REAL, key TEXT, tier TEXT, chars INTEGER, context_tokens INTEGER, soft_tokens INTEGER, miner TEXT, seconds REAL,
 code TEXT);
CREATE INDEX IF NOT EXISTS uses_at ON uses (at);
CREATE TABLE IF NOT EXISTS spent (key TEXT, period TEXT, chars INTEGER, PRIMARY KEY (key, period)) WITHOUT ROWID;
"""
_SUMMED = """
SELECT key, date(at, 'unixepoch') AS day, count(*) AS requests, sum(code = 'ok') AS answered, sum(chars) AS chars,
       sum(context_tokens) AS context_tokens, sum(soft_tokens) AS soft_tokens,
       round(avg(CASE WHEN code = 'ok' THEN seconds END), 3) AS mean_seconds
FROM uses GROUP BY key, day ORDER BY day, key
"""


@dataclass(frozen=True)
class Use:
    """A request that ended.

    Attributes:
        at: seconds since the epoch. key: name of the API key, "" without one. chars: of text and question.
        context_tokens, soft_tokens, miner: of the answer; 0 and "" without one. seconds: from arrival to end.
        code: "ok", "cancelled", or that of the error.
    """

    at: float
    key: str
    tier: str
    chars: int
    context_tokens: int
    soft_tokens: int
    miner: str
    seconds: float
    code: str


class UsageLog:
    """The log and the ledger of a gateway; several gateways may share the file. Close it to have all of it written."""

    def __init__(
        self,
        folder: str | Path,
        *,
        days: float = 90.0,
        every: float = 1.0,
        wait: float = 2.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the file in ``folder``; ``ValueError`` where that cannot be.

        Args:
            days: for which uses are kept. every: seconds between two writes, which a crash loses at most.
            wait: seconds while another process writes. clock: seconds since the epoch.
        """
        self.path, self.days = Path(folder) / FILE, days
        self._every, self._clock = every, clock
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._uses: list[Use] = []
        self._known: Counter[tuple[str, str]] = Counter()  # as the file had it last
        self._unwritten: Counter[tuple[str, str]] = Counter()
        self._tidy_at, self._complained, self._lost = 0.0, False, 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(self.path, timeout=wait, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_CREATE)
            self._known.update(self._totals())
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"state: {self.path} cannot be used ({error})") from None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="condense-usage", daemon=True)
        self._thread.start()

    # -- what requests call --------------------------------------------------------------------------------------------

    def record(self, use: Use) -> None:
        """Have a use written. Where the file cannot be written for long, the oldest are lost."""
        with self._lock:
            self._uses.append(use)
            if len(self._uses) > _MOST_WAITING:
                del self._uses[0]
                self._lost += 1

    def spend(self, name: str, num_chars: int, *, per_day: float, per_month: float) -> None:
        """Count characters of a key; ``RateLimited`` where they are more than is left of its day or month."""
        now = self._clock()
        with self._lock:
            for period, most, ends in zip(_periods(now), (per_day, per_month), _ends(now), strict=True):
                spent = self._spent(name, period)
                if most and spent + num_chars > most:
                    raise RateLimited(
                        f"key: {name!r} has sent {spent:,} of its {most:,.0f} characters of {period}, and "
                        f"{num_chars:,} more were to come; expected fewer, or to come again when that is over",
                        retry_after=max(ends - now, 1.0),
                    )
            for period in _periods(now):
                self._unwritten[name, period] += num_chars

    def refund(self, name: str, num_chars: int, at: float) -> None:
        """Take back what was spent ``at`` that time, of a request that was not answered."""
        with self._lock:
            for period in _periods(at):
                self._unwritten[name, period] -= num_chars

    def spent(self, name: str) -> tuple[int, int]:
        """Characters of a key, of this day and of this month."""
        with self._lock:
            day, month = (self._spent(name, period) for period in _periods(self._clock()))
        return day, month

    # -- what the thread does ------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        """Write what waits; False where that failed, which the log says once."""
        with self._writing:
            with self._lock:
                uses, spent = self._uses, Counter(self._unwritten)
                self._uses = []
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("INSERT INTO uses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", map(astuple, uses))
                self._db.executemany(
                    "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET chars = chars + excluded.chars",
                    [(name, period, chars) for (name, period), chars in spent.items()],
                )
                self._tidy()
                totals = self._totals()
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._failed(error, uses)
                return False
            with self._lock:
                self._known = Counter(totals)
                self._unwritten.subtract(spent)
                self._unwritten = Counter({key: chars for key, chars in self._unwritten.items() if chars})
            if self._complained:
                _log.info("usage", extra={"detail": f"{self.path} is written again; {self._lost:,} uses were lost"})
            self._complained, self._lost = False, 0
            return True

    def close(self) -> None:
        """Write what waits, and end."""
        self._ending.set()
        self._thread.join()
        self.flush()
        with self._writing:
            self._db.close()

    def _work(self) -> None:
        while not self._ending.wait(self._every):
            with self._lock:
                idle = not self._uses and not self._unwritten
            if not idle or self._clock() >= self._tidy_at:
                self.flush()

    def _spent(self, name: str, period: str) -> int:
        return max(0, self._known[name, period] + self._unwritten[name, period])

    def _totals(self) -> dict[tuple[str, str], int]:
        found = self._db.execute("SELECT key, period, chars FROM spent WHERE period IN (?, ?)", _periods(self._clock()))
        return {(name, period): chars for name, period, chars in found}

    def _tidy(self) -> None:
        now = self._clock()
        if now < self._tidy_at:
            return
        self._db.execute("DELETE FROM uses WHERE at < ?", (now - self.days * 86400,))
        _, month = _periods(now - 62 * 86400)
        self._db.execute("DELETE FROM spent WHERE period < ?", (month,))
        self._tidy_at = now + _TIDY

    def _failed(self, error: sqlite3.Error, uses: list[Use]) -> None:
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        with self._lock:
            again = [*uses, *self._uses]
            self._lost += max(0, len(again) - _MOST_WAITING)
            self._uses = again[-_MOST_WAITING:]
        if not self._complained:
            _log.error(
                "usage", extra={"detail": f"{self.path} cannot be written ({error}); going on, and trying again"}
            )
        self._complained = True


def summed(folder: str | Path) -> list[dict[str, Any]]:
    """What was used by day and key; ``ValueError`` where the folder has no log."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"state: no file {path}, expected the folder that a gateway has as --state")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=2.0)) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(_SUMMED)]
    except sqlite3.Error as error:
        raise ValueError(f"state: {path} cannot be read ({error})") from None


def _periods(at: float) -> tuple[str, str]:
    """The day and the month of a time, in UTC."""
    day = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
    return day, day[:7]


def _ends(at: float) -> tuple[float, float]:
    """When they end."""
    midnight = datetime.fromtimestamp(at, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (midnight + timedelta(days=1)).timestamp(), month.timestamp()
