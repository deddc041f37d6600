"""The demonstration: one text, its soft tokens at three ratios, what they save and what the model knows from them.

Every number is measured when it runs. The text and its facts are part of the package; the facts' entities and answers
belong to the evaluation split, so no training text of ours ever held them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch

from condense_core.compressor.condenser import Condenser, Context
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.tasks.facts import Fact

RATIOS = (4, 8, 16)
MAX_NEW_TOKENS = 24
_REPEATS, _SECONDS_PER_TIMING = 7, 1.5

DEMO_FACTS = (
    Fact(
        kind="name",
        attribute="keeper",
        entity="the misty lighthouse",
        answer="Wanda Beldorf",
        statement="The keeper of the misty lighthouse is Wanda Beldorf.",
        question="Who is the keeper of the misty lighthouse?",
    ),
    Fact(
        kind="code",
        attribute="serial number",
        entity="the silver telescope",
        answer="X7984",
        statement="Note that the serial number of the silver telescope is X7984.",
        question="What is the serial number of the silver telescope?",
    ),
    Fact(
        kind="date",
        attribute="founding date",
        entity="the grey abbey",
        answer="23 March 1747",
        statement="According to the records, the founding date of the grey abbey was 23 March 1747.",
        question="What is the founding date of the grey abbey?",
    ),
    Fact(
        kind="place",
        attribute="supply port",
        entity="the bronze ferry",
        answer="Kalmouth",
        statement="For the bronze ferry, the supply port is Kalmouth.",
        question="What is the supply port of the bronze ferry?",
    ),
    Fact(
        kind="amount",
        attribute="daily output",
        entity="the twin brewery",
        answer="2485 barrels",
        statement="At the twin brewery, the daily output has long been 2485 barrels.",
        question="How much is the daily output of the twin brewery?",
    ),
    Fact(
        kind="name",
        attribute="architect",
        entity="the golden viaduct",
        answer="Hugo Quinmark",
        statement="Everyone agrees that the architect of the golden viaduct is Hugo Quinmark.",
        question="Name the architect of the golden viaduct.",
    ),
)


@dataclass(frozen=True)
class Report:
    """What the demonstration measured; keys of the mappings are ``full``, ``none`` and the ratios as strings."""

    model: str
    method: str
    device: str
    context_chars: int
    context_tokens: int
    soft_tokens: Mapping[str, int]
    compress_ms: Mapping[str, float]
    ttft_ms: Mapping[str, float]
    kv_bytes: Mapping[str, int]
    answers: Mapping[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        """The document that ``condense demo --json`` prints."""
        questions = [
            {
                "question": fact.question,
                "expected": fact.answer,
                **{key: given[i] for key, given in self.answers.items()},
            }
            for i, fact in enumerate(DEMO_FACTS)
        ]
        return {
            "context_chars": self.context_chars,
            "context_tokens": self.context_tokens,
            "soft_tokens": dict(self.soft_tokens),
            "compress_ms": dict(self.compress_ms),
            "ttft_ms": dict(self.ttft_ms),
            "kv_bytes": dict(self.kv_bytes),
            "questions": questions,
        }


def demo_text() -> str:
    """The text of the demonstration."""
    return files("condense_core.tasks").joinpath("demo_text.txt").read_text(encoding="utf-8").strip()


def run_demo(condenser: Condenser) -> Report:
    """Compress, time and ask. ``ValueError`` where the whole text does not fit the model's positions."""
    text = demo_text()
    num_tokens = len(condenser.encode(text))
    if num_tokens >= condenser.max_positions:
        raise ValueError(
            f"model: the demo's text has {num_tokens} tokens for {condenser.model_id!r}, which reads "
            f"{condenser.max_positions} positions; expected a model of at least {num_tokens + 100}"
        )
    soft = {str(ratio): condenser.compress(text, ratio) for ratio in RATIOS}
    compress_ms = {key: _median_ms(condenser, _compress(condenser, text, int(key))) for key in soft}
    contexts: dict[str, Context] = {"full": text, **soft}
    ttft_ms = {key: _median_ms(condenser, _first_token(condenser, context)) for key, context in contexts.items()}
    questions = [fact.question for fact in DEMO_FACTS]
    answers = {
        key: list(condenser.generate(context, questions, max_new_tokens=MAX_NEW_TOKENS))
        for key, context in {**contexts, "none": ""}.items()
    }
    return Report(
        model=condenser.model_id,
        method=condenser.config.method,
        device=str(condenser.device),
        context_chars=len(text),
        context_tokens=num_tokens,
        soft_tokens={key: len(tokens) for key, tokens in soft.items()},
        compress_ms=compress_ms,
        ttft_ms=ttft_ms,
        kv_bytes={"full": condenser.kv_bytes(num_tokens)}
        | {key: condenser.kv_bytes(len(tokens)) for key, tokens in soft.items()},
        answers=answers,
    )


def _compress(condenser: Condenser, text: str, ratio: int) -> Callable[[], SoftTokens]:
    return lambda: condenser.compress(text, ratio)


def _first_token(condenser: Condenser, context: Context) -> Callable[[], Any]:
    """The decoder's work up to its first token: the prompt is already embedded."""
    inputs = condenser.prepare(context, DEMO_FACTS[0].question)
    pad = condenser.tokenizer.eos_token_id
    return lambda: condenser.model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=pad)


def _median_ms(condenser: Condenser, work: Callable[[], Any]) -> float:
    """Median milliseconds of ``work`` after one warm-up run, over several runs as time permits."""
    work()
    times: list[float] = []
    while len(times) < _REPEATS and (len(times) < 3 or sum(times) < _SECONDS_PER_TIMING):
        _synchronize(condenser.device)
        start = time.perf_counter()
        work()
        _synchronize(condenser.device)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 3)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
