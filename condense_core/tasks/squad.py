"""Questions that people asked about paragraphs, from a file in SQuAD's format, as tasks over longer contexts.

The format is that of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv 1606.05250), which XQuAD (Artetxe et al. 2020, arXiv
1910.11856), and many data sets in other languages share: articles of paragraphs, questions about a paragraph, and one
or more answers that are spans of it. Questions that SQuAD 2.0 marks as impossible are left out.

A context is made of whole paragraphs of different articles, so that the answer must be found among other subjects.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condense_core.decoder.prompt import check_text
from condense_core.files.text import decode_text
from condense_core.tasks.generators import Task, Turn

MAX_BYTES = 256 * 2**20
"""Largest file that is read."""

_BETWEEN = "\n\n"
_ATTEMPTS = 50


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, the number of its article, and the questions about it."""

    article: int
    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class SquadConfig:
    """The shape of a task.

    Attributes:
        min_chars, max_chars: bounds of the context's length in characters.
        num_questions: about each context; fewer where its paragraphs have fewer.
    """

    min_chars: int = 6000
    max_chars: int = 7000
    num_questions: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.min_chars <= self.max_chars:
            raise ValueError(f"min_chars, max_chars: got {self.min_chars}, {self.max_chars}; expected 1 <= min <= max")
        if self.num_questions < 1:
            raise ValueError(f"num_questions: got {self.num_questions}, expected at least 1")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_squad(path: str | Path) -> list[Paragraph]:
    """The paragraphs of a file in SQuAD's format, in the file's order.

    Raises:
        ValueError: there is no such file, it is larger than ``MAX_BYTES``, not JSON in UTF-8, or something in it is
            missing, of another type, empty, or an answer that does not stand in its paragraph where the file says; the
            message names the file and the place.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"squad: {path} is not a file; expected one in SQuAD's JSON format")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES:,} bytes; expected a smaller file in SQuAD's format")
    try:
        content = json.loads(decode_text(data, str(path)))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); expected a file in SQuAD's format"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: its JSON is nested too deeply; expected a file in SQuAD's format") from None
    paragraphs = list(_paragraphs(_Place(str(path), "", content)))
    if not any(paragraph.turns for paragraph in paragraphs):
        raise ValueError(f"{path}: holds no question that has an answer; expected at least one")
    return paragraphs


@dataclass(frozen=True)
class _Place:
    """A value of the file, and where it stands: what errors name."""

    file: str
    path: str
    value: Any

    def error(self, came: str, expected: str) -> ValueError:
        where = f"{self.file}, {self.path}" if self.path else self.file
        return ValueError(f"{where}: {came}, expected {expected}")

    def field(self, name: str) -> _Place:
        """The field ``name`` of an object."""
        if not isinstance(self.value, dict):
            raise self.error(_kind(self.value), f"an object with a field {name!r}")
        path = f"{self.path}.{name}".lstrip(".")
        if name not in self.value:
            raise self.error("no " + repr(name), f"a field {name!r}")
        return _Place(self.file, path, self.value[name])

    def items(self, *, empty: bool = False) -> Iterator[_Place]:
        """The items of a list, of at least one unless ``empty``."""
        if not isinstance(self.value, list):
            raise self.error(_kind(self.value), "a list")
        if not self.value and not empty:
            raise self.error("an empty list", "at least one item")
        return (_Place(self.file, f"{self.path}[{i}]", value) for i, value in enumerate(self.value))

    def text(self) -> str:
        """A string that is not blank."""
        if not isinstance(self.value, str):
            raise self.error(_kind(self.value), "a string")
        if not self.value.strip():
            raise self.error("a blank string", "text")
        check_text(self.value, f"{self.file}, {self.path}")
        return self.value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _paragraphs(file: _Place) -> Iterator[Paragraph]:
    for number, article in enumerate(file.field("data").items()):
        for paragraph in article.field("paragraphs").items():
            text = paragraph.field("context").text()
            turns = [_turn(question, text) for question in paragraph.field("qas").items(empty=True)]
            yield Paragraph(number, text, tuple(turn for turn in turns if turn is not None))


def _turn(question: _Place, paragraph: str) -> Turn | None:
    """A question with its answers; None for one that SQuAD 2.0 marks as impossible."""
    asked = question.field("question").text().strip()
    impossible = question.value.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise question.field("is_impossible").error(_kind(impossible), "true or false")
    answers = [_answer(answer, paragraph) for answer in question.field("answers").items(empty=impossible)]
    if impossible:
        return None
    first, *others = dict.fromkeys(answers)
    return Turn(asked, first, _question_word(asked), tuple(others))


def _answer(answer: _Place, paragraph: str) -> str:
    text, start = answer.field("text").text(), answer.field("answer_start")
    if isinstance(start.value, bool) or not isinstance(start.value, int):
        raise start.error(_kind(start.value), "an integer")
    if start.value < 0 or not paragraph.startswith(text, start.value):
        found = paragraph[max(start.value, 0) : max(start.value, 0) + len(text)]
        if text not in paragraph:
            raise answer.error(f"the answer {text!r:.60} does not stand in its paragraph", "a span of it")
        raise start.error(f"{start.value}, where the paragraph has {found!r:.60}", f"the place of {text!r:.60}")
    return text


def _question_word(question: str) -> str:
    """What is asked for, as far as a word says it: the kind of the question."""
    words = re.findall(r"[^\W\d_]+", question.lower())
    for i, word in enumerate(words):
        if word in ("who", "whom", "whose"):
            return "who"
        if word == "how" and words[i + 1 : i + 2] in (["many"], ["much"]):
            return f"how {words[i + 1]}"
        if word in ("what", "when", "where", "which", "why", "how"):
            return word
    return "other"


# -- tasks -------------------------------------------------------------------------------------------------------------


def squad_tasks(
    paragraphs: Sequence[Paragraph], count: int, *, seed: int, config: SquadConfig | None = None
) -> Iterator[Task]:
    """The first ``count`` tasks of the stream ``seed``: contexts of whole paragraphs, and questions about them.

    Every paragraph is used once before one is used again, as far as contexts of the wanted length can be made so, and
    those of a context are of different articles, as far as there are enough. Each paragraph of a context is asked about
    once before one is asked about again.

    Raises:
        ValueError: no context of the wanted length can be made of the paragraphs.
    """
    config = config or SquadConfig()
    tasks = _stream(paragraphs, seed, config)
    return (next(tasks) for _ in range(count))


def _stream(paragraphs: Sequence[Paragraph], seed: int, config: SquadConfig) -> Iterator[Task]:
    fitting = [paragraph for paragraph in paragraphs if len(paragraph.text) <= config.max_chars]
    if not any(paragraph.turns for paragraph in fitting):
        raise ValueError(f"max_chars: got {config.max_chars}, less than every paragraph with a question has")
    rng = random.Random(f"squad-{seed}")
    while True:
        asked = [context for context in _contexts(fitting, rng, config) if any(p.turns for p in context)]
        if not asked:
            raise ValueError(
                f"min_chars: got {config.min_chars}, and no context so long has a paragraph with a question"
            )
        for context in asked:
            text = _BETWEEN.join(paragraph.text for paragraph in context)
            yield Task("question", text, _asked(context, rng, config.num_questions))


def _asked(context: list[Paragraph], rng: random.Random, count: int) -> tuple[Turn, ...]:
    """``count`` questions: one about each paragraph, then a second about each, and so on; in random order."""
    shuffled = [rng.sample(paragraph.turns, len(paragraph.turns)) for paragraph in context]
    rounds = max(map(len, shuffled))
    drawn: list[Turn] = []
    for i in range(rounds):
        further = [turns[i] for turns in shuffled if i < len(turns)]
        drawn += rng.sample(further, len(further))
    drawn = drawn[:count]
    return tuple(rng.sample(drawn, len(drawn)))


def _length(context: Sequence[Paragraph]) -> int:
    return sum(len(paragraph.text) for paragraph in context) + len(_BETWEEN) * (len(context) - 1)


def _contexts(paragraphs: list[Paragraph], rng: random.Random, config: SquadConfig) -> list[list[Paragraph]]:
    """Contexts that use every paragraph once; where no such partition is found, contexts filled one after another."""
    total = sum(len(paragraph.text) + len(_BETWEEN) for paragraph in paragraphs)
    # A fifth of the range above the minimum leaves room for contexts of uneven length.
    aim = config.min_chars + (config.max_chars - config.min_chars) / 5
    number = max(1, int(total / aim))
    for _ in range(_ATTEMPTS):
        contexts = _partition(paragraphs, number, rng)
        if all(config.min_chars <= _length(context) <= config.max_chars for context in contexts):
            return [rng.sample(context, len(context)) for context in rng.sample(contexts, number)]
    return _filled(paragraphs, rng, config)


def _partition(paragraphs: list[Paragraph], number: int, rng: random.Random) -> list[list[Paragraph]]:
    """Each paragraph, long ones first, into the shortest context that has none of its article."""
    contexts: list[list[Paragraph]] = [[] for _ in range(number)]
    lengths = [0] * number
    jittered = [(len(paragraph.text) * rng.uniform(0.7, 1.3), i) for i, paragraph in enumerate(paragraphs)]
    for _, i in sorted(jittered, reverse=True):
        paragraph = paragraphs[i]

        def order(place: int, article: int = paragraph.article) -> tuple[int, int]:
            return sum(other.article == article for other in contexts[place]), lengths[place]

        place = min(range(number), key=order)
        contexts[place].append(paragraph)
        lengths[place] += len(paragraph.text) + len(_BETWEEN)
    return contexts


def _filled(paragraphs: list[Paragraph], rng: random.Random, config: SquadConfig) -> list[list[Paragraph]]:
    """Contexts that begin with the next unused paragraph, filled with unused ones first, then with any."""
    unused = rng.sample(paragraphs, len(paragraphs))
    contexts = []
    while unused:
        context = [unused.pop(0)]
        others = [p for p in unused if p not in context] + rng.sample(paragraphs, len(paragraphs))
        for strict in (True, False):
            for other in others:
                if _length(context) >= config.min_chars:
                    break
                apart = all(other.article != p.article if strict else other is not p for p in context)
                if apart and _length([*context, other]) <= config.max_chars:
                    context.append(other)
        unused = [p for p in unused if not any(p is used for used in context)]
        if _length(context) >= config.min_chars:
            contexts.append(context)
    if not contexts:
        total = _length(paragraphs)
        raise ValueError(
            f"min_chars, max_chars: got {config.min_chars}, {config.max_chars}; no such context can be made of the "
            f"{len(paragraphs)} paragraphs, which have {total:,} characters together"
        )
    return contexts
