"""Where running text comes from: a folder, a JSON-lines file, a Hugging Face dataset, or a writer of its own."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

_MAX_LINE = 64 * 1024 * 1024


class TextSource(Protocol):
    """Documents by index: deterministic, so that a task is a function of source and seed."""

    def __len__(self) -> int: ...

    def document(self, index: int) -> str: ...


class ListSource:
    """Documents held in memory."""

    def __init__(self, documents: list[str], name: str = "texts") -> None:
        self._documents = [d for d in documents if d.strip()]
        if not self._documents:
            raise ValueError(f"{name}: holds no text; expected at least one document that is not empty")

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, index: int) -> str:
        return self._documents[index % len(self)]


def open_source(path: str | Path | None) -> TextSource:
    """The source behind ``path``.

    ``None``: the built-in writer. A folder: its ``*.txt`` and ``*.md`` files. A ``.jsonl`` or ``.jsonl.xz`` file: the
    ``text`` of every line. Another file: its text. ``dataset:NAME``: the ``text`` column of the train split of a
    Hugging Face dataset (needs the library ``datasets``).
    """
    if path is None:
        return ProseWriter()
    if str(path).startswith("dataset:"):
        return _dataset(str(path).removeprefix("dataset:"))
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        return ListSource([_read_text(p) for p in files], str(path))
    if not path.exists():
        raise ValueError(
            f"corpus: {path} does not exist; expected a folder, a text or .jsonl(.xz) file, or dataset:NAME"
        )
    if path.name.endswith((".jsonl", ".jsonl.xz")):
        return ListSource(list(_json_lines(path)), str(path))
    return ListSource([_read_text(path)], str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); expected text") from None


def _json_lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = json.loads(line)["text"] if len(line) <= _MAX_LINE else None
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise ValueError(f'{path}, line {number}: expected one JSON object a line with a string "text"')
                yield text
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}, behind line {number}: cannot be read as UTF-8 text ({error})") from None


def _dataset(name: str) -> TextSource:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ValueError("corpus: dataset:NAME needs the library 'datasets'; install condense-core[hub]") from None
    return ListSource(list(load_dataset(name, split="train")["text"]), f"dataset:{name}")


class ProseWriter:
    """Plain prose about a small town, written from a grammar: filler for tests and demos without a corpus."""

    _SUBJECTS = (
        "the postman|a traveller|the old gardener|her neighbour|the schoolteacher|a group of students|the baker|"
        "the night watchman|an engineer|the librarian|my uncle|the fisherman|a young painter|the council|the choir"
    ).split("|")
    _VERBS = (
        "walked past|looked at|wrote about|spoke of|remembered|painted|repaired|admired|avoided|measured|described|"
        "visited|drew a map of|complained about|told a story about"
    ).split("|")
    _OBJECTS = (
        "the market square|the long road to the coast|the river after the rain|an empty house|the first snow|"
        "the noise of the trains|a field of barley|the broken clock|the harvest|the new bus timetable|the hills|"
        "a box of letters|the smell of bread|the evening light|the price of coal"
    ).split("|")
    _ENDINGS = (
        "before breakfast|without a word|and nobody was surprised|for the third time that week|as people often do|"
        "because there was little else to do|while the rain went on|and then went home|with great patience|"
        "although the day was already late|which pleased everyone|until the lamps were lit"
    ).split("|")
    _OPENINGS = (
        "In the morning|Later that day|As usual|Some years ago|On the way back|To be honest|After a while|"
        "During the winter|Once more|By then"
    ).split("|")

    def __len__(self) -> int:
        return 100

    def document(self, index: int, num_sentences: int = 400) -> str:
        rng = random.Random(f"prose-{index}")
        paragraphs, sentences = [], []
        for _ in range(num_sentences):
            clause = f"{rng.choice(self._SUBJECTS)} {rng.choice(self._VERBS)} {rng.choice(self._OBJECTS)}"
            sentence = f"{clause} {rng.choice(self._ENDINGS)}." if rng.random() < 0.7 else f"{clause}."
            sentence = f"{rng.choice(self._OPENINGS)} {sentence}" if rng.random() < 0.4 else sentence
            sentences.append(sentence[0].upper() + sentence[1:])
            if rng.random() < 0.2:
                paragraphs.append(" ".join(sentences))
                sentences = []
        return "\n".join([*paragraphs, " ".join(sentences)]).strip()
