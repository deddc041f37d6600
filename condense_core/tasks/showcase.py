"""The demonstration on a real LLM: every way to give it the demo's text, what each costs and what it answers from it.

The text and its facts are those of ``demo``. Each way gets a quarter of the text's positions: soft tokens, the
sentences that the question asks for, and pruned caches; beside them stand the full text and nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from condense_core.compressor.choice import find_checkpoint
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import TRAINED_METHODS
from condense_core.pruning.build import build
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.dense import DensePrefill
from condense_core.pruning.text import ask, prefill, prompt_of, question_ids
from condense_core.tasks.answers import answers_about, answers_from_cache, answers_from_caches, answers_from_each
from condense_core.tasks.demo import DEMO_FACTS, demo_text
from condense_core.tasks.evaluate import synchronize
from condense_core.tasks.generators import Turn
from condense_core.tasks.metrics import contained

RATIO = 4
MAX_NEW_TOKENS = 32
#: The methods behind the two rows of pruned caches; docs/pruning.md says why these.
CACHE, CACHE_FOR_QUESTION = "sentences(surprise)", "sentences(query_aware(peak_attention))"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """One way to give the model the text.

    Attributes:
        name: as a table shows it.
        positions: that the text takes in the model; 0 where it is not given.
        kv_bytes: of the KV cache of these positions.
        once_ms: milliseconds for what is done once for the text; None where there is no such thing.
        question_ms: milliseconds from a question to the first token of its answer.
        answers: to the questions of ``DEMO_FACTS``, in order.
    """

    name: str
    positions: int
    kv_bytes: int
    once_ms: float | None
    question_ms: float
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Showcase:
    """What was measured, way by way."""

    model: str
    device: str
    context_chars: int
    context_tokens: int
    ways: tuple[Way, ...]

    def to_json(self) -> dict[str, Any]:
        """The document that ``condense demo --json`` prints."""
        questions = [{"question": fact.question, "expected": fact.answer} for fact in DEMO_FACTS]
        return {**asdict(self), "questions": questions}


def run_showcase(condenser: Condenser, progress: Progress | None = None) -> Showcase:
    """Give the model of ``condenser`` the demo's text in every way, measure and ask.

    progress: called with the name of each way before it is measured.

    Raises:
        ValueError: the whole text does not fit the model's positions.
    """
    num_tokens = len(condenser.encode(demo_text()))
    if num_tokens + 100 >= condenser.max_positions:
        raise ValueError(
            f"model: the demo's text has {num_tokens} tokens for {condenser.model_id!r}, which reads "
            f"{condenser.max_positions} positions; expected a model of at least {num_tokens + 100}"
        )
    ways = []
    for name, measure in _ways(condenser):
        if progress:
            progress(name)
        ways.append(measure(name))
    return Showcase(condenser.model_id, str(condenser.device), len(demo_text()), num_tokens, tuple(ways))


def _ways(condenser: Condenser) -> Iterator[tuple[str, Callable[[str], Way]]]:
    """The name of each way, and what measures it."""
    yield "the full text", partial(_full, condenser=condenser)
    for folder in trained_compressors(condenser):
        other = Condenser(condenser.model, condenser.tokenizer, compressor=folder)
        if not other.config.ratios or RATIO in other.config.ratios:
            yield f"{other.config.method}, {RATIO}x", partial(_soft, condenser=other)
    select = Condenser(condenser.model, condenser.tokenizer, method="select")
    yield f"select with the question, {RATIO}x", partial(_selected, condenser=select)
    yield f"pruned cache, {RATIO}x", partial(_pruned, condenser=condenser)
    yield f"cache pruned for the question, {RATIO}x", partial(_pruned_for_each, condenser=condenser)
    yield "nothing", partial(_nothing, condenser=condenser)


def trained_compressors(condenser: Condenser) -> list[Path]:
    """Folders of the trained compressors that lie beside the model, or ship for it."""
    found = (find_checkpoint(condenser.model, method) for method in TRAINED_METHODS)
    return [folder for folder in found if folder is not None]


_TURNS = tuple(Turn(fact.question, fact.answer, fact.kind) for fact in DEMO_FACTS)


def _timed(condenser: Condenser, work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` gives, and the milliseconds that it took."""
    synchronize(condenser)
    started = time.perf_counter()
    result = work()
    synchronize(condenser)
    return result, round((time.perf_counter() - started) * 1e3, 1)


