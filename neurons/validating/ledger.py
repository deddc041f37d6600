"""What a validator knows, in one SQLite file: standings, and a log of rounds that can be computed again.

A round is one transaction: its log and the standings that it changes are written together or not at all. Whatever kills
the process loses at most the round that runs, and none is counted twice.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from condense_core.neurons.chain.base import Metagraph
from condense_core.neurons.incentive.score import Score
from condense_core.neurons.incentive.standing import Standing, Standings
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.validating.rounds import Outcome, Round
from condense_core.tasks.generators import Turn

FILE = "validator.db"
_SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS standings (
    tier TEXT, hotkey TEXT, uid INTEGER, total REAL, rounds INTEGER, PRIMARY KEY (tier, hotkey)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rounds (
    number INTEGER PRIMARY KEY AUTOINCREMENT, tier TEXT, began REAL, asking REAL, judging REAL, counts INTEGER,
    secret TEXT, challenge TEXT, turns TEXT);
CREATE TABLE IF NOT EXISTS outcomes (
    round INTEGER, hotkey TEXT, uid INTEGER, value REAL, share REAL, sha256 TEXT, score TEXT,
    PRIMARY KEY (round, hotkey)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS bodies (sha256 TEXT PRIMARY KEY, round INTEGER, bytes INTEGER, body BLOB) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS rounds_tier ON rounds (tier, number);
CREATE INDEX IF NOT EXISTS bodies_round ON bodies (round);
CREATE TABLE IF NOT EXISTS weights (number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL, block INTEGER, weights TEXT);
"""
_KEPT_ROUNDS = 50_000
_KEPT_WEIGHTS = 1000


class LedgerError(Exception):
    """Something could not be written down; the file is as it was before."""


