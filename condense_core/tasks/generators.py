"""Tasks with a known answer over any text: question answering, reconstruction, continuation.

A task is a function of (source, seed, index): every machine that holds the same text makes the same task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from condense_core.tasks.facts import KINDS, Fact, Split
from condense_core.tasks.sources import TextSource
from condense_core.tasks.wording import LONGEST_STATEMENT, WORDINGS, draw_worded_facts

TASKS = ("question", "reconstruction", "continuation")
REPEAT_PROMPT = "Repeat the text."
CONTINUE_PROMPT = "Continue the text."
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")  # one space only: joining restores every other


@dataclass(frozen=True)
class Turn:
    """A question about the context, its expected answer and the kind of fact it asks for.

    others: further answers that are as good; the loss is that of ``answer``.
    """

    question: str
    answer: str
    kind: str
    others: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that are right."""
        return (self.answer, *self.others)


@dataclass(frozen=True)
class Task:
    """A context and what is asked about it; one turn except for question answering."""

    task: str
    context: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class TaskConfig:
    """The shape of a task.

    Attributes:
        min_chars, max_chars: bounds of the context's length in characters.
        num_facts: facts inserted into it, of which num_questions are asked.
        target_chars: length of the text to repeat or continue.
        kinds, split: of the facts, as ``facts.draw_facts`` takes them.
        wording: of the facts: ``plain`` (``facts``), of which the embedded model has seen the train split, or
            ``varied`` (``wording``).
    """

    min_chars: int = 6000
    max_chars: int = 7000
    num_facts: int = 8
    num_questions: int = 5
    kinds: tuple[str, ...] = KINDS
    split: Split = "eval"
    target_chars: int = 400
    wording: str = "plain"

    def __post_init__(self) -> None:
        if not 200 <= self.min_chars <= self.max_chars:
            raise ValueError(
                f"min_chars, max_chars: got {self.min_chars}, {self.max_chars}; expected 200 <= min <= max"
            )
        if not 1 <= self.num_questions <= self.num_facts:
            raise ValueError(f"num_questions: got {self.num_questions}, expected 1 to num_facts={self.num_facts}")
        if self.wording not in WORDINGS:
            raise ValueError(f"wording: got {self.wording!r}, expected one of {', '.join(WORDINGS)}")
        longest = LONGEST_STATEMENT[self.wording]
        if self.num_facts * longest > self.min_chars:
            raise ValueError(
                f"num_facts: got {self.num_facts}, expected at most min_chars/{longest} = {self.min_chars // longest}"
            )
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds: got {', '.join(self.kinds) or 'none'}, expected some of {', '.join(KINDS)}")
        if self.split not in get_args(Split):
            raise ValueError(f"split: got {self.split!r}, expected one of {', '.join(get_args(Split))}")
        if self.target_chars < 1:
            raise ValueError(f"target_chars: got {self.target_chars}, expected at least 1")


def make_task(task: str, source: TextSource, *, seed: int, index: int = 0, config: TaskConfig | None = None) -> Task:
    """Task number ``index`` of the stream ``seed``."""
    config = config or TaskConfig()
    rng = random.Random(f"{task}-{seed}-{index}")
    length = rng.randint(config.min_chars, config.max_chars)
    if task == "question":
        facts = draw_worded_facts(config.wording, config.num_facts, rng, split=config.split, kinds=config.kinds)
        context = insert_facts(running_text(source, rng, length - sum(len(f.statement) + 1 for f in facts)), facts, rng)
        asked = rng.sample(facts, config.num_questions)
        return Task(task, context, tuple(Turn(f.question, f.answer, f.kind) for f in asked))
    if task == "reconstruction":
        context = running_text(source, rng, length)
        return Task(task, context, (Turn(REPEAT_PROMPT, context[: config.target_chars], "text"),))
    if task == "continuation":
        text = running_text(source, rng, length + config.target_chars)
        context, target = text[:length], text[length : length + config.target_chars]
        return Task(task, context, (Turn(CONTINUE_PROMPT, target, "text"),))
    raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")


def make_tasks(
    task: str, source: TextSource, count: int, *, seed: int, config: TaskConfig | None = None
) -> Iterator[Task]:
    """The first ``count`` tasks of the stream ``seed``."""
    return (make_task(task, source, seed=seed, index=i, config=config) for i in range(count))


def running_text(source: TextSource, rng: random.Random, num_chars: int) -> str:
    """Exactly ``num_chars`` characters of running text from a random place; further documents follow a short one."""
    index = rng.randrange(len(source))
    text = source.document(index)
    start = rng.randrange(max(1, len(text) - num_chars))
    # Begin at a sentence, not in the middle of a word.
    begin = text.find(". ", start, start + 500)
    text = text[begin + 2 if begin >= 0 else 0 :]
    while len(text) < num_chars:
        index += 1
        text += "\n" + source.document(index % len(source))
    return text[:num_chars]


def insert_facts(text: str, facts: list[Fact], rng: random.Random) -> str:
    """Put every statement behind a random sentence of ``text``, in random order."""
    paragraphs = [_SENTENCE_END.split(p) for p in text.split("\n")]
    places = [(i, j) for i, sentences in enumerate(paragraphs) for j in range(len(sentences))]
    for fact, (i, j) in zip(facts, rng.choices(places, k=len(facts)), strict=True):
        paragraphs[i][j] += f" {fact.statement}"
    return "\n".join(" ".join(sentences) for sentences in paragraphs)
