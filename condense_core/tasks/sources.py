"""Where running text comes from: a folder, a JSON-lines file, a Hugging Face dataset, or a writer of its own.

A corpus is read once when it is opened, to find where its documents lie and what is wrong with it. After that a
document is read when it is asked for: a corpus may be larger than the memory.
"""

from __future__ import annotations

import json
import lzma
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import IO, Any, Protocol

from condense_core.files.text import decode_text
from condense_core.tasks.prose import ProseWriter

__all__ = ["LazySource", "ListSource", "ProseWriter", "TextSource", "open_source"]

_MAX_LINE = 64 * 1024 * 1024
_MAX_IN_MEMORY = 128 * 1024 * 1024  # of a compressed file's content; what is longer goes into a temporary file

_MAX_DOCUMENT = 16 * 1024 * 1024  # bytes of a text file; a larger one is several documents
_PART = 1024 * 1024


class TextSource(Protocol):
    """Documents by index: deterministic, so that a task is a function of source and seed."""

    def __len__(self) -> int: ...

    def document(self, index: int) -> str: ...


class LazySource:
    """Documents that are read when they are asked for."""

    def __init__(self, keys: Sequence[Any], read: Callable[[Any], str], name: str) -> None:
        """Of one document for each key.

        Args:
            keys: what ``read`` takes: paths, or places in a file.
            read: gives the text of a document, the same each time.
            name: of the corpus, for messages.

        Raises:
            ValueError: there is no key.
        """
        if not len(keys):
            raise ValueError(f"{name}: holds no text; expected at least one document that is not empty")
        self._keys, self._read = keys, read

    def __len__(self) -> int:
        return len(self._keys)

    def document(self, index: int) -> str:
        """The text of document ``index``; indices beyond the last begin again at the first."""
        return self._read(self._keys[index % len(self)])


class ListSource(LazySource):
    """Documents held in memory."""

    def __init__(self, documents: list[str], name: str = "texts") -> None:
        super().__init__([d for d in documents if d.strip()], str, name)


def open_source(path: str | Path | None) -> TextSource:
    """The documents behind ``path``, without those that are blank.

    Args:
        path: None: the built-in writer. A folder: its ``*.txt`` and ``*.md`` files. A ``.jsonl`` or ``.jsonl.xz`` file:
            the ``text`` of every line. Another file: its text. ``dataset:NAME``: the ``text`` column of the train split
            of a Hugging Face dataset (needs the library ``datasets``).

    Raises:
        ValueError: there is nothing, nothing but blanks, or something that is no text.
    """
    if path is None:
        return ProseWriter()
    if str(path).startswith("dataset:"):
        return _dataset(str(path).removeprefix("dataset:"))
    path = Path(path)
    if path.is_dir():
        return _text_files(sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file()), path)
    if not path.exists():
        raise ValueError(
            f"corpus: {path} does not exist; expected a folder, a text or .jsonl(.xz) file, or dataset:NAME"
        )
    if path.name.endswith((".jsonl", ".jsonl.xz")):
        return _json_lines(path)
    return _text_files([path], path)


def _text_files(paths: Sequence[Path], corpus: Path) -> TextSource:
    """A document for each file; a file that is too large to be one is cut at line ends."""
    parts = [part for path in paths for part in _parts(path) if _read_part(part).strip()]
    return LazySource(parts, _read_part, str(corpus))


def _parts(path: Path) -> Iterator[tuple[Path, int, int]]:
    """``(path, start, stop)`` in bytes: the whole file, or parts of about ``_PART`` bytes that end with a line."""
    size = path.stat().st_size
    if size <= _MAX_DOCUMENT:
        yield path, 0, size
        return
    start = 0
    with path.open("rb") as file:
        while start < size:
            file.seek(start)
            data = file.read(_PART)
            stop = len(data) if start + len(data) == size else data.rfind(b"\n") + 1
            if not stop:  # one line, which is cut between two characters
                stop = len(data)
                while stop > 1 and data[stop - 1] & 0xC0 == 0x80:
                    stop -= 1
                stop -= 1
            yield path, start, start + stop
            start += stop


def _read_part(part: tuple[Path, int, int]) -> str:
    path, start, stop = part
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    return decode_text(data, str(path)) if data else ""


def _json_lines(path: Path) -> TextSource:
    """The documents of a file with a JSON object a line; of a compressed one, its content is unpacked first.

    An xz file can be read from its beginning only, and tasks ask for documents in any order.
    """
    places = array("q")
    file: IO[bytes]
    if path.suffix == ".xz":
        file = tempfile.SpooledTemporaryFile(max_size=_MAX_IN_MEMORY)  # noqa: SIM115  # lives as long as the source
        lines: IO[bytes] = lzma.open(path)  # noqa: SIM115  # closed by _documents
    else:
        file = lines = path.open("rb")
    for place, text in _documents(path, lines, file if file is not lines else None):
        if text.strip():
            places.append(place)
    lock = Lock()

    def read(place: int) -> str:
        with lock:  # the place in the file belongs to all threads
            file.seek(place)
            line = file.readline()
        text: str = json.loads(line)["text"]
        return text

    return LazySource(places, read, str(path))


def _documents(path: Path, lines: IO[bytes], copy: IO[bytes] | None) -> Iterator[tuple[int, str]]:
    """Where each line of ``lines`` begins, and its text; what is read is written to ``copy``, if there is one."""
    number = place = 0
    try:
        while line := lines.readline(_MAX_LINE + 1):
            number += 1
            try:
                text = json.loads(line.decode())["text"] if len(line) <= _MAX_LINE else None
            except UnicodeDecodeError:
                raise
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: expected one JSON object a line with a string "text"')
            if copy is not None:
                copy.write(line)
            yield place, text
            place += len(line)
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}, behind line {number}: cannot be read as UTF-8 text ({error})") from None


def _dataset(name: str) -> TextSource:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ValueError("corpus: dataset:NAME needs the library 'datasets'; install condense-core[hub]") from None
    column = load_dataset(name, split="train")["text"]  # mapped into memory, not loaded
    rows = array("q", (i for i, text in enumerate(column) if text.strip()))
    return LazySource(rows, lambda row: str(column[row]), f"dataset:{name}")
