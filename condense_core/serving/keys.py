"""API keys: whose a request is, and how much of it they may ask for. Files hold hashes of keys, never keys."""

from __future__ import annotations

import hashlib
import secrets
import time
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from condense_core.serving.errors import RateLimited, Unauthorized

_PREFIX = "ck_"
_MINUTE = 60.0


@dataclass
class Bucket:
    """So much a minute, which may be spent at once; ``float("inf")``: without limit."""

    per_minute: float
    left: float = field(init=False)
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.since = self.per_minute, time.monotonic()

    def take(self, amount: float) -> float | None:
        """Spend ``amount``, or say in how many seconds it could be spent; more than a minute's is spent as a debt."""
        if self.per_minute == float("inf"):
            return None
        now = time.monotonic()
        self.left = min(self.per_minute, self.left + (now - self.since) * self.per_minute / _MINUTE)
        self.since = now
        wanted = min(amount, self.per_minute)
        if wanted > self.left + 1e-9:
            return max((wanted - self.left) * _MINUTE / self.per_minute, 0.01)
        self.left -= amount
        return None


class Ledger(Protocol):
    """Counts what keys spend by day and month, also across restarts."""

    def spend(self, name: str, num_chars: int, *, per_day: float, per_month: float) -> None:
        """A key spends so many characters; ``RateLimited`` where that is more than one of them. 0: without limit."""


@dataclass
class Key:
    """A key and what it allows.

    Attributes:
        name: whose it is, as logs and caches say.
        sha256: of the key, in lower-case hex.
        requests_per_minute, chars_per_minute: 0: without limit.
        chars_per_day, chars_per_month: of the calendar in UTC, where the server has a ledger; 0: without limit.
        max_concurrent: requests at once; 0: without limit.
        max_priority: the highest priority that its requests may have.
    """

    name: str
    sha256: str
    requests_per_minute: float = 0
    chars_per_minute: float = 0
    chars_per_day: float = 0
    chars_per_month: float = 0
    max_concurrent: int = 0
    max_priority: int = 0
    running: int = field(default=0, init=False, repr=False)
    ledger: Ledger | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._requests = Bucket(self.requests_per_minute or float("inf"))
        self._chars = Bucket(self.chars_per_minute or float("inf"))

    def enter(self) -> None:
        """A request of it begins; ``RateLimited`` where that is one too many. ``leave`` ends it."""
        if self.max_concurrent and self.running >= self.max_concurrent:
            raise RateLimited(
                f"key: {self.running} requests of {self.name!r} run already, expected at most {self.max_concurrent}",
                retry_after=1.0,
            )
        if (wait := self._requests.take(1)) is not None:
            raise RateLimited(
                f"key: {self.name!r} may send {self.requests_per_minute:g} requests a minute", retry_after=wait
            )
        self.running += 1

    def leave(self) -> None:
        """A request of it has ended."""
        self.running -= 1

    def spend(self, num_chars: int) -> None:
        """So many characters are to be read for it; ``RateLimited`` where that is more than is left."""
        if (wait := self._chars.take(num_chars)) is not None:
            raise RateLimited(
                f"key: {self.name!r} may send {self.chars_per_minute:g} characters a minute", retry_after=wait
            )
        if self.ledger is not None:
            self.ledger.spend(self.name, num_chars, per_day=self.chars_per_day, per_month=self.chars_per_month)


class Keys:
    """The keys that a server knows, by their hash."""

    def __init__(self, keys: list[Key]) -> None:
        self._by_hash = {key.sha256: key for key in keys}

    @classmethod
    def load(cls, path: Path, ledger: Ledger | None = None) -> Keys:
        """Read a TOML file of ``[[key]]`` tables with the fields of ``Key``; ``ValueError`` for anything else.

        ledger: counts what they spend; without one no key may have limits of days and months.
        """
        try:
            tables = tomllib.loads(path.read_text())["key"]
            keys = [_key(table) for table in tables]
        except OSError as error:
            raise ValueError(f"keys: cannot read {path} ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"keys: {path} holds no [[key]] tables ({' '.join(str(error).split())})") from None
        except ValueError as error:
            raise ValueError(f"keys: {path}: {error}") from None
        for what in ("name", "sha256"):
            if len({getattr(key, what) for key in keys}) < len(keys):
                raise ValueError(f"keys: {path} has a {what} twice, expected each once")
        for key in keys:
            if ledger is None and (key.chars_per_day or key.chars_per_month):
                raise ValueError(
                    f"keys: {path}: {key.name!r} has a limit of a day or a month, which only a gateway counts; "
                    "expected none"
                )
            key.ledger = ledger
        return cls(keys)

    def find(self, authorization: str | None) -> Key:
        """The key of an ``Authorization`` header; ``Unauthorized`` where it names none."""
        scheme, _, token = (authorization or "").partition(" ")
        # Found by its hash: how long that takes tells nothing of the keys there are.
        known = self._by_hash.get(hashlib.sha256(token.strip().encode()).hexdigest())
        if scheme.lower() != "bearer" or known is None:
            raise Unauthorized("key: none that is known here, expected 'Authorization: Bearer ck_...'")
        return known


def new_key(name: str) -> tuple[str, str]:
    """A new key, and the lines of a keys file that know it; ``ValueError`` for a name that is none."""
    if not name.isprintable() or not 1 <= len(name) <= 100 or '"' in name or "\\" in name:
        raise ValueError(f"name: got {name!r:.60}, expected 1 to 100 printable characters without quotes")
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'


def _key(table: dict[str, Any]) -> Key:
    known = {f.name: f for f in fields(Key) if f.init}
    if unknown := set(table) - set(known):
        raise ValueError(f"unknown entry {sorted(unknown)[0]!r}, expected some of {', '.join(known)}")
    if missing := {"name", "sha256"} - set(table):
        raise ValueError(f"a key has no {sorted(missing)[0]}")
    digest = table["sha256"]
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"sha256 of {table['name']!r:.60}: expected 64 lower-case hex digits, not the key itself")
    for name in set(table) - {"name", "sha256"}:
        value = table[name]
        least = -10 if name == "max_priority" else 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise ValueError(f"{name} of {table['name']!r:.60}: got {value!r:.40}, expected a number from {least}")
    return Key(**table)
