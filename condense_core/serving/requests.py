"""What an engine can be asked for. Values are checked here as far as that needs no model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from condense_core.compressor.config import COMPRESSION_METHODS, check_ratio
from condense_core.decoder.prompt import check_text
from condense_core.serving.errors import InvalidRequest
from condense_core.serving.wire import MAX_TIMEOUT, MIN_TIMEOUT

PRIORITIES = range(-10, 11)
MAX_NEW_TOKENS = 256
WAYS = ("full", "soft", "pruned", "nothing")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What all requests have.

    Attributes:
        priority: from -10 to 10; higher ones go first.
        timeout: seconds until an answer is of no more use; None: the engine's own.
        tenant: whose it is. Results are kept for nobody else, since the time of an answer would tell whether somebody
            asked the same before.
    """

    priority: int = 0
    timeout: float | None = None
    tenant: str = ""

    def __post_init__(self) -> None:
        if type(self.priority) is not int or self.priority not in PRIORITIES:
            raise InvalidRequest(f"priority: got {self.priority!r:.40}, expected an integer from -10 to 10")
        if self.timeout is not None:
            number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
            if not number or not MIN_TIMEOUT <= self.timeout <= MAX_TIMEOUT:  # as NaN is not
                raise InvalidRequest(
                    f"timeout: got {self.timeout!r:.40}, expected {MIN_TIMEOUT:g} to {MAX_TIMEOUT:g} seconds"
                )

    @property
    def num_chars(self) -> int:
        """Characters that are read for it."""
        raise NotImplementedError

    def digest(self) -> bytes:
        """SHA-256 over everything that decides the result, and over whose it is."""
        fields: dict[str, Any] = asdict(self)
        del fields["priority"], fields["timeout"]
        return hashlib.sha256(json.dumps([type(self).__name__, fields], sort_keys=True).encode()).digest()


@dataclass(frozen=True, kw_only=True)
class CompressRequest(Request):
    """A text to be made soft tokens of; the result is a ``SoftTokens``.

    Attributes:
        text: of at least one token.
        method: one that the engine has; None: its first.
        ratio, max_soft_tokens: tokens per soft token, or at most how many of these; one of them, or none (4x).
        question: what will be asked, for the method ``select``.
    """

    text: str
    method: str | None = None
    ratio: float | None = None
    max_soft_tokens: int | None = None
    question: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_texts(text=self.text, question=self.question)
        if self.method is not None and self.method not in COMPRESSION_METHODS:
            raise InvalidRequest(f"method: got {self.method!r:.60}, expected one of {', '.join(COMPRESSION_METHODS)}")
        if self.ratio is not None and self.max_soft_tokens is not None:
            raise InvalidRequest("max_soft_tokens: got a ratio too; expected one of them")
        if self.ratio is not None:
            with_message(check_ratio, self.ratio, self.method)
        _check_count("max_soft_tokens", self.max_soft_tokens)

    @property
    def num_chars(self) -> int:
        return len(self.text) + len(self.question or "")


@dataclass(frozen=True, kw_only=True)
class PruneRequest(Request):
    """A text to be read into a pruned KV cache; the result is a ``PrunedCache``.

    Attributes:
        text: of at least one token.
        method: a pruning method that the engine offers, such as ``snapkv`` or ``adakv(snapkv)``; None: its first.
        keep, budget: share of the tokens that stays, or how many; one of them, or none (a quarter).
        question: what will be asked later; the method then keeps what it needs.
        storage: ``int8`` or ``fp8``; None: the model's dtype.
    """

    text: str
    method: str | None = None
    keep: float | None = None
    budget: int | None = None
    question: str | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_texts(text=self.text, question=self.question)
        if self.method is not None and (not isinstance(self.method, str) or len(self.method) > 100):
            raise InvalidRequest(f"method: got {self.method!r:.60}, expected the name of a pruning method")
        if self.keep is not None and self.budget is not None:
            raise InvalidRequest("budget: got keep too; expected one of them")
        if self.keep is not None and (
            not isinstance(self.keep, int | float) or isinstance(self.keep, bool) or not 0 < self.keep <= 1
        ):
            raise InvalidRequest(f"keep: got {self.keep!r:.40}, expected a share of the tokens, above 0 and at most 1")
        _check_count("budget", self.budget)
        if self.storage not in (None, "int8", "fp8"):
            raise InvalidRequest(f"storage: got {self.storage!r:.40}, expected int8 or fp8")

    @property
    def num_chars(self) -> int:
        return len(self.text) + len(self.question or "")


@dataclass(frozen=True, kw_only=True)
class AnswerRequest(Request):
    """A question about a text, answered by the model itself: what the page for people shows. The result is a dict.

    Attributes:
        text, question: of at least one token each.
        way: how the model is given the text: ``full``, ``soft`` tokens, a ``pruned`` cache, or ``nothing`` of it.
        method: of the soft tokens, one that the engine has; None: its first.
        ratio: tokens of the text per token that is kept, for ``soft`` and ``pruned``.
        max_new_tokens: of the answer.
    """

    text: str
    question: str
    way: str = "full"
    method: str | None = None
    ratio: float = 4
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_texts(text=self.text, question=self.question)
        if self.way not in WAYS:
            raise InvalidRequest(f"way: got {self.way!r:.40}, expected one of {', '.join(WAYS)}")
        if self.method is not None and self.way != "soft":
            raise InvalidRequest(f"method: got one for the way {self.way!r}, expected none; it is for soft tokens")
        with_message(check_ratio, self.ratio, None)
        _check_count("max_new_tokens", self.max_new_tokens, MAX_NEW_TOKENS)

    @property
    def num_chars(self) -> int:
        return len(self.text) + len(self.question)


def with_message(function: Any, *arguments: Any, **named: Any) -> Any:
    """What ``function`` returns; the ``ValueError`` or ``TypeError`` that it raises becomes an ``InvalidRequest``."""
    try:
        return function(*arguments, **named)
    except InvalidRequest:
        raise
    except (ValueError, TypeError) as error:
        raise InvalidRequest(str(error)) from error


def _check_texts(text: object, question: object) -> None:
    with_message(check_text, text, "text")
    if not text:
        raise InvalidRequest("text: empty; expected a text of at least one token")
    if question is not None:
        with_message(check_text, question, "question")
        if not str(question).strip():
            raise InvalidRequest("question: empty; expected what will be asked")


def _check_count(name: str, value: object, most: int = 2**20) -> None:
    if value is not None and (type(value) is not int or not 1 <= value <= most):
        raise InvalidRequest(f"{name}: got {value!r:.40}, expected an integer from 1 to {most:,}")