def _first_token(condenser: Condenser, context: Any) -> Callable[[], Any]:
    question = DEMO_FACTS[0].question
    return lambda: condenser.generate(context, question, max_new_tokens=1)


def _full(name: str, condenser: Condenser) -> Way:
    text = demo_text()
    count = len(condenser.encode(text))
    _, question_ms = _timed(condenser, _first_token(condenser, text))
    answers = answers_about(condenser, text, _TURNS, MAX_NEW_TOKENS).texts
    return Way(name, count, condenser.kv_bytes(count), None, question_ms, tuple(answers))


def _nothing(name: str, condenser: Condenser) -> Way:
    _, question_ms = _timed(condenser, _first_token(condenser, ""))
    return Way(name, 0, 0, None, question_ms, tuple(answers_about(condenser, "", _TURNS, MAX_NEW_TOKENS).texts))


def _soft(name: str, condenser: Condenser) -> Way:
    condenser.compress(demo_text(), RATIO)  # a first time, which sets up what the next one finds ready
    soft, once_ms = _timed(condenser, lambda: condenser.compress(demo_text(), RATIO))
    _, question_ms = _timed(condenser, _first_token(condenser, soft))
    answers = answers_about(condenser, soft, _TURNS, MAX_NEW_TOKENS).texts
    return Way(name, len(soft), condenser.kv_bytes(len(soft)), once_ms, question_ms, tuple(answers))


def _selected(name: str, condenser: Condenser) -> Way:
    questions = [turn.question for turn in _TURNS]

    def first() -> Any:
        soft = condenser.compress(demo_text(), RATIO, question=questions[0])
        return condenser.generate(soft, questions[0], max_new_tokens=1)

    _, question_ms = _timed(condenser, first)
    softs = condenser.compress([demo_text()] * len(questions), RATIO, question=questions)
    answers = answers_from_each(condenser, softs, _TURNS, MAX_NEW_TOKENS).texts
    count = len(softs[0])
    return Way(name, count, condenser.kv_bytes(count), None, question_ms, tuple(answers))


def _pruned(name: str, condenser: Condenser) -> Way:
    model, tokenizer = condenser.model, condenser.tokenizer
    cache, once_ms = _timed(condenser, lambda: prefill(model, tokenizer, demo_text(), build(CACHE, keep=1 / RATIO)))
    _, question_ms = _timed(condenser, lambda: ask(model, tokenizer, cache, DEMO_FACTS[0].question, max_new_tokens=1))
    answers = answers_from_cache(condenser, cache, _TURNS, MAX_NEW_TOKENS).texts
    return Way(name, _positions(condenser, cache), cache.nbytes, once_ms, question_ms, tuple(answers))


def _pruned_for_each(name: str, condenser: Condenser) -> Way:
    model, tokenizer = condenser.model, condenser.tokenizer
    methods = [
        build(CACHE_FOR_QUESTION, keep=1 / RATIO, question_ids=question_ids(tokenizer, turn.question))
        for turn in _TURNS
    ]

    def first() -> PrunedCache:
        cache = prefill(model, tokenizer, demo_text(), methods[0])
        ask(model, tokenizer, cache, _TURNS[0].question, max_new_tokens=1)
        return cache

    cache, question_ms = _timed(condenser, first)
    # The answers come from one reading of the text, which gives the same caches.
    prompt = prompt_of(model, tokenizer, demo_text())
    dense = DensePrefill(model, torch.tensor([prompt.input_ids], device=condenser.device))
    caches = [dense.prune(method.for_prompt(prompt)) for method in methods]
    answers = answers_from_caches(condenser, caches, _TURNS, MAX_NEW_TOKENS).texts
    return Way(name, _positions(condenser, cache), cache.nbytes, None, question_ms, tuple(answers))


def _positions(condenser: Condenser, cache: PrunedCache) -> int:
    """Positions that a cache holds, counted by its bytes: heads may hold different ones."""
    return round(cache.nbytes / condenser.kv_bytes(1))


def right_answers(answers: Sequence[str]) -> list[bool]:
    """Which of the answers contain the value that was asked for."""
    return [bool(contained(given, fact.answer)) for given, fact in zip(answers, DEMO_FACTS, strict=True)]
