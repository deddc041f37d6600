"""How well a model answers from pruned caches: answers, losses, bytes and times, by method and kept share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from condense_core.compressor.condenser import Condenser
from condense_core.pruning.base import Method, check_share, layer_budgets
from condense_core.pruning.build import build, has_window, reads_question
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.dense import DensePrefill
from condense_core.pruning.methods import Random
from condense_core.pruning.text import context_ids, prompt_of, question_ids
from condense_core.tasks.answers import Answers, answers_about, answers_from_cache, answers_from_caches
from condense_core.tasks.evaluate import synchronize
from condense_core.tasks.generators import Task, Turn
from condense_core.tasks.tally import Tally, default_max_new_tokens

CONTROLS = ("full", "none", "random", "query_aware")


@dataclass(frozen=True)
class PruningRow:
    """One cache: what pruned it, and to what share.

    Where a method cannot prune to a share, ``not_possible`` says why, and what would be measured is None.

    Attributes:
        method: a control, or a name as ``build`` takes it.
        keep: the share asked for, in [0, 1]; 1 and 0 stand for the controls ``full`` and ``none``.
        contained, exact_match, f1, loss, recovered, share_of_full, intervals, answer_ms, num_questions,
            contained_by_kind, by_kind, answers: as in ``EvalRow``.
        cache_bytes: mean bytes of a cache before a question, as measured.
        ratio: bytes of the full caches over those of these; 0 for ``none``.
        prefill_ms: median milliseconds to read one context and prune it (with the question, where that decides what
            stays).
        not_possible: why there is nothing to measure; None where there is.
    """

    method: str
    keep: float
    contained: float | None = None
    exact_match: float | None = None
    f1: float | None = None
    loss: float | None = None
    recovered: float | None = None
    cache_bytes: float | None = None
    ratio: float | None = None
    prefill_ms: float | None = None
    answer_ms: float | None = None
    num_questions: int = 0
    share_of_full: float | None = None
    intervals: dict[str, list[float] | None] = field(default_factory=dict)
    contained_by_kind: dict[str, float] = field(default_factory=dict)
    by_kind: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[float]] = field(default_factory=dict)
    not_possible: str | None = None

    @property
    def accuracy(self) -> float | None:
        """``exact_match``, under the name that reports of version 0.1 give it."""
        return self.exact_match

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class CacheTally(Tally):
    """With the bytes of each cache, those of the whole context in it, and the milliseconds of its prefill."""

    cache_bytes: list[int] = field(default_factory=list)
    full_bytes: list[int] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)


class _Cells:
    """What is measured: a row for each method and share, in the report's order, and why some cannot be."""

    def __init__(self, methods: Sequence[str], shares: Sequence[float], window: int | None) -> None:
        self.window = window
        names = ("random", "query_aware", *(name for name in dict.fromkeys(methods) if name not in CONTROLS))
        keys = [("full", 1.0), ("none", 0.0), *((name, share) for name in names for share in dict.fromkeys(shares))]
        self.tallies = {key: CacheTally() for key in keys}
        self.not_possible: dict[tuple[str, float], str] = {}

    def made(self, name: str, share: float, question: list[int] | None = None) -> Method:
        """The method of a row; question: its token ids, where the row's caches know them."""
        return row_method(name, share, question, window=self.window)

    def refuse(self, num_tokens: Sequence[int], num_layers: int) -> None:
        """Take out what cannot prune contexts of ``num_tokens`` tokens so far, before anything is read."""
        for name, share in self.tallies:
            if name == "none":
                continue
            method = self.made(name, share, [0] if knows_question(name) else None)  # any question will do
            try:
                for layer in range(num_layers):
                    layer_budgets(method, layer, num_layers, num_tokens)
            except ValueError as error:
                self.not_possible[name, share] = str(error)

    def rows(self) -> list[PruningRow]:
        """The rows so far; those not yet begun are left out."""
        none, full = self.tallies["none", 0.0], self.tallies["full", 1.0]
        rows = []
        for (name, share), one in self.tallies.items():
            if reason := self.not_possible.get((name, share)):
                rows.append(PruningRow(method=name, keep=share, not_possible=reason))
            elif one.losses:
                rows.append(
                    PruningRow(
                        method=name,
                        keep=share,
                        cache_bytes=statistics.fmean(one.cache_bytes) if one.cache_bytes else 0.0,
                        ratio=sum(one.full_bytes) / sum(one.cache_bytes) if one.cache_bytes else 0.0,
                        prefill_ms=statistics.median(one.prefill_ms) if one.prefill_ms else 0.0,
                        **one.scores(none, full),
                    )
                )
        return rows


