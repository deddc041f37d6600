"""How well a model answers from pruned caches: accuracy, losses, bytes and times, by method and kept share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from condense_core.compressor.condenser import Condenser
from condense_core.pruning.base import Method, check_share
from condense_core.pruning.build import build, has_window
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.methods import Random
from condense_core.pruning.text import answer_loss, ask, prefill, question_ids
from condense_core.tasks.evaluate import Tally, answer_ids, synchronize
from condense_core.tasks.evaluate import answer_loss as loss_of_text
from condense_core.tasks.generators import Task, Turn

CONTROLS = ("full", "none", "random", "query_aware")


@dataclass(frozen=True)
class PruningRow:
    """One cache: what pruned it, and to what share.

    method: a control or a name as ``build`` takes it. keep: the share asked for; 1 and 0 stand for the controls
    ``full`` and ``none``. cache_bytes: mean bytes of a cache before a question, as measured; ratio: bytes of the full
    caches over those. prefill_ms: median time to read one context and prune it (with the question, where that decides
    what stays). answer_ms: mean time to answer one question behind the cache. The rest as in ``EvalRow``.
    """

    method: str
    keep: float
    accuracy: float
    f1: float
    loss: float
    recovered: float
    cache_bytes: float
    ratio: float
    prefill_ms: float
    answer_ms: float
    num_questions: int
    by_kind: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _CacheTally(Tally):
    cache_bytes: list[int] = field(default_factory=list)
    full_bytes: list[int] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)


def evaluate_pruning(
    condenser: Condenser,
    tasks: Iterable[Task],
    *,
    methods: Sequence[str],
    shares: Sequence[float],
    window: int | None = None,
    max_new_tokens: int = 16,
    progress: Callable[[], None] | None = None,
) -> list[PruningRow]:
    """Ask every question of ``tasks`` of caches that each method prunes to each share; the controls come first.

    These are ``full``: the whole cache; ``none``: no context; ``random``: tokens left to chance; ``query_aware``:
    SnapKV that reads each question before it prunes, and so has a cache for each. All others prune once for all
    questions about a context.

    Args:
        methods: as ``build`` takes them. shares: of the tokens, in (0, 1].
        window: for methods that have such a setting; None: their own.
        progress: called once per task.

    Raises:
        ValueError: there is no task, a name or a share is none, or a share is less than a method must keep.
    """
    shares = list(dict.fromkeys(shares))
    for share in shares:
        check_share("keep", share)
    methods = [name for name in dict.fromkeys(methods) if name not in CONTROLS]
    for name in methods:
        build(name, keep=1.0)
    tallies: dict[tuple[str, float], _CacheTally] = {}

    def tally(name: str, share: float) -> _CacheTally:
        return tallies.setdefault((name, share), _CacheTally())

    def made(name: str, share: float, question: list[int] | None = None) -> Method:
        return build(name, keep=share, window=window if has_window(name) else None, question_ids=question)

    for task in tasks:
        _once(tally("full", 1.0), condenser, task.context, Random(keep=1.0), task.turns, max_new_tokens)
        _without(tally("none", 0.0), condenser, task.turns, max_new_tokens)
        for share in shares:
            _once(tally("random", share), condenser, task.context, made("random", share), task.turns, max_new_tokens)
        for share in shares:
            for turn in task.turns:
                method = made("snapkv", share, question_ids(condenser.tokenizer, turn.question))
                _once(tally("query_aware", share), condenser, task.context, method, (turn,), max_new_tokens)
        for name in methods:
            for share in shares:
                _once(tally(name, share), condenser, task.context, made(name, share), task.turns, max_new_tokens)
        if progress:
            progress()
    if not tallies:
        raise ValueError("tasks: empty; expected at least one")
    none, full = tallies["none", 0.0].loss(), tallies["full", 1.0].loss()
    order = {name: i for i, name in enumerate((*CONTROLS, *methods))}
    return [
        PruningRow(
            method=name,
            keep=share,
            cache_bytes=statistics.fmean(one.cache_bytes) if one.cache_bytes else 0.0,
            ratio=sum(one.full_bytes) / sum(one.cache_bytes) if one.cache_bytes else 0.0,
            prefill_ms=statistics.median(one.prefill_ms) if one.prefill_ms else 0.0,
            **one.scores(none, full),
        )
        for (name, share), one in sorted(tallies.items(), key=lambda item: order[item[0][0]])  # stable
    ]


def _once(
    tally: _CacheTally, condenser: Condenser, context: str, method: Method, turns: Sequence[Turn], max_new_tokens: int
) -> None:
    """Read the context once, and ask the questions of what stays."""
    started = time.perf_counter()
    cache = prefill(condenser.model, condenser.tokenizer, context, method)
    synchronize(condenser)
    tally.prefill_ms.append((time.perf_counter() - started) * 1e3)
    tally.cache_bytes.append(cache.nbytes)  # before a question makes it grow
    tally.full_bytes.append(cache.full_nbytes)
    for turn in turns:
        started = time.perf_counter()
        answer = ask(condenser.model, condenser.tokenizer, cache, turn.question, max_new_tokens=max_new_tokens)
        tally.answer_ms.append((time.perf_counter() - started) * 1e3)
        tally.add(turn, answer, _loss(condenser, cache, turn))


def _without(tally: _CacheTally, condenser: Condenser, turns: Sequence[Turn], max_new_tokens: int) -> None:
    for turn in turns:
        started = time.perf_counter()
        answer = condenser.generate("", turn.question, max_new_tokens=max_new_tokens)
        tally.answer_ms.append((time.perf_counter() - started) * 1e3)
        tally.add(turn, str(answer), loss_of_text(condenser, "", turn.question, turn.answer))


def _loss(condenser: Condenser, cache: PrunedCache, turn: Turn) -> float:
    tokenizer = condenser.tokenizer
    answer = answer_ids(tokenizer, turn.question, turn.answer)
    return answer_loss(condenser.model, cache, question_ids(tokenizer, turn.question), answer)
