"""The score of an answer: absolute, in [0, 1], of this answer and its challenge alone.

It does not depend on other miners, so nobody gains by making others look worse, and no rank turns noise into pay. What
needs no work is worth nothing: the validator measures trivial compressions of the same context itself, and pays for
what goes beyond the best of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from condense_core.neurons.tiers import Tier

LEAST_GAIN = 0.1
"""Nats per token by which a context must help the LLM, or its challenge says nothing about an answer."""
LEAST_RIGHT = 1.0
"""Questions that the LLM must get right with the full context. Where it gets none right, losses alone would count, and
vectors that were optimised to make answers likely, without any context, have low ones."""
MOST_FREE = 0.8
"""Quality that trivial compressions may have, or what is left for others is too little to tell them apart."""


@dataclass(frozen=True)
class Reading:
    """How the LLM did on the questions about one context, given one form of it.

    Attributes:
        losses: of each right answer, nats per token. correct: how right the LLM's own answer was, in [0, 1].
    """

    losses: tuple[float, ...]
    correct: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.losses or len(self.losses) != len(self.correct):
            raise ValueError(
                f"losses, correct: got {len(self.losses)} and {len(self.correct)}, expected one of each a question"
            )
        if not all(0 <= c <= 1 for c in self.correct):
            raise ValueError(f"correct: got {self.correct}, expected numbers in [0, 1]")

    def of(self, places: Sequence[int]) -> Reading:
        """That of some of the questions, by their places."""
        return Reading(tuple(self.losses[i] for i in places), tuple(self.correct[i] for i in places))


@dataclass(frozen=True)
class Reference:
    """What a challenge's answers are measured against, all read by the same LLM with the same questions.

    Attributes:
        full, none: the whole context, and none. trivial: compressions that need no work, at the asked ratio.
    """

    full: Reading
    none: Reading
    trivial: tuple[Reading, ...] = ()

    @property
    def is_telling(self) -> bool:
        """Whether the context helps with its questions, and not without work; else no answer is scored."""
        gain = sum(self.none.losses) - sum(self.full.losses)
        helps = math.isfinite(gain) and gain >= LEAST_GAIN * len(self.full.losses)
        return helps and sum(self.full.correct) >= LEAST_RIGHT and self.free <= MOST_FREE

    def of(self, places: Sequence[int]) -> Reference:
        """That of some of the questions, by their places: each is read by itself."""
        return Reference(self.full.of(places), self.none.of(places), tuple(each.of(places) for each in self.trivial))

    @property
    def free(self) -> float:
        """The quality that needs no work: that of the best trivial compression."""
        return max((_recovered(each, self) * _correctness(each, self) for each in self.trivial), default=0.0)


@dataclass(frozen=True)
class Score:
    """A score and what it is made of, all in [0, 1] but ``ratio`` and ``seconds``.

    Attributes:
        value: what counts. recovered: share of the context's help that the answer kept. correctness: share of the
            questions that the LLM gets right with the full context and still does. quality: their product, beyond the
            trivial compression. efficiency: of compression and latency; it counts above the tier's floor of quality.
        ratio: context tokens for each soft token. seconds: as the validator measured them.
        why: for a score of 0 without a reading, what was wrong.
    """

    value: float
    recovered: float = 0.0
    correctness: float = 0.0
    quality: float = 0.0
    efficiency: float = 0.0
    ratio: float = 0.0
    seconds: float = 0.0
    why: str = ""


def failed(why: str, seconds: float = 0.0) -> Score:
    """The score of an answer that is none, was late or invalid, or never came."""
    return Score(0.0, seconds=seconds, why=why)


def score(
    reading: Reading, reference: Reference, tier: Tier, *, context_tokens: int, soft_tokens: int, seconds: float
) -> Score:
    """The score of a valid answer that came in time.

    Args:
        reading: the LLM's, given the answer. context_tokens: as counted here. soft_tokens: of the answer.
        seconds: until its last byte.

    Raises:
        ValueError: the challenge is not telling, or the readings are of other questions.
    """
    if not reference.is_telling:
        raise ValueError(
            "reference: the context helps too little, or without work, expected a challenge that is telling"
        )
    if len(reading.losses) != len(reference.full.losses):
        raise ValueError(f"reading: of {len(reading.losses)} questions, expected {len(reference.full.losses)}")
    recovered, correctness = _recovered(reading, reference), _correctness(reading, reference)
    quality = max(0.0, (recovered * correctness - reference.free) / (1 - reference.free))
    ratio = context_tokens / soft_tokens
    efficiency = (_compression(ratio, tier) + _clip(1 - seconds / tier.timeout)) / 2
    weight = tier.efficiency_weight
    counted = efficiency if quality >= tier.quality_floor else 0.0
    value = quality * (1 - weight + weight * counted)
    return Score(_clip(value), recovered, correctness, quality, efficiency, ratio, seconds)


def _recovered(reading: Reading, reference: Reference) -> float:
    """Of sums, not the mean of shares: a question that the context hardly helps with has a share of any size."""
    gain = sum(reference.none.losses) - sum(reference.full.losses)
    kept = sum(reference.none.losses) - sum(reading.losses)
    return _clip(kept / gain)


def _correctness(reading: Reading, reference: Reference) -> float:
    """Of what the LLM gets right with the full context; the challenge is telling, so that this is something."""
    return _clip(sum(reading.correct) / max(sum(reference.full.correct), LEAST_RIGHT))


def _compression(ratio: float, tier: Tier) -> float:
    """0 at the tier's smallest ratio, 1 at its highest, by factors."""
    if tier.max_ratio <= tier.min_ratio:
        return 0.0
    return _clip(math.log(max(ratio, 1e-9) / tier.min_ratio) / math.log(tier.max_ratio / tier.min_ratio))


def _clip(value: float) -> float:
    """Into [0, 1]; what is no number is worth nothing."""
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
