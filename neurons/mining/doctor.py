"""What a miner's answers would be worth: challenges as a validator makes them, scored with the validator's own code.

No chain and no wallet are needed. What is measured is this backend on this machine.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.soft_tokens import SoftTokensError
from condense_core.decoder.identity import same_name
from condense_core.neurons.incentive.score import Score, failed
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.judging.opened import open_judge
from condense_core.neurons.judging.supply import Supply
from condense_core.neurons.mining.backends import Backend, answer_of, served_ratio
from condense_core.neurons.mining.opened import BackendChoice
from condense_core.neurons.mining.verdict import YOURS, Examined, verdict
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import Tier, Tiers
from condense_core.serving.errors import ServingError
from condense_core.tasks.generators import Turn
from condense_core.tasks.sources import open_source
from condense_core.tasks.squad import read_squad

BASELINES = ("select", "mean")
"""Compressors that need no training, made of the judge's model; a checkpoint of its own is used where it has one."""
_DRAWN = 4
"""Challenges drawn for each that is wanted: a context that does not help the LLM says nothing of an answer."""


async def examined(
    choice: BackendChoice,
    tiers: Tiers,
    wanted: Sequence[str] = (),
    *,
    rounds: int,
    corpus: str | None = None,
    squad: Path | None = None,
    told: Callable[[int, int, str], None] = lambda done, total, line: None,
) -> list[dict[str, Any]]:
    """The ``verdict`` of each tier that the backend serves, or of those ``wanted``.

    Args:
        rounds: challenges of each tier. corpus, squad: text, as ``open_source`` takes it, or a file of questions.
        told: how many challenges are done, of how many, and in which tier.

    Raises:
        ValueError: something cannot be loaded, a tier is not served, or no text of it says anything.
    """
    supply = Supply(tiers, open_source(corpus), [] if squad is None else read_squad(squad))
    backend = choice.open(tiers)
    found, judges = [], dict[str, Judge]()
    await backend.start()
    try:
        served = [name for name, tier in tiers.tiers.items() if backend.serves(tier)]
        names = list(dict.fromkeys(wanted)) or served
        if missing := [name for name in names if name not in served]:
            model = tiers.tiers[missing[0]].model
            raise ValueError(f"tier: {missing[0]!r} is not served by this backend, expected the model {model}")
        if not names:
            models = sorted({tier.model for tier in tiers.tiers.values()})
            raise ValueError(f"backend: it serves no tier, expected the model {' or '.join(models)}")
        for number, name in enumerate(names):
            tier = tiers.tiers[name]
            if tier.model not in judges:
                own = choice.model if choice.model is not None and same_name(choice.model, tier.model) else tier.model
                judges[tier.model] = open_judge(own, device=choice.device, dtype=choice.dtype)
            one = await examine(
                backend,
                judges[tier.model],
                tier,
                (supply.make(name) for _ in itertools.count()),
                rounds,
                secret=secrets.token_hex(16),
                told=partial(_tell, told, number * rounds, len(names) * rounds, name),
            )
            found.append(verdict(tiers, name, one, judges[tier.model].model_id))
    finally:
        await backend.stop()
    return found


def _tell(told: Callable[[int, int, str], None], before: int, total: int, name: str, done: int) -> None:
    told(before + done, total, name)


async def examine(
    backend: Backend,
    judge: Judge,
    tier: Tier,
    challenges: Iterator[Challenge],
    rounds: int,
    *,
    secret: str,
    told: Callable[[int], Any] = lambda done: None,
) -> list[Examined]:
    """Scores of ``rounds`` challenges: first the backend's, which has started, then those of the ``BASELINES``.

    Raises:
        ValueError: no challenge of those drawn is telling.
    """
    of_judge = judge.condenser
    baselines = {name: Condenser(of_judge.model, of_judge.tokenizer, method=name) for name in BASELINES}
    found = [Examined(name) for name in (YOURS, *baselines)]
    for one in itertools.islice(challenges, _DRAWN * rounds):
        telling = await asyncio.to_thread(judge.telling, one, tier.questions)
        if telling is None:
            continue
        turns = telling.drawn(tier.questions, secret)
        if not found[0].scores:  # what only a first request costs
            await _answered(backend, one.ask, tier)
        answers = [await _answered(backend, one.ask, tier)]
        answers += [await asyncio.to_thread(_compressed, condenser, one.ask) for condenser in baselines.values()]
        for each, (body, seconds, why) in zip(found, answers, strict=True):
            score = (
                failed(why, seconds)
                if why
                else await asyncio.to_thread(_scored, judge, body, one, tier, turns, seconds)
            )
            each.scores.append(score)
        told(len(found[0].scores))
        if len(found[0].scores) == rounds:
            break
    if not found[0].scores:
        raise ValueError(
            f"tier: of {_DRAWN * rounds} contexts none helps {judge.model_id} with its questions, expected another "
            "text (--corpus, --squad)"
        )
    return found


def _scored(judge: Judge, body: bytes, one: Challenge, tier: Tier, turns: tuple[Turn, ...], seconds: float) -> Score:
    return judge.score(body, one.ask, tier, turns, seconds)[0]


async def _answered(backend: Backend, ask: Ask, tier: Tier) -> tuple[bytes, float, str]:
    """What a validator would be sent, how long it took, and why there is nothing."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(2 * tier.timeout):
            body, why = await answer_of(backend, ask, bytes, priority=0, timeout=tier.timeout), ""
    except TimeoutError:
        body, why = b"", f"late: nothing within {2 * tier.timeout:g} s, expected at most {tier.timeout:g}"
    except (ServingError, SoftTokensError) as error:
        body, why = b"", " ".join(str(error).split())
    return body, time.monotonic() - started, why


def _compressed(condenser: Condenser, ask: Ask) -> tuple[bytes, float, str]:
    started, name = time.monotonic(), condenser.config.method
    ratio = served_ratio(ask.ratio, name, condenser.config.ratios or "any")
    try:
        body, why = condenser.compress(ask.text, ratio).to_bytes(), ""
    except ValueError as error:  # a ratio that is too high for the text
        body, why = b"", " ".join(str(error).split())
    return body, time.monotonic() - started, why
