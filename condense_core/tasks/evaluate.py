"""How well a model answers from soft tokens, beside its full context and none: answers, losses, sizes and times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from condense_core.compressor.condenser import Condenser, Context
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.tasks.answers import answer_ids, answer_loss, answers_about, answers_from_each
from condense_core.tasks.generators import Task
from condense_core.tasks.tally import Tally, default_max_new_tokens

__all__ = ["EvalRow", "answer_ids", "answer_loss", "evaluate", "synchronize"]

WITH_QUESTION = "+question"
"""The end of the name of a row whose soft tokens are made for each question."""


@dataclass(frozen=True)
class EvalRow:
    """One way to give the context; ``ratio`` 0 stands for the controls ``full`` and ``none``.

    Attributes:
        contained: share of the answers that contain the expected one, in [0, 1]; see ``metrics.contained``.
        exact_match: share of the answers that are the expected one and nothing else, in [0, 1].
        f1: mean F1 of the words of answer and expected answer, in [0, 1].
        loss: nats per token of the expected answer.
        recovered: share of the context's worth that is left, not clipped; see ``metrics.recovered``.
        share_of_full: ``contained`` over that with the full context; None where nothing is right with it.
        intervals: 95% confidence intervals ``[low, high]`` of these six, by name; None: there is none. See
            ``confidence``.
        positions: mean positions that the context takes in the decoder.
        compress_ms: median milliseconds to compress one context.
        answer_ms: mean milliseconds of one question: to answer all about a context, prefill included, over their
            number; what they share is read once.
        num_questions: how many were asked.
        contained_by_kind, by_kind: ``contained`` and ``exact_match`` for each kind of fact.
        answers: ``contained``, ``f1``, ``exact_match`` and ``loss`` of each question, in the order of the tasks.
    """

    method: str
    ratio: float
    contained: float
    exact_match: float
    f1: float
    loss: float
    recovered: float
    positions: float
    compress_ms: float
    answer_ms: float
    num_questions: int
    share_of_full: float | None = None
    intervals: dict[str, list[float] | None] = field(default_factory=dict)
    contained_by_kind: dict[str, float] = field(default_factory=dict)
    by_kind: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[float]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """``exact_match``, under the name that reports of version 0.1 give it."""
        return self.exact_match

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class _SoftTally(Tally):
    positions: list[int] = field(default_factory=list)
    compress_ms: list[float] = field(default_factory=list)


def evaluate(
    condensers: dict[str, Condenser],
    tasks: Iterable[Task],
    *,
    ratios: Sequence[float],
    controls: bool = True,
    max_new_tokens: int | None = None,
    progress: Callable[[], None] | None = None,
    on_rows: Callable[[Callable[[], list[EvalRow]]], None] | None = None,
) -> list[EvalRow]:
    """Ask every question of ``tasks`` with each method at each ratio; ``full`` and ``none`` first.

    Args:
        condensers: by the name of their rows, over the same decoder. Where a name ends in ``+question``, each question
            has soft tokens of its own, compressed with it; the time to compress is then that for one question.
        tasks: contexts, and the questions about each.
        ratios: of soft tokens.
        controls: whether the questions are also asked with the full context and without any; ``recovered`` needs it.
        max_new_tokens: of an answer; None: 48 where the tokenizer has a chat template, else 16.
        progress: called once per task.
        on_rows: called whenever the questions about one context were answered in one way, with a function that gives
            the rows so far.

    Raises:
        ValueError: there is no condenser or no task.
    """
    if not condensers:
        raise ValueError("condensers: empty; expected at least one")
    reference = next(iter(condensers.values()))
    longest = max_new_tokens or default_max_new_tokens(bool(reference.tokenizer.chat_template))
    tallies: dict[tuple[str, float], _SoftTally] = {}

    def ask(number: int, name: str, ratio: float, condenser: Condenser, task: Task) -> None:
        tally = tallies.setdefault((name, ratio), _SoftTally())
        tally.context = number
        contexts: list[Context] = ["" if name == "none" else task.context]
        if ratio:
            asked = [turn.question for turn in task.turns] if name.endswith(WITH_QUESTION) else None
            count = len(asked) if asked else 1
            started = time.perf_counter()
            contexts = [*condenser.compress([task.context] * count, ratio, question=asked)]
            synchronize(condenser)
            tally.compress_ms.append((time.perf_counter() - started) * 1e3 / count)
        _ask(tally, condenser, contexts, task, longest)
        if on_rows:
            on_rows(lambda: _rows(tallies))

    for number, task in enumerate(tasks):
        if controls:
            ask(number, "full", 0, reference, task)
            ask(number, "none", 0, reference, task)
        for method, condenser in condensers.items():
            for ratio in ratios:
                ask(number, method, ratio, condenser, task)
        if progress:
            progress()
    if not tallies:
        raise ValueError("tasks: empty; expected at least one")
    return _rows(tallies)


def _rows(tallies: dict[tuple[str, float], _SoftTally]) -> list[EvalRow]:
    none, full = tallies.get(("none", 0)), tallies.get(("full", 0))
    return [
        EvalRow(
            method=method,
            ratio=ratio,
            positions=statistics.fmean(tally.positions),
            compress_ms=statistics.median(tally.compress_ms) if tally.compress_ms else 0.0,
            **tally.scores(none, full),
        )
        for (method, ratio), tally in tallies.items()
        if tally.positions
    ]


def synchronize(condenser: Condenser) -> None:
    """Wait for the device: a time taken now is of finished work."""
    if condenser.device.type == "cuda":
        torch.cuda.synchronize(condenser.device)


def _ask(tally: _SoftTally, condenser: Condenser, contexts: list[Context], task: Task, max_new_tokens: int) -> None:
    """Count the answers to the questions of ``task``; contexts: one for all of them, or one for each."""
    if len(contexts) == 1:
        answers = answers_about(condenser, contexts[0], task.turns, max_new_tokens)
    else:
        answers = answers_from_each(condenser, contexts, task.turns, max_new_tokens)
    tally.answer_ms.append(answers.ms)
    for turn, text, loss in zip(task.turns, answers.texts, answers.losses, strict=True):
        tally.add(turn, text, loss)
    context = contexts[0]
    if isinstance(context, SoftTokens):
        tally.positions.append(len(context))
    else:
        tally.positions.append(len(condenser.encode(context)) if context else 0)
