"""The bodies of answers, as the clients read them, and several texts on their way.

Whatever comes from a server is hostile until it is checked: sizes before memory is taken, forms before values. Nothing
is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condense_core.serving.client_calls import Backoff, checked_texts
from condense_core.serving.errors import BadAnswer, ServingError
from condense_core.serving.wire import END, FRAME, MAX_FRAME_BYTES, MAX_TEXTS, error_from

if TYPE_CHECKING:
    from condense_core.compressor.soft_tokens import SoftTokens
    from condense_core.pruning.cache import PrunedCache

MAX_JSON_BYTES = 4 * 2**20
MAX_ERROR_BYTES = 64 * 2**10
_MAX_GROUP_CHARS = 2**20  # at most 6 MiB of JSON, less than any server's default bound


def json_object(body: bytes) -> dict[str, Any]:
    """A body of JSON."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswer("the answer is no JSON, expected an object") from None
    if not isinstance(told, dict):
        raise BadAnswer(f"the answer is {type(told).__name__}, expected a JSON object")
    return told


def soft_tokens(payload: bytes, text: str, max_bytes: int) -> SoftTokens:
    """Soft tokens of ``text``, of bytes that nobody has checked; ``BadAnswer`` for anything else."""
    from condense_core.compressor.soft_tokens import SoftTokens, SoftTokensError

    try:
        soft = SoftTokens.from_bytes(payload, max_bytes=max_bytes)
    except SoftTokensError as error:
        raise BadAnswer(f"soft tokens: {error}") from None
    if soft.context_sha256 and soft.context_sha256 != hashlib.sha256(text.encode()).hexdigest():
        raise BadAnswer("soft tokens: they are of another text")
    return soft


def pruned_cache(path: Path) -> PrunedCache:
    """A pruned cache that was received into a file, mapped into memory; ``BadAnswer`` for any other file."""
    from condense_core.pruning.cache import PrunedCache

    try:
        return PrunedCache.load(path)
    except ValueError as error:
        raise BadAnswer(f"pruned cache: {str(error).removeprefix(f'{path}: ')}") from None


class FrameParser:
    """Takes frames out of a body that comes in pieces.

    Args:
        count: indices are below it, and each comes once.
        max_bytes: of all frames together.
    """

    def __init__(self, count: int, max_bytes: int) -> None:
        self._missing = set(range(count))
        self._room = max_bytes
        self._buffer = bytearray()
        self._head: tuple[int, int, int] | None = None
        self._ended = False

    def feed(self, piece: bytes) -> list[tuple[int, bytes | ServingError]]:
        """The frames that ``piece`` completes: an index with its payload or error. ``BadAnswer``: these are none."""
        self._buffer += piece
        found: list[tuple[int, bytes | ServingError]] = []
        while True:
            if self._head is None:
                if self._ended and self._buffer:
                    raise BadAnswer("frames: bytes behind the last one")
                if len(self._buffer) < FRAME.size:
                    return found
                index, status, length = FRAME.unpack_from(self._buffer)
                self._check(index, status, length)
                del self._buffer[: FRAME.size]
                if index == END:
                    self._ended = True
                    continue
                self._head = (index, status, length)
            index, status, length = self._head
            if len(self._buffer) < length:
                return found
            payload, self._head = bytes(self._buffer[:length]), None
            del self._buffer[:length]
            found.append((index, payload if status == 200 else _frame_error(payload, status)))

    def end(self) -> None:
        """``BadAnswer`` unless the body may end here."""
        if not self._ended:
            raise BadAnswer("frames: the answer was cut off")

    def _check(self, index: int, status: int, length: int) -> None:
        if index == END:
            if self._missing or length:
                raise BadAnswer(f"frames: the last one came {len(self._missing)} texts too early, or is not empty")
            return
        if index not in self._missing:
            raise BadAnswer(f"frames: got index {index:,}, expected each index of a text once")
        if status != 200 and not 400 <= status < 600:
            raise BadAnswer(f"frames: got status {status:,}, expected 200 or that of an error")
        most = min(self._room, MAX_FRAME_BYTES if status == 200 else MAX_ERROR_BYTES)
        if length > most:
            raise BadAnswer(f"frames: one of {length:,} bytes, expected at most {most:,}")
        self._missing.remove(index)
        self._room -= length


def _frame_error(payload: bytes, status: int) -> ServingError:
    try:
        return error_from(json.loads(payload), status)
    except (ValueError, RecursionError):
        return error_from(None, status)


class Batch:
    """Several texts: the groups in which they are asked for, and those that are asked for again.

    Attributes:
        texts: all of them.
        pause: seconds to wait before the group that ``next_group`` gave last.
    """

    def __init__(self, texts: Iterable[str], backoff: Backoff) -> None:
        self.texts = checked_texts(texts)
        self.pause = 0.0
        self._backoff = backoff
        self._waiting = deque(range(len(self.texts)))
        self._again: list[int] = []
        self._longest, self._progress = 0.0, False

    def next_group(self) -> Sequence[int]:
        """Indices of texts for one request; none: all are done."""
        self.pause = 0.0
        if not self._waiting and self._again:
            self._waiting.extend(sorted(self._again))
            self._again.clear()
            self._backoff.tried = 0 if self._progress else self._backoff.tried + 1
            self.pause, self._longest, self._progress = self._longest, 0.0, False
        group: list[int] = []
        chars = 0
        while self._waiting and len(group) < MAX_TEXTS:
            chars += len(self.texts[self._waiting[0]])
            if group and chars > _MAX_GROUP_CHARS:
                break
            group.append(self._waiting.popleft())
        return group

    def asks_again(self, index: int, result: object) -> bool:
        """Whether ``result`` is an error after which text ``index`` is asked for again."""
        delay = self._backoff.delay(result) if isinstance(result, ServingError) else None
        if delay is None:
            self._progress = True
            return False
        self._again.append(index)
        self._longest = max(self._longest, delay)
        return True