class Ledger:
    """The file of one validator. One process writes it, others may read it.

    Args:
        folder: where it lies. body_bytes: of answers that are kept for ``replay``; the oldest rounds' go first.
        writes: whether this process is the one that writes.

    Raises:
        ValueError: it cannot be used, or another process writes it.
    """

    def __init__(self, folder: Path, *, body_bytes: int = 2**30, writes: bool = True) -> None:
        self.path, self.body_bytes, self._writes = folder / FILE, body_bytes, writes
        self._lock = threading.Lock()
        if not writes and not self.path.is_file():
            raise ValueError(f"state: {folder} holds no {FILE}, expected the folder of a validator")
        try:
            if writes:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._held = (folder / f"{FILE}.lock").open("w")
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._db = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
            if writes:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.executescript(_TABLES)
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (str(_SCHEMA),))
            [(schema,)] = self._db.execute("SELECT value FROM meta WHERE name = 'schema'").fetchall()
        except BlockingIOError:
            raise ValueError(f"state: another validator works in {folder}, expected a folder of its own") from None
        except OSError as error:
            raise ValueError(f"state: {folder} cannot be used ({error.strerror})") from None
        except (sqlite3.Error, ValueError) as error:
            raise ValueError(f"state: {self.path} cannot be used ({error})") from None
        if schema != str(_SCHEMA):
            raise ValueError(f"state: {self.path} is of version {schema}, expected {_SCHEMA}")
        self.standings = self._read_standings()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
        if self._writes:
            self._held.close()

    # -- writing -------------------------------------------------------------------------------------------------------

    def record(self, played: Round) -> int:
        """Write a round down with the standings that follow from it; its number.

        Raises:
            LedgerError: it could not be written; the standings are as before.
        """
        standings = deepcopy(self.standings)
        standings.add(played.tier, played.values)
        challenge = {
            "ask": played.challenge.ask.model_dump(mode="json"),
            "pool": [asdict(turn) for turn in played.challenge.pool],
        }
        with self._transaction() as db:
            number = db.execute(
                "INSERT INTO rounds (tier, began, asking, judging, counts, secret, challenge, turns) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    played.tier,
                    played.began,
                    played.asking,
                    played.judging,
                    played.counts,
                    played.secret,
                    json.dumps(challenge),
                    json.dumps([asdict(turn) for turn in played.turns]),
                ),
            ).lastrowid
            assert number is not None
            db.executemany(
                "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (number, o.hotkey, o.uid, o.value, o.share, o.sha256, json.dumps(asdict(o.score)))
                    for o in played.outcomes
                ],
            )
            db.executemany(
                "INSERT OR REPLACE INTO bodies VALUES (?, ?, ?, ?)",
                [(digest, number, len(body), body) for digest, body in played.bodies.items()],
            )
            self._write_standings(db, standings, {o.hotkey: o.uid for o in played.outcomes}, {played.tier})
            self._drop_old(db, number)
        self.standings = standings
        return number

    def count(self, tier: str, hotkey: str, uid: int, value: float) -> None:
        """A score beyond the rounds, of an answer that was audited; ``LedgerError`` as of ``record``."""
        standings = deepcopy(self.standings)
        own = standings.by_tier.setdefault(tier, {})
        own[hotkey] = own.get(hotkey, Standing()).after(value)
        with self._transaction() as db:
            self._write_standings(db, standings, {hotkey: uid}, {tier})
        self.standings = standings

    def keep(self, metagraph: Metagraph) -> list[str]:
        """Forget the hotkeys whose uid is another's by now, and say which; ``LedgerError`` as of ``record``.

        A metagraph that lacks neurons for a moment makes nothing forgotten.
        """
        with self._lock:
            held = dict(self._db.execute("SELECT hotkey, max(uid) FROM standings GROUP BY hotkey"))
        uids = {neuron.uid for neuron in metagraph.neurons}
        gone = [h for h, uid in held.items() if h not in metagraph.by_hotkey and uid in uids]
        if gone:
            standings = deepcopy(self.standings)
            standings.keep(set(held) - set(gone))
            with self._transaction() as db:
                db.executemany("DELETE FROM standings WHERE hotkey = ?", [(hotkey,) for hotkey in gone])
            self.standings = standings
        return gone

    def set_weights(self, at: float, block: int | None, weights: Mapping[str, float]) -> None:
        """Write down what was set on the chain, by hotkey; ``LedgerError`` as of ``record``."""
        with self._transaction() as db:
            db.execute("INSERT INTO weights (at, block, weights) VALUES (?, ?, ?)", (at, block, json.dumps(weights)))
            db.execute("DELETE FROM weights WHERE number <= (SELECT max(number) FROM weights) - ?", (_KEPT_WEIGHTS,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise LedgerError(f"state: {self.path} cannot be written ({error})") from None

    @staticmethod
    def _write_standings(
        db: sqlite3.Connection, standings: Standings, uids: Mapping[str, int], tiers: set[str]
    ) -> None:
        rows = [
            (tier, hotkey, uid, standing.total, standing.rounds)
            for tier in tiers
            for hotkey, uid in uids.items()
            if (standing := standings.by_tier.get(tier, {}).get(hotkey)) is not None
        ]
        db.executemany("INSERT OR REPLACE INTO standings VALUES (?, ?, ?, ?, ?)", rows)

    def _drop_old(self, db: sqlite3.Connection, newest: int) -> None:
        old = newest - _KEPT_ROUNDS
        for table, column in (("rounds", "number"), ("outcomes", "round"), ("bodies", "round")):
            db.execute(f"DELETE FROM {table} WHERE {column} <= ?", (old,))
        [(total,)] = db.execute("SELECT coalesce(sum(bytes), 0) FROM bodies")
        for number, nbytes in db.execute(
            "SELECT round, sum(bytes) FROM bodies GROUP BY round ORDER BY round"
        ).fetchall():
            if total <= self.body_bytes:
                break
            db.execute("DELETE FROM bodies WHERE round = ?", (number,))
            total -= nbytes

    # -- reading -------------------------------------------------------------------------------------------------------

    def round(self, number: int) -> Round:
        """Round ``number``, with those of its bodies that are still kept; ``ValueError`` where there is none."""
        with self._lock:
            row = self._db.execute(
                "SELECT tier, began, asking, judging, secret, challenge, turns FROM rounds WHERE number = ?", (number,)
            ).fetchone()
            if row is None:
                raise ValueError(f"round: got {number}, expected one of {self._numbers()}")
            outcomes = self._db.execute(
                "SELECT hotkey, uid, share, sha256, score FROM outcomes WHERE round = ? ORDER BY uid", (number,)
            ).fetchall()
            digests = sorted({digest for *_, digest, _ in outcomes if digest})
            bodies = {}
            for digest in digests:
                found = self._db.execute("SELECT body FROM bodies WHERE sha256 = ?", (digest,)).fetchone()
                if found is not None:
                    bodies[digest] = bytes(found[0])
        tier, began, asking, judging, secret, challenge, turns = row
        made = json.loads(challenge)
        return Round(
            tier,
            Challenge(tier, Ask.model_validate(made["ask"]), _turns(made["pool"])),
            secret,
            _turns(json.loads(turns)),
            tuple(Outcome(h, uid, Score(**json.loads(score)), share, sha) for h, uid, share, sha, score in outcomes),
            began,
            asking,
            judging,
            bodies,
        )

    def newest(self, tier: str | None = None) -> int | None:
        """The number of the last round; None where there is none."""
        where, values = ("", ()) if tier is None else (" WHERE tier = ?", (tier,))
        with self._lock:
            [(number,)] = self._db.execute(f"SELECT max(number) FROM rounds{where}", values)
        return None if number is None else int(number)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query of one's own gives."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _numbers(self) -> str:
        [(first, last)] = self._db.execute("SELECT min(number), max(number) FROM rounds")
        return "those to come, none is written down yet" if first is None else f"{first} to {last}"

    def _read_standings(self) -> Standings:
        by_tier: dict[str, dict[str, Standing]] = {}
        for tier, hotkey, total, rounds in self.rows("SELECT tier, hotkey, total, rounds FROM standings"):
            by_tier.setdefault(tier, {})[hotkey] = Standing(total, rounds)
        return Standings(by_tier)


def _turns(made: list[dict[str, Any]]) -> tuple[Turn, ...]:
    return tuple(Turn(t["question"], t["answer"], t["kind"], tuple(t["others"])) for t in made)
