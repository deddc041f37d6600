"""The clients without their sockets: requests, what the head of an answer must be, and when to ask again.

``client_answers`` reads the bodies of answers, ``client`` does what is said here over a network.
"""

from __future__ import annotations

import json
import os
import random
import re
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, TypedDict
from urllib.parse import urlsplit

from condense_core.serving.errors import (
    ERRORS,
    BadAnswer,
    DeadlineExceeded,
    InvalidRequest,
    ServingError,
    Unavailable,
)
from condense_core.serving.wire import JSON, MAX_TIMEOUT, MIN_TIMEOUT, error_from

KEY_VARIABLE = "CONDENSE_API_KEY"
DEFAULT_MAX_BYTES = 2**30
DEFAULT_MAX_CACHE_BYTES = 16 * 2**30
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_TRANSIENT = (429, 502, 503)
_URL = re.compile(r"https?://[^\s/?#@\\]+(/[^\s?#@\\]*)?", re.IGNORECASE)


class RequestFields(TypedDict, total=False):
    """What every request may say; timeout: seconds for this call, instead of the client's."""

    priority: int
    model: str
    timeout: float


class CompressFields(RequestFields, total=False):
    """See ``serving.requests.CompressRequest``; ``tier`` and what follows is for gateways alone (docs/gateway.md)."""

    method: str | None
    ratio: float | None
    max_soft_tokens: int | None
    question: str | None
    tier: str | None
    routing: Literal["best", "fastest", "one", "k_of_n"] | None
    miner: str | int | None
    k: int | None


class PruneFields(RequestFields, total=False):
    """See ``serving.requests.PruneRequest``."""

    method: str | None
    keep: float | None
    budget: int | None
    question: str | None
    storage: str | None


class AnswerFields(RequestFields, total=False):
    """See ``serving.requests.AnswerRequest``."""

    way: str
    method: str
    ratio: float
    max_new_tokens: int


# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Whom a client asks, and how long.

    Attributes:
        base_url: such as ``https://host:8000``; a path is kept, for servers behind a proxy.
        api_key: sent to ``base_url`` and nowhere else; None: that of the environment, ``""``: none.
        timeout: seconds for a call with all that belongs to it.
        retries: how often a call is made again at most; None: until its time is over.
        max_bytes: of one answer in memory.
        ca_file: certificates that vouch for the server's, in PEM; None: the system's.

    Raises:
        ValueError: one of them makes no sense; the message does not show the key.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    ca_file: str | Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", _checked_url(self.base_url))
        key = os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key
        if key and not (isinstance(key, str) and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(f"api_key: got one with spaces or other than ASCII, expected a key, or {KEY_VARIABLE}")
        object.__setattr__(self, "api_key", key or None)
        check_timeout(self.timeout)
        if self.retries is not None and (type(self.retries) is not int or self.retries < 0):
            raise ValueError(f"retries: got {self.retries!r:.40}, expected a number of at least 0, or None")
        check_max_bytes(self.max_bytes)

    def headers(self) -> dict[str, str]:
        """What is sent with every request."""
        sent = {"accept-encoding": "identity"}
        return sent if self.api_key is None else sent | {"authorization": f"Bearer {self.api_key}"}

    def tls(self) -> ssl.SSLContext | None:
        """How the server's certificate is checked; None where it has none. ``ValueError`` for a bad ca_file."""
        if not self.base_url.lower().startswith("https:"):
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # of which ssl.SSLError is one
            raise ValueError(f"ca_file: cannot use {self.ca_file} ({error.strerror}), expected PEM") from None


def _checked_url(base_url: object) -> str:
    expected = "expected http://HOST:PORT or https://HOST:PORT"
    if isinstance(base_url, str) and "@" in base_url:
        raise ValueError(f"base_url: holds credentials, {expected}; keys are given as api_key or {KEY_VARIABLE}")
    if not isinstance(base_url, str) or not _URL.fullmatch(base_url) or not base_url.isprintable():
        raise ValueError(f"base_url: got {base_url!r:.100}, {expected}")
    try:
        parts = urlsplit(base_url)
        if not parts.hostname or parts.port == 0:
            raise ValueError
        parts.hostname.encode("idna")  # as the look-up of the name does, which would fail later and less clearly
    except ValueError:
        raise ValueError(f"base_url: got {base_url!r:.100}, {expected}") from None
    return base_url.rstrip("/")


def check_timeout(seconds: object) -> None:
    """``ValueError`` unless a call may take so many seconds."""
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not MIN_TIMEOUT <= seconds <= MAX_TIMEOUT:  # type: ignore[operator]
        raise ValueError(f"timeout: got {seconds!r:.40}, expected seconds, from {MIN_TIMEOUT:g} to {MAX_TIMEOUT:g}")


def check_max_bytes(count: object) -> None:
    """``ValueError`` unless an answer may have so many bytes."""
    if type(count) is not int or count < 1:
        raise ValueError(f"max_bytes: got {count!r:.40}, expected a number of at least 1")


# -- time --------------------------------------------------------------------------------------------------------------


class Deadline:
    """When a call is to be over, however often it asks."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(self._end - time.monotonic(), 0.0)


class Backoff:
    """When to ask again: later each time, never before the server said, and not where the deadline would be over."""

    def __init__(self, deadline: Deadline, retries: int | None) -> None:
        self.deadline, self.retries, self.tried = deadline, retries, 0

    def delay(self, error: ServingError) -> float | None:
        """Seconds to wait after ``error``; None: it stands."""
        if error.status not in _TRANSIENT or isinstance(error, BadAnswer):
            return None
        if self.retries is not None and self.tried >= self.retries:
            return None
        delay = min(_FIRST_DELAY * 2 ** min(self.tried, 10), _LONGEST_DELAY) * random.uniform(0.5, 1.0)
        if error.retry_after is not None:  # those who were told the same do not all come at the same moment
            delay = max(delay, error.retry_after * random.uniform(1.0, 1.1))
        return delay if delay < self.deadline.left() else None


# -- a request and its answer ------------------------------------------------------------------------------------------


class Call:
    """A request, sent as often as it takes, and what its answer must be.

    Attributes:
        accepts: the media type of its answer. max_bytes: of the answer.
        reached: whether a connection to the server was made.
    """

    def __init__(
        self,
        settings: Settings,
        path: str,
        *,
        accepts: str,
        deadline: Deadline,
        body: Mapping[str, Any] | None = None,
        max_bytes: int | None = None,
        retries: int | None = None,
    ) -> None:
        self.url = settings.base_url + path
        self.accepts, self.deadline, self.reached = accepts, deadline, False
        self.max_bytes = settings.max_bytes if max_bytes is None else max_bytes
        self.backoff = Backoff(deadline, settings.retries if retries is None else retries)
        self._base, self._key = settings.base_url, settings.api_key
        self._json = None if body is None else _encoded(body)

    @property
    def method(self) -> str:
        """Of HTTP."""
        return "GET" if self._json is None else "POST"

    def content(self) -> bytes | None:
        """The body, which tells the server how much time is left."""
        if self._json is None:
            return None
        return b'{"timeout":%.3f,%s' % (max(self.deadline.left(), MIN_TIMEOUT), self._json[1:])

    def headers(self) -> dict[str, str]:
        """Those of this request alone."""
        return {"accept": self.accepts} | ({} if self._json is None else {"content-type": JSON})

    def check_head(self, status: int, headers: Mapping[str, str]) -> None:
        """``BadAnswer`` where no answer or error of a server of this kind begins like this."""
        if status < 400 and status != 200:
            hint = "; redirects are not followed, expected where it lives as base_url" if 300 <= status < 400 else ""
            raise BadAnswer(f"{self._base}: answered with status {status}, expected 200 or an error{hint}")
        encoding = headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise BadAnswer(f"{self._base}: content-encoding is {encoding!r:.60}, expected none")
        if status == 200:
            if (kind := media_type(headers)) != self.accepts:
                raise BadAnswer(f"{self._base}: content-type is {kind!r:.60}, expected {self.accepts}")
            length = headers.get("content-length", "")
            if length.isdigit() and (len(length) > 18 or int(length) > self.max_bytes):
                raise self.too_large(self.max_bytes)

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> ServingError:
        """The error that an answer with any status but 200 is."""
        told: object = None
        if media_type(headers) == JSON:
            try:
                told = json.loads(body)
            except (ValueError, RecursionError):
                told = None
        after = _retry_after(headers.get("retry-after", ""))
        if not isinstance(told, dict) or not isinstance(told.get("error"), dict):
            if status in (502, 503):  # a proxy in front of a server that is being restarted
                return Unavailable(f"{self._base}: answered with status {status}", retry_after=after)
            if status not in {kind.status for kind in ERRORS.values()}:
                return BadAnswer(f"{self._base}: answered with status {status}, expected 200 or a known error")
        error = error_from(told, status)
        if self._key is not None and self._key in str(error):
            error.args = (str(error).replace(self._key, "***"),)
        if error.retry_after is None:
            error.retry_after = after
        return error

    def late(self) -> ServingError:
        """The deadline is over."""
        if not self.reached:
            return Unavailable(f"{self._base}: cannot be reached within {self.deadline.seconds:g} s")
        return DeadlineExceeded(f"timeout: {self.deadline.seconds:g} s are over, and {self._base} has not answered")

    def broken(self, error: Exception) -> ServingError:
        """The connection could not be made, or ended before an answer began."""
        reason = "it closed the connection" if self.reached else str(error)
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return BadAnswer(f"{self._base}: its certificate is not trusted ({cause.verify_message:.200})")
            if isinstance(cause, ssl.SSLError):
                reason = f"TLS: {cause.reason or cause}"
                if cause.reason == "WRONG_VERSION_NUMBER":
                    return BadAnswer(f"{self._base}: there is no TLS, expected it, or a base_url with http")
            elif isinstance(cause, OSError) and cause.errno:  # below 0: of the look-up of a name
                reason = os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        return Unavailable(f"{self._base}: cannot be reached ({reason:.200})")

    def no_http(self) -> BadAnswer:
        """What came is no HTTP."""
        return BadAnswer(f"{self._base}: what it sends is no HTTP/1.1")

    def cut_off(self) -> BadAnswer:
        """The connection ended within an answer."""
        return BadAnswer(f"{self._base}: the answer was cut off")

    def too_large(self, most: int) -> BadAnswer:
        """More came, or was announced, than is taken."""
        return BadAnswer(f"{self._base}: the answer has more than {most:,} bytes, expected at most max_bytes")


def media_type(headers: Mapping[str, str]) -> str:
    """Of a body, without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _encoded(body: Mapping[str, Any]) -> bytes:
    given = {name: value for name, value in body.items() if value is not None}
    try:
        return json.dumps(given, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"text: not valid Unicode ({error.reason}), expected text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"request: {error!s:.200}, expected values that JSON has") from None


def _retry_after(value: str) -> float | None:
    """Seconds of a ``Retry-After`` header, which gives them or a date; None for anything else."""
    if re.fullmatch(r"[0-9]{1,6}", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it came of; of several at once the first."""
    at: BaseException | None = error
    for _ in range(20):
        if at is None:
            return
        yield at
        at = at.exceptions[0] if isinstance(at, BaseExceptionGroup) else at.__cause__ or at.__context__


# -- arguments ---------------------------------------------------------------------------------------------------------


def checked_fields(fields: Mapping[str, Any], known: type, seconds: float) -> tuple[float, dict[str, Any]]:
    """Seconds for a call, and what else is said of it; seconds: where ``fields`` has no ``timeout``.

    Raises:
        TypeError: there is no such field. ValueError: the timeout makes no sense.
    """
    names = known.__annotations__
    if unknown := [name for name in fields if name not in names]:
        raise TypeError(f"{unknown[0]}: there is no such field, expected some of {', '.join(sorted(names))}")
    body = dict(fields)
    given = body.pop("timeout", None)
    if given is not None:
        check_timeout(given)
    return (seconds if given is None else given), body


def checked_text(text: object, name: str = "text") -> str:
    """``text``; ``InvalidRequest`` where it is no str."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{name}: got {type(text).__name__}, expected str")
    return text


def checked_texts(texts: Iterable[str]) -> list[str]:
    """``texts`` as a list; ``InvalidRequest`` where they are not several str."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise InvalidRequest(f"texts: got {type(texts).__name__}, expected a list of str")
    return [checked_text(text, f"texts[{i}]") for i, text in enumerate(texts)]


def long_messages(messages: Iterable[Mapping[str, Any]], min_chars: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Copies of the messages of a chat, and the indices of those whose text has at least ``min_chars`` characters."""
    if type(min_chars) is not int or min_chars < 1:
        raise InvalidRequest(f"min_chars: got {min_chars!r:.40}, expected a number of at least 1")
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise InvalidRequest(f"messages: got {type(messages).__name__}, expected a list of messages")
    chat = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages[{i}]: got {type(message).__name__}, expected a dict with role and content")
        chat.append(dict(message))
    contents = [message.get("content") for message in chat]
    return chat, [i for i, text in enumerate(contents) if isinstance(text, str) and len(text) >= min_chars]