def evaluate_pruning(
    condenser: Condenser,
    tasks: Iterable[Task],
    *,
    methods: Sequence[str],
    shares: Sequence[float],
    window: int | None = None,
    max_new_tokens: int | None = None,
    chunk_size: int | None = None,
    progress: Callable[[], None] | None = None,
    on_rows: Callable[[Callable[[], list[PruningRow]]], None] | None = None,
) -> list[PruningRow]:
    """Ask every question of ``tasks`` of caches that each method prunes to each share; the controls come first.

    These are ``full``: the whole cache; ``none``: no context; ``random``: tokens left to chance; ``query_aware``:
    SnapKV that reads each question before it prunes, and so has a cache for each, as methods with ``query_aware`` in
    their name have. All others prune once for all questions about a context.

    A context is read once, and all caches are pruned from what its layers computed (``DensePrefill``); the time of a
    prefill is put together from the parts that it would have had.

    A method that must keep more of one of the contexts than a share of it, or that refuses the model at its first
    context, has a row that says so.

    Args:
        condenser: of the decoder that is asked; its compressor is not used.
        tasks: contexts, and the questions about each.
        methods: as ``build`` takes them.
        shares: of the tokens, in (0, 1].
        window: for methods that have such a setting; None: their own.
        max_new_tokens: of an answer; None: 48 where the tokenizer has a chat template, else 16.
        chunk_size: prefill in chunks of so many tokens, with an eviction behind each; every cache is then made by a
            prefill of its own.
        progress: called once per task.
        on_rows: called before the first context and whenever the questions about one were answered from one cache,
            with a function that gives the rows so far.

    Raises:
        ValueError: there is no task, a name or a share is none, or a context is longer than the model's positions.
    """
    for share in shares:
        check_share("keep", share)
    for name in methods:
        if name not in CONTROLS:
            check_method(name)
    tasks = list(tasks)
    if not tasks:
        raise ValueError("tasks: empty; expected at least one")
    longest = max_new_tokens or default_max_new_tokens(bool(condenser.tokenizer.chat_template))
    report = on_rows or (lambda rows: None)
    cells = _Cells(methods, shares, window)
    model, tokenizer, args = condenser.model, condenser.tokenizer, condenser.template_args
    counts = [len(context_ids(model, tokenizer, task.context, args)) for task in tasks]
    cells.refuse(counts, condenser.model.config.num_hidden_layers)
    report(cells.rows)
    for number, task in enumerate(tasks):
        context = PrunedContext(condenser, task, longest, chunk_size)
        for (name, share), tally in cells.tallies.items():
            tally.context = number
            if (name, share) in cells.not_possible:
                continue
            try:
                context.measure(tally, name, partial(cells.made, name, share))
            except (ValueError, TypeError) as error:
                if name in ("full", "none") or tally.losses:
                    raise
                cells.not_possible[name, share] = " ".join(str(error).split())
            report(cells.rows)
        if progress:
            progress()
    return cells.rows()


class PrunedContext:
    """The questions about one context, which is read once for all caches that are made of it.

    With ``chunk_size`` every cache has a prefill of its own, since an eviction changes what later chunks compute.
    """

    def __init__(self, condenser: Condenser, task: Task, max_new_tokens: int, chunk_size: int | None) -> None:
        self.condenser, self.task, self.max_new_tokens, self.chunk_size = condenser, task, max_new_tokens, chunk_size
        model, tokenizer, args = condenser.model, condenser.tokenizer, condenser.template_args
        self.prompt = prompt_of(model, tokenizer, task.context, args)
        self.dense = None if chunk_size else DensePrefill(model, self._ids())

    def measure(self, tally: CacheTally, name: str, made: Callable[..., Method]) -> None:
        """Ask every question of the cache, or the caches, of one row."""
        condenser, turns, longest = self.condenser, self.task.turns, self.max_new_tokens
        if name == "none":
            _count(tally, turns, answers_about(condenser, "", turns, longest))
        elif knows_question(name):
            questions = [question_ids(condenser.tokenizer, t.question, condenser.template_args) for t in turns]
            caches = [self._pruned(tally, made(question)) for question in questions]
            _count(tally, turns, answers_from_caches(condenser, caches, turns, longest))
        else:
            _count(tally, turns, answers_from_cache(condenser, self._pruned(tally, made()), turns, longest))

    def _pruned(self, tally: CacheTally, method: Method) -> PrunedCache:
        method = method.for_prompt(self.prompt)
        if self.dense is None:
            started = time.perf_counter()
            cache = PrunedCache.prefill(self.condenser.model, self._ids(), method, chunk_size=self.chunk_size)
            synchronize(self.condenser)
            seconds = time.perf_counter() - started
        else:
            cache = self.dense.prune(method)
            synchronize(self.condenser)
            seconds = self.dense.seconds
        tally.prefill_ms.append(seconds * 1e3)
        tally.cache_bytes.append(cache.nbytes)  # before a question makes it grow
        tally.full_bytes.append(cache.full_nbytes)
        return cache

    def _ids(self) -> Tensor:
        return torch.tensor([self.prompt.input_ids], device=self.condenser.device)


def row_method(name: str, share: float, question: Sequence[int] | None = None, *, window: int | None = None) -> Method:
    """The method of the row ``name``, a control with a cache or a name as ``build`` takes it.

    Args:
        question: token ids, for a row that ``knows_question``.
        window: for methods that have such a setting; None: their own.
    """
    if name == "full":
        return Random(keep=1.0)
    spec = "snapkv" if name == "query_aware" else name
    return build(spec, keep=share, window=window if has_window(spec) else None, question_ids=question)


def knows_question(name: str) -> bool:
    """Whether the caches of a row know the question that they will be asked."""
    return name == "query_aware" or (name not in CONTROLS and reads_question(name))


def check_method(name: str) -> None:
    """``ValueError`` unless ``name`` names a pruning method, which may read the question."""
    build(name, keep=1.0, question_ids=[0] if reads_question(name) else None)


def _count(tally: CacheTally, turns: Sequence[Turn], answers: Answers) -> None:
    tally.answer_ms += [answers.ms] * len(turns)
    for turn, text, loss in zip(turns, answers.texts, answers.losses, strict=True):
        tally.add(turn, text, loss)
